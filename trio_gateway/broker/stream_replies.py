"""Redis' replies about streams, parsed into types.

A reply of another shape raises :exc:`ConnectionLost`: it may be the reply to another command.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import hiredis
import msgspec

from ..core.event_ids import START, Position, read_position
from ..runtime.stream_inlet import Entry
from ..runtime.supervision import ConnectionLost

_FIELD: Final = b"data"
_RawEntry = tuple[bytes, list[bytes] | None]


class Info(NamedTuple):
    """How a stream stands; the defaults are those of one that is not there."""

    last: Position = START  # of all that it ever had
    first: Position | None = None
    length: int = 0
    added: int | None = 0  # ever; None before Redis 7


class _RawInfo(msgspec.Struct, rename="kebab"):
    length: int
    last_generated_id: bytes
    first_entry: _RawEntry | None
    entries_added: int | None = None


def read_news(reply: Any) -> list[tuple[str, list[Entry]]]:
    """Of XREAD: the new entries of each stream that has some."""
    with _shaped():
        raw = _convert(reply, list[tuple[bytes, list[_RawEntry]]] | None)
        return [(name.decode(), list(map(_read_entry, entries))) for name, entries in raw or ()]


def read_entries(reply: Any) -> list[Entry]:
    """Of XREVRANGE."""
    with _shaped():
        return list(map(_read_entry, _convert(reply, list[_RawEntry])))


def read_info(reply: Any) -> Info:
    """Of XINFO STREAM."""
    if isinstance(reply, hiredis.ReplyError):
        if "no such key" in str(reply):
            return Info()
        raise ConnectionLost(f"XINFO failed: {str(reply).split(' ', 1)[0]}")
    with _shaped():
        words = _convert(reply, list[Any])
        names = [name.decode() for name in _convert(words[::2], list[bytes])]
        raw = _convert(dict(zip(names, words[1::2], strict=True)), _RawInfo)
        return Info(
            _read_id(raw.last_generated_id),
            _read_entry(raw.first_entry).position if raw.first_entry is not None else None,
            raw.length,
            raw.entries_added,
        )


def read_deleted(reply: Any) -> Position:
    """Of XINFO STREAM: the last entry that was deleted by its id; the start if none is known."""
    if not isinstance(reply, list) or b"max-deleted-entry-id" not in reply[::2]:
        return START
    with _shaped():
        return _read_id(reply[2 * reply[::2].index(b"max-deleted-entry-id") + 1])


def read_time(reply: Any) -> float | None:
    """Of TIME, unix time; None from one that does not tell us."""
    if isinstance(reply, hiredis.ReplyError):
        return None
    with _shaped():
        seconds, microseconds = _convert(reply, tuple[bytes, bytes])
        return int(seconds) + int(microseconds) / 1e6


def _read_entry(raw: _RawEntry) -> Entry:
    entry_id, fields = raw
    if fields is not None and len(fields) == 2 and fields[0] == _FIELD:  # nearly always
        return Entry(_read_id(entry_id), fields[1])
    fields = fields or []
    payload = dict(zip(fields[::2], fields[1::2], strict=True)).get(_FIELD)
    return Entry(_read_id(entry_id), payload)


def _read_id(raw: bytes) -> Position:
    return read_position(raw.decode())


def _convert(reply: Any, kind: Any) -> Any:
    return msgspec.convert(reply, kind, builtin_types=(bytes,))


@contextmanager
def _shaped() -> Iterator[None]:
    try:
        yield
    except (msgspec.ValidationError, ValueError) as error:
        raise ConnectionLost("unexpected reply") from error
