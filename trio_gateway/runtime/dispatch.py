"""Dispatch: deliver a batch of events, with one write per connection.

:mod:`.batches` says when: one batch at a time.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce
from operator import or_
from typing import Final, NamedTuple

import trio

from ..core.audiences import Audience, floor, waiters
from ..core.delivery_times import DeliveryTimes, Owed
from ..core.duplicates import Duplicates
from ..core.event_ids import Position, Stream
from ..core.events import Event
from ..core.messages import GAP
from ..core.receipts import Place
from ..core.routing import ROUTES, Routing
from .connection import Connection
from .history import History
from .hub import Hub
from .members import Members, union
from .past_routing import PastRouting
from .planning import Planned, Write, join, plan_writes
from .receipts import ReceiptLog
from .tracked import Sent

# The audiences of an event, and the members of those that have any.
Route = tuple[list[Audience], list[Members]]


class Plan(NamedTuple):
    """What is done about a batch: its events that were not duplicates, and what is written."""

    fresh: list[Event]
    planned: Sequence[Planned]
    writes: list[Write]


TO_NOBODY: Final[Route] = ([], [])  # never changed


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
    ) -> None:
        self.hub = hub
        self._routes = routes
        self._types = frozenset(routes)
        self._history = (
            history
            if history is not None
            else History(routing=PastRouting(routes, uncovered_to_branch=uncovered_to_branch))
        )
        self._extent = self._history.extent
        self._uncovered_to_branch = uncovered_to_branch
        self.writes_per_checkpoint = writes_per_checkpoint
        self.duplicates = Duplicates()
        self.processed = self.broadcasts = self.deliveries = 0
        self.duplicate = self.unheard = self.unknown_type = 0
        self.times = DeliveryTimes()
        self.receipts: ReceiptLog | None = None  # if the routing has tracked types
        self.on_copy: Callable[[Event], None] = lambda copy: None  # of a durable event

    async def deliver(
        self,
        batch: Sequence[Event],
        behind: list[Connection] | None = None,
        deadline: float = math.inf,
    ) -> list[Event]:
        """Send each event to its audiences, with one write per connection.

        Returns the events that were not duplicates, and adds to ``behind`` the connections that
        have not taken all of it. History and members are looked up in one step, before anything is
        awaited: a connection that is held at that moment gets a durable event from the history, any
        other gets it live.

        Raises :exc:`trio.TooSlowError` if it is not done at the ``deadline``.
        """
        # Whom it concerns is looked up in the step in which the members are: one may have joined.
        concerned = self.hub.concern(batch)
        plan = self.plan(batch, concerned, self.route(batch, concerned))
        for members, done in self.write(plan, behind):
            try:
                await trio.lowlevel.checkpoint()
                if trio.current_time() >= deadline:  # nothing else here takes long
                    raise trio.TooSlowError
            except (trio.Cancelled, trio.TooSlowError):
                self._break_off(batch, plan.writes, members, done)
                written = reduce(or_, (mask for _, mask, _ in plan.writes), 0)
                self.times.written(plan.planned, written, trio.current_time(), is_behind=True)
                raise
        return plan.fresh

    def write(
        self, plan: Plan, behind: list[Connection] | None = None
    ) -> Iterator[tuple[list[Connection], int]]:
        """Write what is planned. When others are to have a turn, yield the members that it is at,
        and how many of these are done.
        """
        receipts = self.receipts
        all_tracked = [] if receipts is None else _tracked(receipts, plan.planned)
        if all_tracked and self.hub.held:
            self._note_owed(plan.planned, all_tracked)
        is_behind, written = bool(self.hub.held), 0
        self.processed += len(plan.fresh)
        now = trio.current_time()
        left = self.writes_per_checkpoint
        for frames, mask, members in plan.writes:
            # Joined just before they are written: then the kernel finds the bytes in the cache.
            data, number = join(frames, mask)
            tracked = [sent for bit, sent in all_tracked if mask & bit]
            counted = waiting = 0
            owed: Owed | None = None
            for n, connection in enumerate(members, 1):
                if waits := connection.write(data, number, now):
                    waiting += 1
                    if owed is None:
                        owed = self._owed(plan.planned, mask)
                    if owed:
                        is_behind = True
                        connection.owe(owed)
                    if behind is not None:
                        behind.append(connection)
                if tracked and receipts is not None:
                    receipts.sent(connection, tracked, waits=waits)
                left -= 1
                if not left:
                    left = self.writes_per_checkpoint
                    self.deliveries += number * (n - counted)
                    counted = n
                    yield members, n
            self.deliveries += number * (len(members) - counted)
            if waiting < len(members):
                written |= mask
        self.times.written(plan.planned, written, trio.current_time(), is_behind=is_behind)

    def _owed(self, planned: Sequence[Planned], mask: int) -> Owed:
        """The events of a write that a client has not taken yet. They are of its tenant."""
        events = [event for n, (event, _, _) in enumerate(planned) if mask >> n & 1]
        places = [
            Place(each.stream, each.position)
            for each in events
            if each.stream is not None and each.position is not None
        ]
        return Owed(self.times, events[0].tenant, places)

    def remember(self, event: Event, read_again: Duplicates | None = None) -> bool:
        """Store a durable event of the past without sending it. Call it with the oldest first.

        Returns whether it was stored. ``read_again`` is for the events of a stream that was read
        before and forgotten meanwhile: those that are new to it are stored, though they were
        received before.
        """
        is_concerned = self.hub.concerns(event)
        held = event.frame if is_concerned and event.durable else event.payload
        found = self.duplicates.find_or_add(event, held=held)
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

    def route(self, batch: Sequence[Event], concerned: Sequence[bool]) -> list[Route]:
        """The audiences of each event, and their members."""
        found: list[Route] = []
        for event, is_concerned in zip(batch, concerned, strict=True):
            if not is_concerned:
                found.append(TO_NOBODY)
                continue
            audiences = self.audiences(event)
            groups = self.hub.groups(audiences)
            if event.escalation is not None:
                groups = self._without_earlier(event, groups)
            found.append((audiences, groups))
        return found

    def plan(
        self, batch: Sequence[Event], concerned: Sequence[bool], routes: Sequence[Route]
    ) -> Plan:
        """Note a batch as received, and say what is to be written.

        ``concerned`` and ``routes`` are what :meth:`Hub.concern` and :meth:`route` say of it in
        this step.
        """
        fresh: list[Event] = []
        planned: list[Planned] = []
        hub, history, extent = self.hub, self._history, self._extent
        last_number, now = hub.last_number, trio.current_time()
        raw: list[tuple[Event, int]] = []  # to be stored, with their marks
        receipts = self.receipts if self._uncovered_to_branch else None
        streamed = [event for event in batch if event.stream is not None]
        for stream, position in _positions(reversed(streamed)).items():
            extent.advance(stream, position)  # it may be its first
        # Not on receipt: a copy that the queue then drops must not count as the first.
        found_before = self.duplicates.find_or_add_all(
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
                        receipts.events.stand_in(event, audiences)
        if raw:
            history.add_raw(raw, now=now)
        for stream, position in _positions(streamed).items():
            extent.advance(stream, position)
        if not planned:
            return Plan(fresh, (), [])
        return Plan(fresh, planned, plan_writes(planned, hub))

    def _without_earlier(self, event: Event, groups: list[Members]) -> list[Members]:
        """Those in an escalated event's audience that were not sent it before."""
        left = Members()
        left.update(union(groups))
        earlier = set(union(self.hub.groups(self._routes.excluded(event))))
        if self.receipts is not None:
            earlier = self.receipts.had(event, left, earlier)
        left.difference_update(earlier)
        return [left] if left else []

    def _note_owed(self, planned: Sequence[Planned], tracked: Sequence[tuple[int, Sent]]) -> None:
        """Note the tracked events that held connections get from the history."""
        assert self.receipts is not None
        for bit, sent in tracked:
            _, groups, delivered_up_to = planned[bit.bit_length() - 1]
            held = self.hub.held.intersection(union(groups))
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
        return covering in audiences and not self.hub.hears([covering])

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
    types, found = receipts.events.types, []
    for n, (event, _, _) in enumerate(planned):
        if event.type in types or event.escalation is not None:
            if event.stream is None or event.position is None:
                continue
            if (sent := receipts.events.find(Place(event.stream, event.position))) is not None:
                found.append((1 << n, sent))
    return found


def _positions(batch: Iterable[Event]) -> dict[Stream, Position]:
    """The last position in each stream."""
    return {
        event.stream: event.position
        for event in batch
        if event.stream is not None and event.position is not None
    }
