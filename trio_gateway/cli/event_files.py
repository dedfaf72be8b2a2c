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
class Line:
    """One event, byte for byte as in the file, and the channel that its line names."""

    number: int
    event: bytes
    channel: str | None = None

    def now(self) -> "Line":
        """The same event with ``ts`` set to the present; every other byte of a value stays."""
        try:
            found = _decode(self.event)
        except msgspec.DecodeError:
            return self  # publishing it reports the problem
        ts = datetime.now(UTC).isoformat(timespec="microseconds")
        found["ts"] = msgspec.Raw(msgspec.json.encode(ts))
        return Line(self.number, msgspec.json.encode(found), self.channel)


def read_lines(file: IO[bytes]) -> Iterator[Line]:
    """Read the events of a file, one by one. A file that is a single JSON object over several
    lines is one event.
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


def _read(number: int, text: bytes) -> Line:
    text = text.strip()
    try:
        found = _decode(text)
        if "type" not in found and {"channel", "event"} <= found.keys():
            channel = msgspec.json.decode(found["channel"], type=str)
            return Line(number, bytes(found["event"]), channel)
    except msgspec.DecodeError:
        pass  # publishing it reports the problem
    return Line(number, text)


def _is_json(text: bytes) -> bool:
    try:
        msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return False
    return True
