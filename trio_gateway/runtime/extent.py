"""Extent: which part of each stream is known, and so whether all after a place is known.

A stream is known from where it was first read, or from its own start, up to where it has been read.
The history drops its oldest events; a client whose position is before one of those cannot be told
what it missed.
"""

import math
from collections.abc import Collection, Iterable, Set

import trio

from ..core.event_ids import LAST, START, Cursor, Position, Stream


class Extent:
    """From where and up to where the events of each stream are known."""

    def __init__(self) -> None:
        self.whole: set[Stream] = set()  # of which every entry there ever was is known
        self._since: dict[Stream, Position] = {}  # from where each is known
        self.forgotten: dict[Stream, Position] = {}  # the last event that was dropped
        self._gaps: dict[Stream, Position] = {}  # where the last gap ended
        self._grown = trio.lowlevel.ParkingLot()
        self.began: dict[Stream, Position] = {}  # where each was first read live
        self.expected: set[Stream] = set()  # that are to be read
        self._end: dict[Stream, Position] = {}
        self._shared_end: Cursor | None = None  # a copy of it

    @property
    def end(self) -> Cursor:
        """The present place. It is never changed, so it can be shared: later ones replace it."""
        if self._shared_end is None:
            self._shared_end = self._end.copy()
        return self._shared_end

    def _set_end(self, stream: Stream, position: Position) -> None:
        self._end[stream] = position
        self._shared_end = None

    def begin(self, stream: Stream, since: Position, *, whole: bool = False) -> None:
        """Start tracking a stream at ``since``. ``whole``: it never had an earlier entry.

        The events that it still holds are added to the history then, and :meth:`advance` follows
        with the position from which it is read.
        """
        self._since[stream] = since
        if whole:
            self.whole.add(stream)

    def was_begun(self, stream: Stream) -> bool:
        """Whether :meth:`begin` was called for this stream."""
        return stream in self._since

    def restart(self, stream: Stream, *, since: Position, end: Position) -> None:
        """Note that entries of a stream were lost, and what was known of it is forgotten.

        A client whose position is before ``since`` cannot be told what followed. The stream is
        read on from ``end``, which is before ``since`` if it was created anew.
        """
        since = max(since, self._since.get(stream, START))
        self.whole.discard(stream)
        self.forgotten.pop(stream, None)
        self._since[stream] = self._gaps[stream] = since
        self._set_end(stream, end)

    def forget(self, stream: Stream) -> None:
        """Forget a stream that is not read any more, as if it had never been."""
        self.whole.discard(stream)
        for places in (self._since, self._end, self.began, self.forgotten):
            places.pop(stream, None)
        self._shared_end = None

    def advance(self, stream: Stream, position: Position) -> None:
        """Note that the stream has been read up to this position."""
        self.began.setdefault(stream, position)
        if self._since.get(stream) == START:  # an id before the first entry is not of this stream
            self._since[stream] = position
        self._set_end(stream, position)
        self._grown.unpark_all()

    def position_at(self, stream: Stream, moment: float) -> Position | None:
        """A position before every entry that Redis added from this unix time on.

        None if not all of those are known.
        """
        place = _end_before(moment)
        if place < self._since[stream]:
            if stream not in self.whole:
                return None
            place = START
        return None if self.forgot({stream: place}) else place

    def reached(self, stream: Stream, position: Position) -> Position:
        """This position, or the end of the stream if that is not as far.

        It is the start of the stream if all that ever was in it is behind the position.
        """
        if position < self._since[stream] and stream in self.whole:
            return START
        return min(position, self._end[stream])

    def covers(self, cursor: Cursor) -> bool:
        """Whether everything after this cursor is still known, as far as it has been read."""
        return (
            bool(cursor)
            and not self.forgot(cursor)
            and all(
                stream in self.end  # while it is being read for the first time, some is known
                and (
                    position >= self._since[stream] or (position == START and stream in self.whole)
                )
                for stream, position in cursor.items()
            )
        )

    def names(self, stream: Stream, position: Position) -> bool:
        """Whether an id can name this place of a stream, for another reason than an event there.

        That is where this process has begun or ended to read or to forget, or the end of a
        millisecond.
        """
        return (
            position in (START, self._since[stream], self._end[stream])
            or position in (self.began.get(stream), self.forgotten.get(stream))
            or position[1] == LAST[1]
        )

    def forgot(self, cursor: Cursor) -> bool:
        """Whether an event after this cursor has been dropped."""
        forgotten = self.forgotten
        return any(s in forgotten and forgotten[s] > position for s, position in cursor.items())

    def known_since(self, stream: Stream) -> Position | None:
        """The position after which every event of this stream is known; None before it is read."""
        if stream not in self.end:
            return None
        return max(self._since[stream], self.forgotten.get(stream, START))

    def may_read_back(self, stream: Stream, position: Position) -> bool:
        """Whether the stream itself can tell what came after this position, if it holds it.

        It cannot if entries after it were lost unread.
        """
        return stream in self.end and position >= self._gaps.get(stream, START)

    def past_forgotten(self, cursor: Cursor) -> Cursor:
        """This cursor, moved past the events after it that have been dropped."""
        forgotten = self.forgotten
        return {s: max(position, forgotten.get(s, position)) for s, position in cursor.items()}

    def is_ahead(self, cursor: Cursor) -> bool:
        """Whether this cursor is beyond what has been read.

        Another process was faster, or the stream has not been read yet.
        """
        end = self.end
        return any(
            end[s] < position if s in end else s in self.expected for s, position in cursor.items()
        )

    def known_streams(self) -> Set[Stream]:
        """The streams that are read, or are to be read."""
        return self._end.keys() | self.expected

    @property
    def warm(self) -> bool:
        """Whether each stream has been read up to its present end."""
        return self.expected <= self.end.keys()

    def are_begun(self, streams: Iterable[Stream]) -> bool:
        """Whether these streams have been read up to their present ends."""
        return all(stream in self._end for stream in streams)

    async def wait_begun(self, streams: Collection[Stream] | None = None) -> None:
        """Wait until these streams have been read up to their present ends; one, if None."""
        while not (self._end if streams is None else self.are_begun(streams)):
            await self._grown.park()

    async def wait_for(self, cursor: Cursor) -> None:
        """Wait until this cursor has been read."""
        while self.is_ahead(cursor):
            await self._grown.park()

    def place_before(
        self, moment: float, streams: Collection[Stream] | None = None
    ) -> tuple[Cursor, bool]:
        """The cursor before every entry that Redis added from this unix time on, and whether all
        of those are known. It is in these streams, if they are given, and not beyond their ends.
        """
        place = _end_before(moment)
        cursor = dict.fromkeys(self._end if streams is None else streams, place)
        complete = not self.forgot(cursor) and all(
            stream in self.whole or self._since[stream] <= place for stream in cursor
        )
        ends = self._end
        return {s: min(place, ends.get(s, place)) for s in cursor}, bool(cursor) and complete


def _end_before(moment: float) -> Position:
    """The end of the millisecond before this unix time: a place that an id can name."""
    milliseconds = min(max(0, math.floor(moment * 1000)), LAST[0])
    return Position((milliseconds - 1, LAST[1])) if milliseconds else START
