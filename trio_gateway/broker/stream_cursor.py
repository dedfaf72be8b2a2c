"""Where one stream is read, and what must be remembered to notice lost or repeated entries."""

import math
from collections import deque
from collections.abc import Sequence
from typing import Final

from ..core.event_ids import START, Position, Stream, entry_id
from ..runtime.source import Entry
from .stream_replies import Info

# How many ids are remembered, so that no entry is delivered twice after the cursor was set back.
RECENT: Final = 10_000


class StreamCursor:
    """The cursor of one stream.

    ``read_count`` is how many entries the stream had ever had when the entry at the cursor was
    its last. Redis counts them for ever, so this shows entries that were trimmed before they were
    read. It is None if it is unknown.
    """

    def __init__(self, name: str, stream: Stream, info: Info, past: Sequence[Entry] = ()) -> None:
        """Begin at the end of a stream as ``info`` gives it, after these entries."""
        self.name = name
        self.stream = stream
        self.position = info.last
        self.read_count = info.added
        self.is_counted = info.added is not None  # False before Redis 7
        self.proven = info.last  # the position at the last check; all before it had been read
        self.first_read: Position | None = None  # the first entry of a stream that was empty
        # The entry at the cursor, if it was read.
        self.tail = past[-1] if past and past[-1].position == info.last else None
        self.checked_at = -math.inf  # when Redis was last asked whether entries were lost
        self.is_checked = True  # nothing was read since
        self._furthest = START  # the furthest position before the cursor was set back
        self._recent = deque((entry.position for entry in past), maxlen=RECENT)
        self._read_before: frozenset[Position] = frozenset()  # what was recent at that time
        self._remembered_since = START  # the oldest of these

    @property
    def entry_id(self) -> str:
        """The position as Redis writes it."""
        return entry_id(self.position)

    def passed(self, entries: Sequence[Entry]) -> None:
        """Move on past these entries, which have been read."""
        if self.position == START:
            self.first_read = entries[0].position
        self.tail = entries[-1]
        self.position = self.tail.position
        self._recent.extend([entry.position for entry in entries])
        if self.read_count is not None:
            self.read_count += len(entries)
        self.is_checked = False

    def may_repeat(self, position: Position) -> bool:
        """Whether entries from here on may have been delivered before."""
        return position <= self._furthest

    def has_read(self, position: Position) -> bool:
        """Whether an entry with this id may have been delivered before the cursor was set back.

        Ids older than all that are remembered count as delivered.
        """
        return position <= self._furthest and (
            position in self._read_before or position < self._remembered_since
        )

    def set_back(self, end: Position) -> None:
        """Read on from here after a gap; this may be before or after the present position."""
        self._furthest = max(self._furthest, self.position)
        if end < self.position:
            self._read_before = frozenset(self._recent)
            self._remembered_since = min(self._recent, default=after(self._furthest))
        if end != self.position:
            self.tail = None
        self.position = self.proven = end


def before(position: Position) -> Position:
    """The position right before this one."""
    milliseconds, sequence = position
    return Position((milliseconds, sequence - 1) if sequence else (milliseconds - 1, 2**64 - 1))


def after(position: Position) -> Position:
    """The position right after this one."""
    milliseconds, sequence = position
    return Position((milliseconds, sequence + 1) if sequence < 2**64 - 1 else (milliseconds + 1, 0))
