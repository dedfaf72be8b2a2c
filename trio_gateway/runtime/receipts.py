"""Receipts of this process: which tracked events its clients were sent, and have confirmed.

A connection remembers the tracked events that it was sent until its client confirms them. What
that changes is collected here by event, and written to Redis a moment later.
"""

from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Final, NoReturn

import trio

from ..core.audiences import Principal
from ..core.escalation import Escalation
from ..core.event_ids import Position, Stream
from ..core.events import Event
from ..core.receipts import Change, Place, Receipt, State, TrackedEvent, Who, read_place
from ..core.routing import Routing
from .connection import Connection
from .history import History
from .tracked import Sent, Tracked

MOST_TRACKED: Final = 50_000  # events; the oldest are forgotten
MOST_UNCONFIRMED: Final = 1_000  # of one connection; the oldest are forgotten
MOST_RECENT: Final = 100  # of a tenant, that a client can confirm by coming back
_PAUSE: Final = 0.1  # seconds between a change and its writing
_RETRY: Final = 1.0  # seconds

#: Writes changes to Redis; False if Redis is unavailable.
Write = Callable[[Mapping[Place, Change]], Awaitable[bool]]


class ReceiptLog:
    """The receipts of the clients of this process.

    ``clock`` returns unix time; ``ttl`` is how many seconds after an event its receipts are kept.
    """

    def __init__(
        self, history: History, routes: Routing, clock: Callable[[], float], ttl: float
    ) -> None:
        self._history = history
        self._routes = routes
        self._types = routes.tracked_types
        self._clock = clock
        self._ttl_ms = int(ttl * 1000)
        self._tracked: dict[Place, Tracked] = {}  # in the order they came
        self._escalated: dict[Place, Tracked] = {}  # by where they are escalated
        self._recent: dict[int, deque[Tracked]] = {}  # by tenant
        self.changed: dict[Place, Tracked] = {}  # to be written to Redis
        self._changed = trio.lowlevel.ParkingLot()
        self.ignored = 0  # confirmations of ids that were not sent
        self.counts: Counter[State] = Counter()

    @property
    def tracks(self) -> bool:
        """Whether any type is tracked."""
        return bool(self._types)

    @property
    def is_empty(self) -> bool:
        """Whether no event is tracked."""
        return not self._tracked

    def note(self, events: Iterable[Event]) -> None:
        """Track those of these durable events whose type asks for it."""
        types = self._types
        for event in events:
            if event.escalation is not None:
                self._add_escalated(event, event.escalation)
            elif event.type in types and event.durable:
                assert event.stream is not None
                assert event.position is not None
                self._add(event, event.type, Place(event.stream, event.position))

    def _add_escalated(self, event: Event, escalation: Escalation) -> None:
        assert event.stream is not None
        assert event.position is not None
        if (original := read_place(escalation.event_id)) is None:
            return
        tracked = self._tracked.get(original) or self._add(event, escalation.of, original)
        self._escalated[Place(event.stream, event.position)] = tracked
        if len(self._escalated) > MOST_TRACKED:
            del self._escalated[next(iter(self._escalated))]

    def _add(self, event: Event, type_: str, place: Place) -> Tracked:
        """Track the event at this place, which concerns the same as ``event``."""
        if (known := self._tracked.get(place)) is not None:
            return known
        steps, at = self._routes.audiences_of_steps(type_, event), place.position[0]
        about = TrackedEvent(type_, event.tenant, event.branch, at)
        tracked = self._tracked[place] = Tracked(place, about, at + self._ttl_ms, steps)
        self._recent.setdefault(event.tenant, deque(maxlen=MOST_RECENT)).append(tracked)
        if len(self._tracked) > MOST_TRACKED:
            self._forget(next(iter(self._tracked.values())))
        return tracked

    def find(self, place: Place) -> Sent | None:
        """The tracked event at this place, or that is escalated there; None if there is none."""
        tracked = self._tracked.get(place) or self._escalated.get(place)
        return None if tracked is None else Sent(place.position, tracked)

    def had(self, event: Event, connections: Iterable[Connection]) -> list[Connection]:
        """Those of these connections whose users or sessions were sent the original before."""
        assert event.stream is not None
        assert event.position is not None
        tracked = self._escalated.get(Place(event.stream, event.position))
        if tracked is None:
            return []
        return [each for each in connections if _had(each, tracked)]

    def sent(self, connection: Connection, events: Iterable[Sent], *, waits: bool) -> None:
        """A connection was sent these events; with ``waits`` the kernel has not taken all yet."""
        if connection.ending:
            return
        if (unconfirmed := connection.unconfirmed) is None:
            unconfirmed = connection.unconfirmed = deque(maxlen=MOST_UNCONFIRMED)
        for sent in events:
            unconfirmed.append(sent)
            self._reach(connection, sent.tracked, State.SENT if waits else State.WRITTEN)

    def owed(self, connections: Iterable[Connection], sent: Sent) -> None:
        """These connections are sent this event from the history when they come to it."""
        for connection in connections:
            if not connection.ending:
                self._reach(connection, sent.tracked, State.SENT)

    def taken(self, connection: Connection) -> None:
        """The kernel has taken all that waited for a connection."""
        for sent in connection.unconfirmed or ():
            self._reach(connection, sent.tracked, State.WRITTEN)

    def confirm(self, connection: Connection, event_id: str) -> None:
        """A client has everything up to this event.

        An id that was not sent on the connection is ignored and counted.
        """
        if event_id == connection.confirmed_id:
            return
        place = self._place_of(connection, event_id)
        if place is None:
            self.ignored += 1
            return
        connection.confirmed_id = event_id
        left: deque[Sent] = deque(maxlen=MOST_UNCONFIRMED)
        for sent in connection.unconfirmed or ():
            stream, named = sent.tracked.place
            if stream == place.stream and (
                sent.position <= place.position or named == place.position
            ):
                self._reach(connection, sent.tracked, State.DELIVERED)
            else:
                left.append(sent)
        if connection.unconfirmed is not None:
            connection.unconfirmed = left

    def see(self, connection: Connection, event_id: str) -> None:
        """The application of a client has confirmed this event."""
        place = self._place_of(connection, event_id)
        if place is None:
            self.ignored += 1
            return
        if (tracked := self._tracked.get(place)) is not None:
            self._reach(connection, tracked, State.SEEN)

    def _place_of(self, connection: Connection, event_id: str) -> Place | None:
        """The place that an id names, if it was sent on this connection."""
        if (place := read_place(event_id)) is None:
            return None
        if any(sent.tracked.place == place for sent in connection.unconfirmed or ()):
            return place
        return place if self._was_sent(connection, *place) else None

    def _was_sent(self, connection: Connection, stream: Stream, position: Position) -> bool:
        state, history = connection.resume_state, self._history
        upto = history.end if state.cursor is None else state.cursor
        begin = state.begun_at or state.accepted_at or {}
        return begin.get(stream, position) < position <= upto.get(
            stream, position
        ) and history.is_for(stream, position, connection.audiences)

    def _reach(self, connection: Connection, tracked: Tracked, state: State) -> None:
        who = Who.of(connection.principal)
        if (receipt := tracked.by.get(who)) is None:
            receipt = tracked.by[who] = Receipt()
            for step, audiences in enumerate(tracked.steps):
                if not connection.audiences.isdisjoint(audiences):
                    receipt.steps |= 1 << step
        self._raise(tracked, who, state)

    def _change(self, tracked: Tracked, who: Who, receipt: Receipt) -> None:
        tracked.changed[who] = receipt
        if tracked.place not in self.changed:
            self.changed[tracked.place] = tracked
            self._changed.unpark_all()

    def confirm_earlier(self, principal: Principal, upto: Place) -> None:
        """A client came back with the last event that it has, or names it in a request.

        It has what it was sent before on any connection, of any process.
        """
        who = Who.of(principal)
        for tracked in self._recent.get(principal.tenant, ()):
            stream, position = tracked.place
            if stream == upto.stream and position <= upto.position:
                self._raise(tracked, who, State.DELIVERED)

    def see_earlier(self, principal: Principal, place: Place) -> None:
        """The application of a client says in a request that it has seen this event."""
        tracked = self._tracked.get(place)
        if tracked is not None and tracked.event.tenant_id == principal.tenant:
            self._raise(tracked, Who.of(principal), State.SEEN)

    def _raise(self, tracked: Tracked, who: Who, state: State) -> None:
        """Note a state of one who was sent the event, by this process or maybe by another."""
        now = int(self._clock() * 1000)
        if (receipt := tracked.by.get(who)) is not None:
            if receipt.reach(state, now):
                self.counts[state] += 1
                self._change(tracked, who, receipt)
        else:
            self._change(
                tracked, who, Receipt(delivered=now, seen=now if state is State.SEEN else None)
            )

    async def run(self, write: Write) -> NoReturn:
        """Write what changes, with ``write``; returns only when cancelled."""
        while True:
            while not self.changed:
                await self._changed.park()
            await trio.sleep(_PAUSE)  # for others: many share a script
            if not await self.flush(write):
                await trio.sleep(_RETRY)
            self.trim()

    async def flush(self, write: Write) -> bool:
        """Write what has changed until now; return False, and lose nothing, if that fails."""
        taken = list(self.changed.values())
        self.changed.clear()
        changes: dict[Place, Change] = {}
        for tracked in taken:
            changes[tracked.place] = Change(tracked.event, tracked.expires, tracked.changed)
            tracked.changed = {}
        is_written = False
        try:
            is_written = await write(changes)
        finally:
            if not is_written:
                for tracked in taken:
                    tracked.changed = {**changes[tracked.place].by, **tracked.changed}
                    self.changed.setdefault(tracked.place, tracked)
        return is_written

    def trim(self) -> None:
        """Forget the events whose receipts are not kept any more."""
        now = self._clock() * 1000
        tracked = self._tracked
        while tracked and (first := next(iter(tracked.values()))).expires < now:
            self._forget(first)

    def _forget(self, tracked: Tracked) -> None:
        del self._tracked[tracked.place]
        recent = self._recent[tracked.event.tenant_id]
        if recent[0] is tracked:
            recent.popleft()
        if not recent:
            del self._recent[tracked.event.tenant_id]


def _had(connection: Connection, tracked: Tracked) -> bool:
    """Whether the user or session of a connection was written an event, or this one is sent it."""
    receipt = tracked.by.get(Who.of(connection.principal))
    if receipt is not None and receipt.state >= State.WRITTEN:
        return True
    return any(sent.tracked is tracked for sent in connection.unconfirmed or ())
