"""The inlet of the streams: what is read enters queue, history and replays in the right order.

What resume promises rests on this order. For each stream, the history's end is the position up to
which connections that are not held have been sent everything. So:

- The past of a stream enters the history before its end is known. Until then no cursor in this
  stream is covered, and a client that asks to resume waits.
- A connection that joined before that has missed what entered the stream meanwhile. It is told in
  the same step in which the end becomes known, before any event can be delivered live.
- A live event moves the end only when dispatch plans its delivery, in one step with the choice of
  the connections that get it live. An entry that is not an event has no delivery, so the end moves
  past it here, once all events before it are delivered.
- A gap is told once all events that were read before it are delivered. Then, in one step, the
  history forgets the streams and every client is told once to refetch: no client can resume across
  the gap, and none gets the notice before an event that precedes the gap.
- A stream is forgotten once all events that were read from it are delivered: none of them can enter
  the history again behind its end.
"""

import re
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final

import structlog
import trio

from ..core.duplicates import ID_WINDOW, Duplicates
from ..core.escalation import ESCALATED
from ..core.event_ids import Position, Stream
from ..core.events import Event, InvalidEvent, parse_event
from ..core.routing import Routing
from .dispatch import Dispatch
from .history import History
from .ingest import Ingest
from .places import Places
from .queue import EventQueue
from .reach import Reach
from .resume import Replays
from .source import Entry, Lost, Past, PastLimits
from .throttled_log import ThrottledLog
from .tracked_events import TrackedEvents

log = structlog.get_logger()

_PER_CHECKPOINT: Final = 100  # entries of the past that are parsed at a time


