"""Older events: what the history no longer holds, read back from the stream for those who resume.

A scan reads a stream backwards from where the history begins, and stops at the entry that a client
names. What it finds is kept for a while as a second history, the *range* of that stream. So one
scan serves all clients that come with ids in this range, and each of them reads it chunk by chunk.

- The entry that a client names must be there: then the id is of this stream, and nothing after it
  was trimmed, for a stream is trimmed from its oldest entry on. A place that names no entry, such
  as the end of a millisecond, must be behind one that is there. The start of a stream is known if
  nothing was ever trimmed. Nobody reads across a gap that this process has noticed.
- A range ends some entries behind the begin of the history, because the history moves on. A range
  that the history has moved past is extended.
- A range is dropped when it was not used for a while, or when the ranges hold too many bytes. A
  client that still reads it is closed then, as one that the history has moved past.
"""

import sys
from collections.abc import Collection, Sequence
from typing import Final, Protocol

import trio

from ..core.audiences import Audience
from ..core.duplicates import Duplicates
from ..core.event_ids import LAST, START, Cursor, Position, Stream, before
from ..core.events import Event
from .history import History, StoredEvent
from .past_routing import BY_DEFAULT, PastRouting

DEADLINE: Final = 5.0  # seconds that a client waits for a scan
# A small history must not keep a scan from reading as many entries as it may.
LEAST_BYTES: Final = 67_108_864
_PAGE: Final = 250  # entries in one reply: 16 MB at most
_OVERLAP: Final = 1000  # entries of the history that a range holds, too
_PER_CHECKPOINT: Final = 100  # entries that are parsed at a time
_UNUSED: Final = 30.0  # seconds until a range is dropped
_AT_A_TIME: Final = 2  # scans
_LOOKED_UP: Final = 1000  # places of which it is remembered whether they name an entry

ReadEntry = tuple[Position, bytes | None]  # the payload is None if the entry has no field ``data``


class ReadFailed(Exception):  # noqa: N818 - an outcome
    """The stream could not be read now."""


class StreamReader(Protocol):
    """Reads parts of a stream. Its methods raise :exc:`ReadFailed` in bounded time."""

    async def read_back(self, stream: Stream, end: Position, most: int) -> Sequence[ReadEntry]:
        """The last entries up to this position, the newest first."""

    async def read_on(self, stream: Stream, after: Position, most: int) -> Sequence[ReadEntry]:
        """The first entries after this position, the oldest first."""

    async def is_whole(self, stream: Stream) -> bool:
        """Whether the stream still holds every entry that was ever added to it."""


class _Range:
    """All that a stream holds after ``since`` and up to ``end``."""

    def __init__(self, stream: Stream, since: Position, now: float, routing: PastRouting) -> None:
        self.stream = stream
        self.since = self.end = since
        self.positions = {since}  # of all entries, events or not
        self.is_deepest = False  # no scan can go further back
        self.used_at = now
        self.events = History(
            events=sys.maxsize, size=sys.maxsize, age=sys.float_info.max, routing=routing
        )
        self._duplicates = Duplicates()

    @property
    def bytes(self) -> int:
        return self.events.bytes

    def add(self, position: Position, found: tuple[Event, Collection[Audience]] | None) -> None:
        """Add the next entry, with its event if it is a durable one."""
        self.positions.add(position)
        self.end = position
        if found is not None and not self._duplicates.is_duplicate(found[0]):
            self.events.add(*found, now=0)


