"""Files of events: one event on each line, plain or as ``{"channel": …, "event": …}``."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import chain
from typing import IO, Final

import msgspec

_Object = dict[str, msgspec.Raw]
_decode: Final = msgspec.json.Decoder(_Object).decode


@dataclass(frozen=True, slots=True)
class FileEvent:
    """One event of a file; ``number`` is its line, ``channel`` is given in the file or None."""

    number: int
    payload: bytes  # unchanged
    channel: str | None = None

    def now(self) -> "FileEvent":
        """The same event with ``ts`` set to the present; the bytes of other values stay."""
        try:
            found = _decode(self.payload)
        except (msgspec.DecodeError, RecursionError):
            return self  # publishing it reports the problem
        ts = datetime.now(UTC).isoformat(timespec="microseconds")
        found["ts"] = msgspec.Raw(msgspec.json.encode(ts))
        return FileEvent(self.number, msgspec.json.encode(found), self.channel)


def read_events(file: IO[bytes]) -> Iterator[FileEvent]:
    """Read the events of a file, one by one.

    A file that is one JSON object on several lines is one event.
    """
    first = file.readline()
    whole = None if _is_json(first) else first + file.read()
    if whole is not None and _is_json(whole):
        yield _read(1, whole)
        return
    rest: Iterable[bytes] = file if whole is None else whole.splitlines()[1:]
    for number, text in enumerate(chain([first], rest), 1):
        if text.strip():
            yield _read(number, text)


def _read(number: int, text: bytes) -> FileEvent:
    text = text.strip()
    try:
        found = _decode(text)
        if "type" not in found and {"channel", "event"} <= found.keys():
            channel = msgspec.json.decode(found["channel"], type=str)
            return FileEvent(number, bytes(found["event"]), channel)
    except (msgspec.DecodeError, RecursionError):
        pass  # publishing it reports the problem
    return FileEvent(number, text)


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    return True
