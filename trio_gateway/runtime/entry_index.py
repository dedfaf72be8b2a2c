"""The positions of the events in the history, to tell an id of one of them from any other.

They are collected when somebody asks, and only what came since is added when somebody asks again:
a process to which nobody returns does nothing for them.
"""

from bisect import bisect_left
from collections import deque
from itertools import takewhile

from ..core.event_ids import Position, Stream
from .raw_events import StoredEvent


class EntryIndex:
    """The positions of the events that were kept, by stream; some that were dropped remain."""

    def __init__(self) -> None:
        self._positions: dict[Stream, list[Position]] = {}  # in order
        self._count = 0
        self._last: StoredEvent | None = None  # of those that were added

    def clear(self) -> None:
        """Forget all, before events other than the oldest are dropped."""
        self._positions.clear()
        self._count, self._last = 0, None

    def has(self, kept: deque[StoredEvent], stream: Stream, position: Position) -> bool:
        """Whether one of these events, to which new ones were appended, is at this position."""
        if self._count > 2 * len(kept):
            self.clear()
        last = self._last
        fresh = list(takewhile(lambda stored: stored is not last, reversed(kept)))
        for stored in reversed(fresh):
            self._positions.setdefault(stored.stream, []).append(stored.position)
            self._last = stored
        self._count += len(fresh)
        known = self._positions.get(stream, [])
        at = bisect_left(known, position)
        return known[at : at + 1] == [position]
