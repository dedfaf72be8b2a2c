"""Positions of events in their streams, and the opaque event ids that name them."""

import re
import zlib
from collections.abc import Mapping
from typing import Final, NewType

from .decimals import is_decimal

Stream = NewType("Stream", str)  # a stream's tag, the same in every process
Position = NewType("Position", tuple[int, int])  # an entry's milliseconds and sequence number
Cursor = Mapping[Stream, Position]

DEFAULT_STREAM: Final = "events:critical"  # the Redis stream that durable events are added to
START: Final = Position((0, 0))
_MAX: Final = 2**64 - 1
LAST: Final = Position((_MAX, _MAX))
_NOWHERE: Final = "0-0-none"  # a valid id that no history covers
_TAG: Final = re.compile("[0-9a-f]{4}")


def tag(name: str) -> Stream:
    """A stream's tag. It is short because it goes with every event."""
    return Stream(f"{zlib.crc32(name.encode()) & 0xFFFF:04x}")


def read_position(entry_id: str) -> Position:
    """The position in an entry id of Redis. Raises :exc:`ValueError` if it is not one."""
    milliseconds, dash, sequence = entry_id.partition("-")
    if not dash or not (_is_number(milliseconds) and _is_number(sequence)):
        raise ValueError("not an entry id")
    return Position((int(milliseconds), int(sequence)))


def entry_id(position: Position) -> str:
    """A position as Redis writes it: the inverse of :func:`read_position`."""
    return f"{position[0]}-{position[1]}"


def before(position: Position) -> Position:
    """The position right before this one, which is not :data:`START`."""
    milliseconds, sequence = position
    return Position((milliseconds, sequence - 1) if sequence else (milliseconds - 1, _MAX))


def event_id(stream: Stream, position: Position) -> str:
    """The id that a client gets with an event, and sends to resume after it."""
    return f"{position[0]}-{position[1]}-{stream}"


def cursor_id(cursor: Cursor) -> str:
    """An id for a cursor in several streams, for a client that has received no event yet."""
    return ".".join(event_id(s, position) for s, position in sorted(cursor.items())) or _NOWHERE


def read_cursor(text: str) -> Cursor:
    """The cursor that an id names. Raises :exc:`ValueError` if it is not an event id."""
    if text == _NOWHERE:
        return {Stream("none"): START}
    found: dict[Stream, Position] = {}
    for part in text.split("."):
        entry_id, dash, stream = part.rpartition("-")
        if not dash or not _TAG.fullmatch(stream):
            raise ValueError("not an event id")
        found[Stream(stream)] = read_position(entry_id)
    return found


def read_event_id(text: str) -> tuple[Stream, Position]:
    """The place of one event. Raises :exc:`ValueError` if it is not the id of exactly one."""
    (place,) = read_cursor(text).items()
    if text == _NOWHERE:
        raise ValueError("no event has this id")
    return place


def _is_number(text: str) -> bool:
    return is_decimal(text, 20) and int(text) <= _MAX