class StreamInlet:
    """Takes what is read from the streams, and is the only one that does.

    It alone fills the stream queue, and it alone begins and restarts a stream in the history.
    """

    def __init__(
        self,
        *,
        ingest: Ingest,
        queue: EventQueue,
        history: History,
        dispatch: Dispatch,
        replays: Replays,
        routes: Routing,
        places: Places | None = None,
        tracked_events: TrackedEvents | None = None,
        reach: Reach | None = None,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._ingest = ingest
        self._queue = queue
        self._history = history
        self._extent = history.extent
        self._dispatch = dispatch
        self._replays = replays
        self._durable_types = routes.durable_types
        self._wall_clock = wall_clock
        self._tracked_types = routes.tracked_types
        self._noted_by = [each.note for each in (tracked_events, reach) if each is not None]
        # A process that starts in the midst of an event's steps watches it, too.
        self._longest = 0.0 if reach is None else reach.longest
        self._reach = reach
        names = (re.escape(each) for each in sorted(routes.tracked_types | {ESCALATED}))
        self._names_tracked = re.compile(f'"(?:{"|".join(names)})"'.encode()).search
        self._places = places or Places(history.extent)
        self._by_tenant = self._places.by_tenant
        self.misplaced = 0  # events in the shard of another tenant
        self._throttled_log = ThrottledLog(log)
        self._forgotten: set[Stream] = set()  # ever

    def past_limits(self) -> PastLimits:
        """How much of a stream's past is worth reading."""
        history = self._history
        since = (self._wall_clock() - max(history.age, self._longest)) * 1000
        share = max(1, len(self._extent.expected))
        return PastLimits(
            max(history.most_events // share, history.most_events - len(history)),
            max(history.most_bytes // share, history.most_bytes - history.bytes),
            since,
        )

    def look_ahead_limits(self) -> PastLimits | None:
        """How much to look ahead at, if any event must reach somebody."""
        if self._reach is None:
            return None
        # As far back as the first one of the copies of an event that is watched.
        return self.past_limits()._replace(
            since=(self._wall_clock() - self._longest - ID_WINDOW) * 1000
        )

    async def look_ahead(self, stream: Stream, name: str, entries: Sequence[Entry]) -> None:
        """Watch at once those whose deadlines are near.

        The process that watched them may have been killed, and to begin all its streams can take a
        second.
        """
        assert self._reach is not None
        seen = Duplicates()
        for n, entry in enumerate(entries):
            if entry.payload is not None and self._names_tracked(entry.payload) is not None:
                event = self._parse(name, stream, entry)
                if event is not None and not seen.find_or_add(event):
                    self._reach.note_near(event)
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()

    async def begin(self, stream: Stream, name: str, past: Past, ahead: float | None) -> None:
        """Begin a stream, with its past.

        ``ahead`` is a lower bound of (Redis' unix time - Trio's time) in seconds, or None if it
        is unknown. If this is cancelled, call it again.
        """
        if self._extent.was_begun(stream):  # by a call that was cancelled
            self._history.forget(stream)
            self._forgotten.add(stream)
        if ahead is None:  # the clocks of machines differ less than anything that is late
            self.set_clock([stream], self._wall_clock() - trio.current_time())
        else:
            self.set_clock([stream], ahead)
        self._extent.begin(stream, past.since, whole=past.is_whole)
        read_again = Duplicates() if stream in self._forgotten else None
        for n, entry in enumerate(past.entries):
            self._remember(stream, name, entry, read_again)
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
        self._extent.advance(stream, past.end)
        if past.entries or not past.is_whole:
            self._replays.begin(stream, ahead)
        self._replays.begun(stream)

    def _remember(
        self, stream: Stream, name: str, entry: Entry, read_again: Duplicates | None
    ) -> None:
        event = self._parse(name, stream, entry)
        if event is not None and self._dispatch.remember(event, read_again):
            self._note_tracked((event,))

    def _parse(self, name: str, stream: Stream, entry: Entry) -> Event | None:
        """The event in an entry of the past; None if there is none."""
        if entry.payload is None:
            return None
        # Clocks differ: an entry may be from the future.
        ago = max(0.0, self._wall_clock() - entry.position[0] / 1000)
        try:
            return parse_event(
                entry.payload,
                channel=name,
                received_at=trio.current_time() - ago,
                stream=stream,
                position=entry.position,
                durable_types=self._durable_types,
            )
        except InvalidEvent:
            return None  # the process that read it live has counted it

    async def take(
        self,
        stream: Stream,
        name: str,
        entries: Sequence[Entry],
        passed: Callable[[Sequence[Entry]], None],
    ) -> None:
        """Take entries that have just been read, waiting for room in the queue.

        ``passed`` is called for each part of them in the step in which it is taken: one that was
        not passed when this is cancelled is to be read again.
        """
        part: Sequence[Entry] = ()
        last: Position | None = None  # of the last event
        while entries:
            room = await self._queue.wait_for_room()
            part, entries = entries[:room], entries[room:]
            events = self._ingest.parse_entries(
                part, channel=name, stream=stream, durable_types=self._durable_types
            )
            self._note_tracked(events)
            if self._by_tenant:
                for event in events:
                    if not self._places.concern(stream, event.tenant):
                        self._note_misplaced(name, event)
            self._queue.extend(events)
            passed(part)
            last = events[-1].position if events else None
        if part and last != part[-1].position:  # no delivery moves the history's end past it
            await self.advance(stream, part[-1].position)

    def _note_tracked(self, events: Sequence[Event]) -> None:
        """Pass on the few events that are tracked, or escalated."""
        if self._noted_by:
            types = self._tracked_types
            found = [each for each in events if each.type in types or each.escalation is not None]
            if found:
                for note in self._noted_by:
                    note(found)

    def _note_misplaced(self, name: str, event: Event) -> None:
        """Such an event reaches only clients of processes that happen to read this shard."""
        self.misplaced += 1
        self._throttled_log.error(
            "event in the shard of another tenant: do its publisher and this gateway have the same"
            " REDIS_STREAM_SHARDS?",
            kind="misplaced",
            stream=name,
            tenant=event.tenant,
        )

    async def advance(self, stream: Stream, position: Position) -> None:
        """Move the history's end to an entry that was read and was not delivered."""
        await self._queue.wait_idle()
        self._extent.advance(stream, position)

    def set_clock(self, streams: Iterable[Stream], ahead: float) -> None:
        """Note what Redis' clock shows, for the delivery times."""
        self._dispatch.times.set_clock(streams, ahead)

    async def settle(self) -> None:
        """Wait until all entries that were taken are delivered."""
        await self._queue.wait_idle()

    def forget(self, stream: Stream) -> None:
        """Give up a stream and its history, in the step in which :meth:`settle` has returned."""
        self._history.forget(stream)
        self._replays.forget(stream)
        self._forgotten.add(stream)

    async def gap(self, lost: Sequence[Lost]) -> None:
        """Say what was lost unread, and return in the same step.

        A client that has seen less of a stream than ``since`` cannot resume.
        """
        await self._queue.wait_idle()
        for stream, since, end in lost:
            self._history.restart(stream, since=since, end=end)
        self._replays.tell_of_gap(*(each.stream for each in lost))
