"""Dispatch: deliver events from the queues, with one write per connection and batch."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple, NoReturn

import structlog
import trio

from ..core.audiences import Audience, floor, waiters
from ..core.delivery_times import DeliveryTimes
from ..core.duplicates import Duplicates
from ..core.event_ids import Position, Stream
from ..core.events import Event
from ..core.histogram import Histogram
from ..core.messages import GAP
from ..core.receipts import Place
from ..core.routing import ROUTES, Routing
from .connection import Connection
from .history import History
from .hub import Hub
from .members import Members, union
from .past_routing import PastRouting
from .pauses import Pauses
from .planning import Planned, Write, join, plan_writes
from .queue import EventQueue
from .receipts import ReceiptLog
from .throttled_log import ThrottledLog
from .tracked import Sent

log = structlog.get_logger()

LOOK_BACK: Final = 1.0  # seconds

# The audiences of an event, and the members of those that have any.
_Route = tuple[list[Audience], list[Members]]


class _Plan(NamedTuple):
    """What is done about a batch: its events that were not duplicates, and what is written."""

    fresh: list[Event]
    planned: Sequence[Planned]
    writes: list[Write]


_BATCHES_OF_A_BACKLOG: Final = 4
_FEW: Final = 8  # events that are delivered without a turn in the queue
_TO_NOBODY: Final[_Route] = ([], [])  # never changed


class Dispatch:
    """Delivers batches of events to connections, stores the durable ones, and counts."""

    def __init__(
        self,
        hub: Hub,
        routes: Routing = ROUTES,
        *,
        history: History | None = None,
        uncovered_to_branch: bool = False,
        writes_per_checkpoint: int = 50,
        timeout: float = math.inf,
    ) -> None:
        self._hub = hub
        self._routes = routes
        self._types = frozenset(routes)
        self._history = (
            history
            if history is not None
            else History(routing=PastRouting(routes, uncovered_to_branch=uncovered_to_branch))
        )
        self._extent = self._history.extent
        self._uncovered_to_branch = uncovered_to_branch
        self._writes_per_checkpoint = writes_per_checkpoint
        self._timeout = timeout
        self._duplicates = Duplicates()
        # One batch at a time, from whichever queue: an event on Pub/Sub has reached every client
        # before the events that follow its copy in the stream do.
        self._turn = trio.Lock()
        self._queues: list[EventQueue] = []  # that it takes from
        self._looked_back_at = -math.inf
        self._throttled_log = ThrottledLog(log)
        self.processed = self.broadcasts = self.failed = self.deliveries = 0
        self.duplicate = self.unheard = self.unknown_type = 0
        self.duration = Histogram()  # of one batch
        self.latency = Histogram()  # of each event, from hearing it to its last write
        self.times = DeliveryTimes()
        self.receipts: ReceiptLog | None = None  # if the routing has tracked types
        self.on_copy: Callable[[Event], None] = lambda copy: None  # of a durable event
        self.observe: Callable[[Sequence[Event], float], None] | None = None  # what was delivered

    async def run(self, queue: EventQueue, batch_size: int) -> NoReturn:
        """Deliver the events of a queue; return only when cancelled.

        When more waits than one batch holds, several batches go in one write. More events share
        the cost of a write then, which is how a backlog is worked off.
        """
        self._queues.append(queue)
        queue.try_deliver = self.try_deliver
        pauses = Pauses(queue)
        while True:
            is_idle = not queue.depth
            await pauses.wait()
            # A task that has just waited needs no checkpoint, which :meth:`trio.Lock.acquire` is.
            if is_idle and not self._turn.locked():
                self._turn.acquire_nowait()
            else:
                await self._turn.acquire()
            fresh: list[Event] = []
            behind: list[Connection] = []
            is_late = False
            try:
                started = trio.current_time()
                self._look_back(started)
                batches = _BATCHES_OF_A_BACKLOG if queue.depth > batch_size else 1
                batch = queue.take(batch_size * batches)
                fresh = await self.deliver(batch, behind, started + self._timeout)
            except trio.TooSlowError:
                is_late = True
            finally:
                self._turn.release()
            ended = trio.current_time()
            if behind and batch[0].stream is None:  # what comes from a stream waits in the history
                pauses.note(behind, ended)
            if is_late:
                self.failed += len(batch)
                self._log_failure(len(batch))
            if fresh or is_late:
                self.duration.observe(ended - started)
            self._note(fresh, ended)
            queue.done(len(batch))

    def try_deliver(self, events: Sequence[Event]) -> bool:
        """Deliver events in this step if there is little or nothing to write.

        Returns False, having done nothing, if they are to wait for their turn in a queue. Events
        that were received before them in this queue must have been delivered.
        """
        concerned = self._hub.concern(events)
        if any(concerned):
            if len(events) > _FEW or self._turn.locked():
                return False
            routes = self._route(events, concerned)
            groups = [members for _, found in routes for members in found]
            if sum(map(len, groups)) > self._writes_per_checkpoint:
                return False
            # A client that is behind may be one to wait for, see Pauses.
            if any(connection.waiting_bytes for members in groups for connection in members):
                return False
        else:
            routes = [_TO_NOBODY] * len(events)
        started = trio.current_time()
        self._look_back(started)
        plan = self._plan(events, concerned, routes)
        for _ in self._write(plan):
            pass  # it was little
        ended = trio.current_time()
        if plan.fresh:
            self.duration.observe(ended - started)
        self._note(plan.fresh, ended)
        return True

    def _note(self, fresh: Sequence[Event], ended: float) -> None:
        """Note that these events, which were not duplicates, have been delivered."""
        self.latency.observe_all([ended - event.received_at for event in fresh])
        if self.observe is not None:
            self.observe(fresh, ended)

    def _look_back(self, now: float) -> None:
        """Once a second, note the receive time of the oldest waiting event.

        Its copies must be remembered until it comes; no later event was received before it.
        """
        if now - self._looked_back_at >= LOOK_BACK:
            self._looked_back_at = now
            oldest = min([now, *(queue.oldest for queue in self._queues)])
            self._duplicates.oldest_pending = oldest

    def _log_failure(self, events: int) -> None:
        self._throttled_log.error("delivery took too long", events=events, seconds=self._timeout)

    async def deliver(
        self,
        batch: Sequence[Event],
        behind: list[Connection] | None = None,
        deadline: float = math.inf,
    ) -> list[Event]:
        """Send each event to its audiences, with one write per connection.

        Returns the events that were not duplicates, and adds to ``behind`` the connections that
        have not taken all of it. History and members are looked up in one
        step, before anything is awaited: a connection that is held at that moment gets a durable
        event from the history, any other gets it live.

        Raises :exc:`trio.TooSlowError` if it is not done at the ``deadline``.
        """
        # Whom it concerns is looked up in the step in which the members are: one may have joined.
        concerned = self._hub.concern(batch)
        plan = self._plan(batch, concerned, self._route(batch, concerned))
        for members, done in self._write(plan, behind):
            try:
                await trio.lowlevel.checkpoint()
                if trio.current_time() >= deadline:  # nothing else here takes long
                    raise trio.TooSlowError
            except (trio.Cancelled, trio.TooSlowError):
                self._break_off(batch, plan.writes, members, done)
                self.times.written(plan.planned, plan.writes, trio.current_time())
                raise
        return plan.fresh

    def _write(
        self, plan: _Plan, behind: list[Connection] | None = None
    ) -> Iterator[tuple[list[Connection], int]]:
        """Write what is planned. When others are to have a turn, yield the members that it is at,
        and how many of these are done.
        """
        receipts = self.receipts
        all_tracked = [] if receipts is None else _tracked(receipts, plan.planned)
        if all_tracked and self._hub.held:
            self._note_owed(plan.planned, all_tracked)
        self.processed += len(plan.fresh)
        now = trio.current_time()
        left = self._writes_per_checkpoint
        for frames, mask, members in plan.writes:
            # Joined just before they are written: then the kernel finds the bytes in the cache.
            data, number = join(frames, mask)
            tracked = [sent for bit, sent in all_tracked if mask & bit]
            counted = 0
            for n, connection in enumerate(members, 1):
                if (waits := connection.write(data, number, now)) and behind is not None:
                    behind.append(connection)
                if tracked and receipts is not None:
                    receipts.sent(connection, tracked, waits=waits)
                left -= 1
                if not left:
                    left = self._writes_per_checkpoint
                    self.deliveries += number * (n - counted)
                    counted = n
                    yield members, n
            self.deliveries += number * (len(members) - counted)
        self.times.written(plan.planned, plan.writes, trio.current_time())

    def remember(self, event: Event, read_again: Duplicates | None = None) -> bool:
        """Store a durable event of the past without sending it. Call it with the oldest first.

        Returns whether it was stored. ``read_again`` is for the events of a stream that was read
        before and forgotten meanwhile: those that are new to it are stored, though they were
        received before.
        """
        is_concerned = self._hub.concerns(event)
        held = event.frame if is_concerned and event.durable else event.payload
        found = self._duplicates.find_or_add(event, held=held)
        if read_again is not None:
            found = read_again.find_or_add(event, held=held)
        if not event.durable or (found and found.was_stored):
            return False
        now = trio.current_time()
        if is_concerned:
            self._history.add(event, self._history.routing.audiences(event), now=now)
        else:
            self._history.add_raw([(event, 0)], now=now)
        return True

    def _route(self, batch: Sequence[Event], concerned: Sequence[bool]) -> list[_Route]:
        """The audiences of each event, and their members."""
        found: list[_Route] = []
        for event, is_concerned in zip(batch, concerned, strict=True):
            if not is_concerned:
                found.append(_TO_NOBODY)
                continue
            audiences = self.audiences(event)
            groups = self._hub.groups(audiences)
            if event.escalation is not None:
                groups = self._without_earlier(event, groups)
            found.append((audiences, groups))
        return found

    def _plan(
        self, batch: Sequence[Event], concerned: Sequence[bool], routes: Sequence[_Route]
    ) -> _Plan:
        """Note a batch as received, and say what is to be written.

        ``concerned`` and ``routes`` are what :meth:`Hub.concern` and :meth:`_route` say of it in
        this step.
        """
        fresh: list[Event] = []
        planned: list[Planned] = []
        hub, history, extent = self._hub, self._history, self._extent
        last_number, now = hub.last_number, trio.current_time()
        raw: list[tuple[Event, int]] = []  # to be stored, with their marks
        receipts = self.receipts if self._uncovered_to_branch else None
        streamed = [event for event in batch if event.stream is not None]
        for stream, position in _positions(reversed(streamed)).items():
            extent.advance(stream, position)  # it may be its first
        # Not on receipt: a copy that the queue then drops must not count as the first.
        found_before = self._duplicates.find_or_add_all(
            batch,
            last_number,
            [  # what is held anyway: the frame of what the history stores as routed
                event.frame if is_concerned and event.durable else event.payload
                for event, is_concerned in zip(batch, concerned, strict=True)
            ],
        )
        for event, found, is_concerned, (audiences, groups) in zip(
            batch, found_before, concerned, routes, strict=True
        ):
            mark = 0
            if found is None:
                fresh.append(event)
                if event.type not in self._types and event.escalation is None:
                    self.unknown_type += 1
                if groups:
                    self.broadcasts += 1
                    planned.append((event, groups, 0))
                if not groups or self._is_uncovered(event, audiences):
                    self.unheard += 1
            else:
                self.duplicate += 1
                mark = found.mark
                if found.was_stored and event.durable:
                    self.on_copy(event)
                # Connections that joined after its Pub/Sub copy was sent get the stream event.
                if groups and event.durable and not found.was_stored and mark < last_number:
                    planned.append((event, groups, mark))
            if event.durable and (found is None or not found.was_stored):
                if not is_concerned:
                    raw.append((event, mark))
                else:
                    if raw:  # the history is in the order of the streams
                        history.add_raw(raw, now=now)
                        raw = []
                    history.add(event, audiences, now=now, delivered_up_to=mark)
                    if receipts is not None:
                        receipts.stand_in(event, audiences)
        if raw:
            history.add_raw(raw, now=now)
        for stream, position in _positions(streamed).items():
            extent.advance(stream, position)
        if not planned:
            return _Plan(fresh, (), [])
        return _Plan(fresh, planned, plan_writes(planned, hub))

    def _without_earlier(self, event: Event, groups: list[Members]) -> list[Members]:
        """Those in an escalated event's audience that were not sent it before."""
        left = Members()
        left.update(union(groups))
        earlier = set(union(self._hub.groups(self._routes.excluded(event))))
        if self.receipts is not None:
            earlier = self.receipts.had(event, left, earlier)
        left.difference_update(earlier)
        return [left] if left else []

    def _note_owed(self, planned: Sequence[Planned], tracked: Sequence[tuple[int, Sent]]) -> None:
        """Note the tracked events that held connections get from the history."""
        assert self.receipts is not None
        for bit, sent in tracked:
            _, groups, delivered_up_to = planned[bit.bit_length() - 1]
            held = self._hub.held.intersection(union(groups))
            self.receipts.owed([each for each in held if each.number > delivered_up_to], sent)

    def audiences(self, event: Event) -> list[Audience]:
        """The audiences by the routing, and what an uncovered sector falls back to."""
        found = self._routes.audiences(event)
        if self._uncovered_to_branch and self._is_uncovered(event, found):
            found.append(floor(event.tenant, event.branch))
        return found

    def _is_uncovered(self, event: Event, audiences: list[Audience]) -> bool:
        if event.sector is None:
            return False
        covering = waiters(event.tenant, event.branch, event.sector)
        return covering in audiences and not self._hub.hears([covering])

    def _break_off(
        self, batch: Sequence[Event], writes: list[Write], members: list[Connection], done: int
    ) -> None:
        """Send a gap to connections not written to: they may have lost durable events."""
        if not any(self._routes.is_durable(event.type) for event in batch):
            return
        left = members[done:]
        for _, _, others in reversed(writes):
            if others is members:
                break
            left += others
        for connection in left:
            connection.send(GAP)


def _tracked(receipts: ReceiptLog, planned: Sequence[Planned]) -> list[tuple[int, Sent]]:
    """The few tracked events, each with its bit, in order."""
    types, found = receipts.types, []
    for n, (event, _, _) in enumerate(planned):
        if event.type in types or event.escalation is not None:
            if event.stream is None or event.position is None:
                continue
            if (sent := receipts.find(Place(event.stream, event.position))) is not None:
                found.append((1 << n, sent))
    return found


def _positions(batch: Iterable[Event]) -> dict[Stream, Position]:
    """The last position in each stream."""
    return {
        event.stream: event.position
        for event in batch
        if event.stream is not None and event.position is not None
    }
