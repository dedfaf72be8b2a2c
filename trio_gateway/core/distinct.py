"""How many different events there are, of sets that may have some in common.

Each event has a number, which is the same in every process and as good as random. Of a set the
:data:`MOST` lowest numbers are kept. Up to so many events are counted exactly; how many more there
are follows from how close to each other the numbers are (Bar-Yossef et al., *Counting distinct
elements in a data stream*, 2002, algorithm 1). To add an event again changes nothing.
"""

from array import array
from bisect import bisect_left
from typing import Final
from zlib import crc32

from .event_ids import Position, Stream

MOST: Final = 128  # the standard error of a larger count is 1 / √126, which is 9 %
_FULL: Final = 4 * MOST  # bytes
_NUMBERS: Final = 1 << 32
_MASK: Final = (1 << 64) - 1


def number_of(stream: Stream, position: Position) -> int:
    """The number of an event, below 2³²."""
    number = (position[0] << 20) + position[1] ^ crc32(stream.encode()) << 32
    number = number * 0x9E3779B97F4A7C15 & _MASK
    return ((number ^ number >> 32) * 0xD6E8FEB86659FD93 & _MASK) >> 32


def include(kept: bytes, number: int) -> bytes:
    """Add an event to a set. Numbers are kept in order, four bytes each."""
    if len(kept) == _FULL and number > memoryview(kept).cast("I")[-1]:  # as mostly
        return kept
    numbers = array("I", kept)
    at = bisect_left(numbers, number)
    if at < len(numbers) and numbers[at] == number:
        return kept
    numbers.insert(at, number)
    return numbers[:MOST].tobytes()


def join(one: bytes, other: bytes) -> bytes:
    """The set of what is in either."""
    if not (one and other):
        return one or other
    numbers = {*array("I", one), *array("I", other)}
    return array("I", sorted(numbers)[:MOST]).tobytes()


def count(kept: bytes) -> int:
    """How many events are in a set, about if they are more than :data:`MOST`."""
    numbers = array("I", kept)
    if len(numbers) < MOST:
        return len(numbers)
    return round((MOST - 1) * _NUMBERS / (numbers[-1] + 1))
