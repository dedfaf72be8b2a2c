"""History: recent durable events in memory, by audience, so that replay touches no Redis.

An event that can concern no connection of this process is stored raw: its payload, by branch. It
is routed only when a client asks for what its branch missed (:meth:`History.prepare`).
"""

import heapq
import math
from bisect import bisect_left, bisect_right
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from itertools import islice, takewhile
from typing import Final

import structlog
import trio

from ..core.audiences import Audience
from ..core.event_ids import Cursor, Position, Stream
from ..core.events import Event
from .entry_index import EntryIndex
from .extent import Extent
from .past_routing import BY_DEFAULT, PastRouting
from .raw_events import RawBranch, RawEvents
from .raw_events import StoredEvent as StoredEvent
from .throttled_log import ThrottledLog

log = structlog.get_logger()

_PER_STEP: Final = 100  # raw events that are routed without a checkpoint: about a millisecond


class History:
    """The durable events of the last while, bounded by count, bytes and age (seconds since they
    were heard).

    A replay costs what was missed, not what happened: each audience has a list of its own per
    stream, read from its end. What is known of each stream is its :attr:`extent`.
    """

    def __init__(
        self,
        *,
        events: int = 50_000,
        size: int = 67_108_864,
        age: float = 3600,
        routing: PastRouting = BY_DEFAULT,
    ) -> None:
        self.most_events = events
        self.most_bytes = size
        self.age = age
        self._kept: deque[StoredEvent] = deque()
        self._by_audience: dict[tuple[Stream, Audience], deque[StoredEvent]] = {}
        self.extent = Extent()
        self._raw = RawEvents()
        self._index = EntryIndex()
        self._has_escalations = False  # ever
        self.routing = routing  # of past events
        self._throttled_log = ThrottledLog(log)
        self.bytes = 0
        # Of entries of one millisecond in different streams, see Sharding.ranks.
        self.ranks: Mapping[Stream, int] = {}

    def __len__(self) -> int:
        return len(self._kept)

    def restart(self, stream: Stream, *, since: Position, end: Position) -> None:
        """Forget a stream of which entries were lost, see :meth:`.Extent.restart`."""
        self._drop(stream)
        self.extent.restart(stream, since=since, end=end)

    def forget(self, stream: Stream) -> None:
        """Forget a stream that is not read any more, as if it had never been."""
        self._drop(stream)
        self.extent.forget(stream)

    def _drop(self, stream: Stream) -> None:
        """Drop the events of a stream."""
        self._index.clear()
        self._kept = deque(kept for kept in self._kept if kept.stream != stream)
        self.bytes = sum(len(kept.frame) for kept in self._kept)
        for key in [key for key in self._by_audience if key[0] == stream]:
            del self._by_audience[key]
        self._raw.drop(stream)

    def add(
        self, event: Event, audiences: Collection[Audience], *, now: float, delivered_up_to: int = 0
    ) -> None:
        """Keep a durable event, the newest of its stream. ``now`` is on the runtime's clock."""
        assert event.stream is not None
        assert event.position is not None
        kept = StoredEvent(
            event.stream,
            event.position,
            event.received_at,
            event.frame,
            self.routing.stored_for(event, audiences),
            delivered_up_to,
        )
        self._mark(kept, event)
        self._kept.append(kept)
        self.bytes += len(kept.frame)
        for audience in kept.audiences:
            if (mine := self._by_audience.get((kept.stream, audience))) is None:
                mine = self._by_audience[kept.stream, audience] = deque()
            mine.append(kept)
        self.trim(now)

    def add_raw(self, events: Sequence[tuple[Event, int]], *, now: float) -> None:
        """As :meth:`add`, for events that can concern no connection: they are not routed yet.

        Each comes with its ``delivered_up_to``.
        """
        self._kept += self._raw.add(events)
        self.bytes += sum([len(event.payload) for event, _ in events])
        self.trim(now)

    async def prepare(self, cursor: Cursor, audiences: Collection[Audience]) -> None:
        """Route what is raw for these audiences after this cursor, in short steps.

        :meth:`missed` and :meth:`following` do the same without a checkpoint: call this before
        them where much may be raw.
        """
        while not self.try_prepare(cursor, audiences):
            await trio.lowlevel.checkpoint()

    def try_prepare(self, cursor: Cursor, audiences: Collection[Audience]) -> bool:
        """Take one step of :meth:`prepare`; return whether nothing is left to do."""
        return not self._raw or self._route_raw(cursor, audiences, _PER_STEP)

    def _route_raw(
        self, cursor: Cursor, audiences: Collection[Audience], most: float = math.inf
    ) -> bool:
        for stream, seen in cursor.items():
            for audience in audiences:
                for raw in self._raw.branches_of(stream, audience):
                    most -= self._route_branch(raw, seen, most)
                    if most <= 0:
                        return False
        return True

    def _route_branch(self, raw: RawBranch, seen: Position, most: float) -> int:
        """Route the newest raw events after a position; return how many.

        The others stay raw, so at any time the raw events of a branch are in order, and a client
        whose position is later needs none of them.
        """
        found: list[StoredEvent] = []
        while len(found) < most and (kept := self._raw.take_newest(raw, seen)) is not None:
            self.bytes -= len(kept.frame)
            self._route_one(kept)
            self.bytes += len(kept.frame)
            found.append(kept)
        found.reverse()
        by_audience: defaultdict[Audience, list[StoredEvent]] = defaultdict(list)
        for kept in found:
            for audience in kept.audiences:
                by_audience[audience].append(kept)
        for audience, events in by_audience.items():
            self._insert((raw.stream, audience), events)
        return len(found)

    def _route_one(self, kept: StoredEvent) -> None:
        found = self.routing.route(kept.stream, kept.position, kept.frame, kept.received_at)
        if found is None:  # it was valid when it came
            self._throttled_log.error("event not replayed: nested too deeply")
            kept.audiences = ()
        else:
            event, audiences = found
            kept.frame = event.frame
            kept.audiences = self.routing.stored_for(event, audiences)
            self._mark(kept, event)

    def _mark(self, kept: StoredEvent, event: Event) -> None:
        if event.escalation is not None:
            kept.unless = self.routing.excluded(event)
            self._has_escalations = kept.is_tracked = True
        elif event.type in self.routing.tracked_types:
            kept.is_tracked = True

    def _insert(self, key: tuple[Stream, Audience], events: list[StoredEvent]) -> None:
        """Add events to those of an audience. Both are in order, and may overlap."""
        if not (mine := self._by_audience.get(key)):
            self._by_audience[key] = deque(events)
        elif mine[-1].position < events[0].position:
            mine.extend(events)
        elif events[-1].position < mine[0].position:
            mine.extendleft(reversed(events))
        else:
            self._by_audience[key] = deque(sorted([*mine, *events], key=_position))

    def trim(self, now: float) -> None:
        """Drop the oldest events until the bounds hold."""
        oldest, events, extent = now - self.age, self._kept, self.extent
        while events and (
            len(events) > self.most_events
            or self.bytes > self.most_bytes
            or events[0].received_at < oldest
        ):
            kept = events.popleft()
            self.bytes -= len(kept.frame)
            extent.whole.discard(kept.stream)
            extent.forgotten[kept.stream] = kept.position
            if kept.raw_of is not None:
                self._raw.forget_oldest(kept.raw_of)
                continue
            for audience in kept.audiences:  # the oldest of all is also the oldest of its audiences
                mine = self._by_audience[kept.stream, audience]
                mine.popleft()
                if not mine:
                    del self._by_audience[kept.stream, audience]

    def knows_entry(self, stream: Stream, position: Position) -> bool:
        """Whether this place, which the extent covers, is surely one that an id can name.

        That is an event that is kept, where this process has begun or ended to read or to forget,
        or the end of a millisecond. Entries that are not durable events are not known.
        """
        return self.extent.names(stream, position) or self._index.has(self._kept, stream, position)

    def is_for(self, stream: Stream, position: Position, audiences: Iterable[Audience]) -> bool:
        """Whether a kept event, which is not raw, is at this place and for any of these."""
        for audience in audiences:
            if mine := self._by_audience.get((stream, audience)):
                at = bisect_left(mine, position, key=_position)
                if at < len(mine) and mine[at].position == position:
                    return True
        return False

    def missed(self, cursor: Cursor, audiences: Collection[Audience]) -> list[StoredEvent]:
        """The events for these audiences after this cursor, each once, in order.

        Only of the streams that the cursor names: a tenant's events live in one of them.
        """
        return sorted(self.missed_in_any_order(cursor, audiences), key=self._order)

    def missed_in_any_order(
        self, cursor: Cursor, audiences: Collection[Audience], *, again: bool = False
    ) -> set[StoredEvent]:
        """As :meth:`missed`, for a fraction of its cost.

        ``again``: also what is escalated, and went to these audiences before.
        """
        if self._raw:
            self._route_raw(cursor, audiences)
        found: set[StoredEvent] = set()
        for audience in audiences:
            for stream, seen in cursor.items():
                if mine := self._by_audience.get((stream, audience)):
                    found.update(takewhile(_is_after(seen), reversed(mine)))
        if self._has_escalations and not again:
            found = {kept for kept in found if kept.unless.isdisjoint(audiences)}
        return found

    def following(
        self, cursor: Cursor, audiences: Collection[Audience], most: int, *, again: bool = False
    ) -> list[StoredEvent]:
        """The first ``most`` events of :meth:`missed`, at a cost that grows with ``most`` only.

        ``again`` as there.
        """
        if self._raw:
            self._route_raw(cursor, audiences)
        runs = []
        for audience in audiences:
            for stream, seen in cursor.items():
                if mine := self._by_audience.get((stream, audience)):
                    first = bisect_right(mine, seen, key=_position)
                    if self._has_escalations and not again:
                        rest = islice(mine, first, None)
                        wanted = (kept for kept in rest if kept.unless.isdisjoint(audiences))
                        runs.append(list(islice(wanted, most)))
                        continue
                    last = min(first + most, len(mine))
                    runs.append([mine[n] for n in range(first, last)])
        found: list[StoredEvent] = []
        for kept in heapq.merge(*runs, key=self._order):
            if found and found[-1] is kept:  # for several of the audiences
                continue
            if len(found) == most:
                break
            found.append(kept)
        return found

    def _order(self, kept: StoredEvent) -> tuple[int, int, int, Stream]:
        (milliseconds, sequence), stream = kept.position, kept.stream
        return milliseconds, self.ranks.get(stream, 0), sequence, stream


def _is_after(seen: Position) -> Callable[[StoredEvent], bool]:
    return lambda kept: kept.position > seen


def _position(kept: StoredEvent) -> Position:
    return kept.position
