"""Redis' replies about streams, parsed into types.

A reply of another shape raises :exc:`ConnectionLost`: it may be the reply to another command.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Final, NamedTuple

import hiredis
import msgspec

from ..core.event_ids import START, Position, read_position
from ..runtime.source import Entry
from ..runtime.supervision import ConnectionLost
from .connection import no_error

_FIELD: Final = b"data"
# Errors that may concern one key alone: it is of another type, or the user has no right to it.
_OF_A_KEY: Final = frozenset({"WRONGTYPE", "NOPERM", "ERR"})
_SHORT: Final = 20  # characters of an id; then its numbers have less than 64 bits
_positions: Final[Callable[[bytes], list[Position]]] = msgspec.json.Decoder(list[Position]).decode
_RawEntry = tuple[bytes, list[bytes] | None]


class Info(NamedTuple):
    """What XINFO STREAM says; the defaults are for a stream that does not exist."""

    last: Position = START  # the newest id that was ever added
    first: Position | None = None  # the oldest entry; None if there is no entry
    length: int = 0
    added: int | None = 0  # how many entries were ever added; None before Redis 7
    deleted: Position = START  # the newest entry that was deleted by its id; START if unknown


class _RawInfo(msgspec.Struct, rename="kebab"):
    length: int
    last_generated_id: bytes
    first_entry: _RawEntry | None
    entries_added: int | None = None
    max_deleted_entry_id: bytes | None = None


def read_news(reply: Any) -> list[tuple[str, list[Entry]]]:
    """Parse the reply to XREAD: the new entries of each stream that has any."""
    with _shaped():
        raw = _convert(reply, list[tuple[bytes, list[_RawEntry]]] | None)
        return [(name.decode(), _read_entries(entries)) for name, entries in raw or ()]


def read_entries(reply: Any) -> list[Entry]:
    """Parse the reply to XREVRANGE."""
    with _shaped():
        return _read_entries(_convert(reply, list[_RawEntry]))


def read_info(reply: Any, name: str) -> Info:
    """Parse the reply to XINFO STREAM. A stream that does not exist is an empty one."""
    if isinstance(reply, hiredis.ReplyError):
        if "no such key" in str(reply):
            return Info()
        no_error(reply, f"XINFO {name}")
    with _shaped():
        words = _convert(reply, list[Any])
        names = [name.decode() for name in _convert(words[::2], list[bytes])]
        raw = _convert(dict(zip(names, words[1::2], strict=True)), _RawInfo)
        return Info(
            _read_id(raw.last_generated_id),
            _read_id(raw.first_entry[0]) if raw.first_entry is not None else None,
            raw.length,
            raw.entries_added,
            _read_id(raw.max_deleted_entry_id) if raw.max_deleted_entry_id else START,
        )


def error_of_key(reply: Any) -> str | None:
    """The first word of an error reply that may concern its key alone; None for other replies."""
    if not isinstance(reply, hiredis.ReplyError) or "no such key" in str(reply):
        return None
    word = str(reply).split(" ", 1)[0]
    return word if word in _OF_A_KEY else None


def read_time(reply: Any) -> float | None:
    """Parse the reply to TIME: unix time in seconds, or None if the user has no right to ask."""
    if isinstance(reply, hiredis.ReplyError):
        return None
    with _shaped():
        seconds, microseconds = _convert(reply, tuple[bytes, bytes])
        return int(seconds) + int(microseconds) / 1e6


def _read_entries(raw: list[_RawEntry]) -> list[Entry]:
    positions = _read_ids([entry_id for entry_id, _ in raw])
    return list(map(Entry, positions, [_read_payload(fields) for _, fields in raw]))


def _read_payload(fields: list[bytes] | None) -> bytes | None:
    if fields and fields[0] == _FIELD and len(fields) == 2:  # nearly always
        return fields[1]
    fields = fields or []
    return dict(zip(fields[::2], fields[1::2], strict=True)).get(_FIELD)


def _read_ids(raw: list[bytes]) -> list[Position]:
    """Parse entry ids, if possible all of them at once: for a quarter of the cost."""
    joined = b",".join(raw)
    if raw and max(map(len, raw)) < _SHORT and joined.count(b",") == len(raw) - 1:
        with suppress(msgspec.DecodeError):
            return _positions(b"[[%b]]" % joined.replace(b",", b"],[").replace(b"-", b","))
    return list(map(_read_id, raw))


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