class OlderEvents:
    """The ranges of the streams.

    ``most_entries`` is how far back a scan goes, counted from the begin of the history. With 0, or
    without a reader, nothing is scanned. ``most_bytes`` bounds the payloads of one scan, and twice
    that all ranges together.
    """

    def __init__(
        self,
        history: History,
        reader: StreamReader | None = None,
        *,
        routing: PastRouting = BY_DEFAULT,
        most_entries: int = 0,
        most_bytes: int = 0,
    ) -> None:
        self._history = history
        self._extent = history.extent
        self._stream_reader = reader
        self._routing = routing
        self._most_entries = most_entries
        self._most_bytes = most_bytes
        self._ranges: dict[Stream, _Range] = {}
        self._wanted: dict[Stream, list[Position]] = {}  # of the clients that wait for a scan
        self._locks: dict[Stream, trio.Lock] = {}  # one scan of a stream at a time
        self._limit = trio.CapacityLimiter(_AT_A_TIME)
        self._looking_up = trio.Lock()  # so that all who ask for the same place share one answer
        self._is_entry: dict[tuple[Stream, Position], bool] = {}  # of places that were looked up
        self.scans = 0

    async def find(self, cursor: Cursor) -> bool:
        """Make everything after this cursor known, here or in the history, if the streams hold it.

        True only if :meth:`covers` is true when this returns. Raises nothing, and waits at most
        :data:`DEADLINE` seconds.
        """
        try:
            with trio.move_on_after(DEADLINE):
                missing = self._missing(cursor)
                if self._history.ranks and len(missing) > 1:  # which would be read one by one
                    return False
                for stream in missing:
                    if not await self._reach(stream, cursor[stream]):
                        return False
        except ReadFailed:
            return False
        return self.covers(cursor)

    async def name_entries(self, cursor: Cursor) -> bool:
        """Whether the places of a cursor that is covered name entries that there are, or were.

        A new primary may lack entries that another process, or this one before a restart, has
        delivered. Nobody can tell what else it lacks, so who names one of those is not told that
        nothing is missing. Redis is asked about places that the history does not know. False, too,
        if it does not answer; raises nothing, and waits at most :data:`DEADLINE` seconds.
        """
        asked = [
            (stream, position)
            for stream, position in cursor.items()
            if self._extent.covers({stream: position})
            and not self._history.knows_entry(stream, position)
        ]
        try:
            with trio.move_on_after(DEADLINE):
                for place in asked:
                    if not await self._look_up(place):
                        return False
                return True
        except ReadFailed:
            pass
        return False

    async def _look_up(self, place: tuple[Stream, Position]) -> bool:
        if self._stream_reader is None:
            return True
        async with self._looking_up:
            if place not in self._is_entry:
                page = await self._stream_reader.read_back(*place, 1)
                if len(self._is_entry) >= _LOOKED_UP:
                    self._is_entry.clear()
                self._is_entry[place] = [position for position, _ in page] == [place[1]]
            return self._is_entry[place]

    def covers(self, cursor: Cursor) -> bool:
        """Whether everything after this cursor is known, here or in the history."""
        return bool(cursor) and all(
            self._extent.covers({stream: position}) or self._holds(stream, position)
            for stream, position in cursor.items()
        )

    def behind(self, cursor: Cursor) -> Cursor:
        """The part of a cursor from which on the history alone is not enough."""
        return {stream: cursor[stream] for stream in self._missing(cursor)}

    def missed(self, cursor: Cursor, audiences: Collection[Audience]) -> list[StoredEvent]:
        """The events after a cursor that :meth:`behind` has returned, up to :meth:`ends`, in any
        order.
        """
        return [
            stored
            for stream, position in cursor.items()
            if (held := self._use(stream, position)) is not None
            for stored in held.events.missed_in_any_order({stream: position}, audiences)
        ]

    def following(
        self, cursor: Cursor, audiences: Collection[Audience], most: int
    ) -> list[StoredEvent]:
        """The first ``most`` events of one stream of those that :meth:`missed` returns."""
        for stream, position in cursor.items():
            if (held := self._use(stream, position)) is None:
                continue
            if found := held.events.following({stream: position}, audiences, most):
                return found
        return []

    def ends(self, cursor: Cursor) -> Cursor:
        """Where the ranges of these streams end, and the history goes on.

        A range that a slow client reads may be dropped when the history covers the rest: it goes
        on from where that client is.
        """
        return {
            stream: position if (held := self._use(stream, position)) is None else held.end
            for stream, position in cursor.items()
        }

    def forget(self, stream: Stream) -> None:
        """Drop the range of a stream that is not read any more: it may be another one later."""
        self._ranges.pop(stream, None)
        self._is_entry.clear()

    def trim(self, now: float) -> None:
        """Drop the ranges that were not used for a while."""
        for stream, each in list(self._ranges.items()):
            if now - each.used_at > _UNUSED:
                del self._ranges[stream]

    def _missing(self, cursor: Cursor) -> list[Stream]:
        return [s for s, position in cursor.items() if not self._extent.covers({s: position})]

    def _use(self, stream: Stream, position: Position) -> _Range | None:
        if not self._holds(stream, position):
            return None
        found = self._ranges[stream]
        found.used_at = trio.current_time()
        return found

    def _holds(self, stream: Stream, position: Position) -> bool:
        """Whether the range of this stream holds all from this entry on to the history."""
        found = self._ranges.get(stream)
        return (
            found is not None
            and found.since <= position <= found.end
            and (position in found.positions or position[1] == LAST[1])
            and self._is_joined(found)
            and self._extent.may_read_back(stream, position)  # a gap may have come meanwhile
        )

    def _is_joined(self, found: _Range) -> bool:
        """Whether nothing is missing between a range and the history."""
        known_since = self._extent.known_since(found.stream)
        return known_since is not None and found.end >= known_since

    async def _reach(self, stream: Stream, position: Position) -> bool:
        """Whether a scan could reach back to this entry."""
        if self._stream_reader is None or not self._most_entries:
            return False
        if not self._extent.may_read_back(stream, position):
            return False
        wanted = self._wanted.setdefault(stream, [])
        wanted.append(position)
        try:
            async with self._locks.setdefault(stream, trio.Lock()):
                found = self._ranges.get(stream)
                if found is not None and not self._is_joined(found):
                    async with self._limit:
                        await self._extend(found)
                    found = self._ranges.get(stream)
                if self._holds(stream, position):
                    return True
                if found is not None and (found.is_deepest or position >= found.since):
                    return False
                async with self._limit:
                    await self._scan(stream, min(wanted), found)
                return self._holds(stream, position)
        finally:
            wanted.remove(position)
            if not wanted:
                del self._wanted[stream]
                self._locks.pop(stream, None)

    @property
    def _reader(self) -> StreamReader:
        assert self._stream_reader is not None
        return self._stream_reader

    async def _scan(self, stream: Stream, oldest: Position, former: _Range | None) -> None:
        """Read back from where the history begins to ``oldest``, or as far as is allowed.

        If there is a former range, read at least twice as far: few scans then reach the bound.
        """
        self.scans += 1
        least = 0 if former is None else min(2 * len(former.positions), self._most_entries)
        begin = end = self._extent.known_since(stream)
        assert end is not None
        assert begin is not None
        found: list[ReadEntry] = []  # the newest first
        size, is_deepest, is_begin = 0, False, False
        while not is_deepest and (not found or found[-1][0] > oldest or len(found) < least):
            asked = min(_PAGE, self._most_entries + 1 - len(found))  # the client's own, too
            page = await self._reader.read_back(stream, end, asked)
            is_deepest = len(page) < asked or len(found) + asked > self._most_entries
            for n, (position, payload) in enumerate(page):
                size += len(payload or b"")
                is_enough = position <= oldest and len(found) >= least
                if size > self._most_bytes or is_enough:
                    is_deepest = not is_enough
                    page = page[: n + is_enough]
                    break
            else:
                is_begin = len(page) < asked
            found += page
            if not page:
                break
            end = before(page[-1][0])
            if page[-1][0] <= oldest and len(found) >= least:
                break
        if not found:
            return
        if is_begin and await self._reader.is_whole(stream):
            found.append((START, None))
        fresh = _Range(stream, found[-1][0], trio.current_time(), self._routing)
        fresh.is_deepest = is_deepest
        await self._fill(fresh, found[-2::-1])
        fresh.end = max(fresh.end, begin)
        await self._extend(fresh)

    async def _extend(self, found: _Range) -> None:
        """Read on from a range's end into the history, and put the range in its place."""
        most, ahead = 2 * self._most_entries + _OVERLAP, 0
        while (
            ahead < _OVERLAP and len(found.positions) < most and found.bytes <= 2 * self._most_bytes
        ):
            was_joined = self._is_joined(found)
            end = self._extent.end.get(found.stream, found.end)
            page = await self._reader.read_on(found.stream, found.end, _PAGE)
            read = [entry for entry in page if entry[0] <= end]
            await self._fill(found, read)
            ahead += len(read) if was_joined else 0
            if not read:
                break
        if self._is_joined(found):
            self._put(found)
        else:
            self._ranges.pop(found.stream, None)

    async def _fill(self, found: _Range, entries: Sequence[ReadEntry]) -> None:
        """Add the entries that follow a range, as far as it may grow."""
        for n, (position, payload) in enumerate(entries):
            routed = None
            if payload is not None:  # invalid ones were counted by the process that read them live
                heard_at = position[0] / 1000  # when Redis added it
                routed = self._routing.route(found.stream, position, payload, heard_at)
            if found.bytes > 2 * self._most_bytes:
                return
            found.add(position, routed)
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()

    def _put(self, found: _Range) -> None:
        """Keep a range; those that were not used for longest give way to it."""
        found.used_at = trio.current_time()
        self._ranges[found.stream] = found
        size = sum(each.bytes for each in self._ranges.values())
        for each in sorted(self._ranges.values(), key=lambda each: each.used_at):
            if size <= 2 * self._most_bytes or each is found:
                continue
            size -= each.bytes
            del self._ranges[each.stream]
