"""Receipts of this process: which tracked events its clients were sent, and have confirmed.

A connection remembers the tracked events that it was sent until its client confirms them, and the
last ones a little longer. Of more than :data:`MOST_UNCONFIRMED` it remembers from where to where in
the stream the others are: they are looked up among all :mod:`.tracked_events` of its tenant. What
changes is written to Redis a moment later, see :mod:`.receipt_writing`.
"""

from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable
from itertools import islice
from typing import Final

import trio

from ..core.audiences import Audience, Principal, audiences_of
from ..core.delivery_times import DeliveryTimes
from ..core.event_ids import Position, Stream
from ..core.events import Event
from ..core.receipts import Place, Receipt, Recipient, State, read_place
from .connection import Connection
from .history import History
from .receipt_writing import ReceiptWriting
from .tracked import Forgotten, Sent, Tracked
from .tracked_events import TrackedEvents

MOST_UNCONFIRMED: Final = 1_000  # that one connection remembers one by one
_MOST_CONFIRMED: Final = 200  # of one connection, that its application can still say it has seen
MOST_RECENT: Final = 100  # of a tenant, that a client can confirm by coming back from elsewhere
MOST_LOOKED_UP: Final = 10_000  # tracked events at a time, for one confirmation


class ReceiptLog:
    """The receipts of the clients of this process. ``clock`` returns unix time."""

    def __init__(
        self,
        events: TrackedEvents,
        history: History,
        clock: Callable[[], float],
        writing: ReceiptWriting,
        times: DeliveryTimes | None = None,
    ) -> None:
        self.events = events
        self._history = history
        self._extent = history.extent
        self._times = times or DeliveryTimes()
        self._clock = clock
        self._writing = writing
        self.ignored = 0  # confirmations of ids that were not sent
        self.counts: Counter[State] = Counter()

    def had(
        self, event: Event, connections: Iterable[Connection], earlier: set[Connection]
    ) -> set[Connection]:
        """Those of these connections that have the original already.

        ``earlier`` are in an audience that it went to before. Some of them may have come later.
        """
        assert event.stream is not None
        assert event.position is not None
        tracked = self.events.escalated(Place(event.stream, event.position))
        if tracked is None:
            return earlier
        return {
            each
            for each in connections
            if _had(each, tracked) or (each in earlier and not self._was_away(each, tracked))
        }

    def lacks(self, connection: Connection, place: Place) -> bool:
        """Whether a connection has yet to be sent what was escalated here, though it is in an
        audience that the original went to.
        """
        if (tracked := self.events.escalated(place)) is None:
            return False
        receipt = tracked.by.get(Recipient.of(connection.principal))
        if receipt is not None and receipt.step >= tracked.step_at(place.position):
            return True  # this is what brings it
        return not _had(connection, tracked) and self._was_away(connection, tracked)

    def _was_away(self, connection: Connection, tracked: Tracked) -> bool:
        """Whether a connection was not in an audience of the original when that was sent."""
        if tracked.is_late:
            return False
        stream, position = tracked.place
        state = connection.resume_state
        if state.cursor is not None:
            cursor = state.cursor.get(stream, self._extent.began.get(stream, position))
            if cursor < position:  # it comes to the original
                return False
        if (came_back_at := state.came_back_at) is None:
            return True
        return came_back_at.get(stream, position) < position  # else it may have got it before

    def sent(self, connection: Connection, events: Iterable[Sent], *, waits: bool) -> None:
        """A connection was sent these events; with ``waits`` the kernel has not taken all yet."""
        if connection.ending:
            return
        if (unconfirmed := connection.unconfirmed) is None:
            unconfirmed = connection.unconfirmed = deque(maxlen=MOST_UNCONFIRMED)
        for sent in events:
            if len(unconfirmed) == MOST_UNCONFIRMED:
                _note_forgotten(connection, unconfirmed[0])
            unconfirmed.append(sent)
            self._reach(connection, sent, State.SENT if waits else State.WRITTEN)

    def owed(self, connections: Iterable[Connection], sent: Sent) -> None:
        """These connections are sent this event from the history when they come to it."""
        for connection in connections:
            if not connection.ending:
                self._reach(connection, sent, State.SENT)

    def taken(self, connection: Connection) -> None:
        """The kernel has taken all that waited for a connection."""
        for sent in connection.unconfirmed or ():
            self._reach(connection, sent, State.WRITTEN)
        for stream, forgotten in (connection.forgotten or {}).items():
            if forgotten.waiting is not None:
                self._raise_all(
                    connection, stream, forgotten.waiting, forgotten.last, State.WRITTEN
                )
                forgotten.waiting = None

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
        left: deque[Sent] = deque(maxlen=MOST_UNCONFIRMED)
        is_newest = self._confirm_forgotten(connection, place)  # else its next ping goes on
        for sent in connection.unconfirmed or ():
            stream, named = sent.tracked.place
            if stream == place.stream and (
                sent.position <= place.position or named == place.position
            ):
                self._reach(connection, sent, State.DELIVERED)
                is_newest = is_newest and sent.position <= place.position
                if connection.confirmed is None:
                    connection.confirmed = deque(maxlen=_MOST_CONFIRMED)
                connection.confirmed.append(sent)
            else:
                left.append(sent)
        if connection.unconfirmed is not None:
            connection.unconfirmed = left
        if is_newest:  # an escalated event is not: the client's pings name a later one
            connection.confirmed_id = event_id

    def _confirm_forgotten(self, connection: Connection, upto: Place) -> bool:
        """Confirm what a connection was sent and does not remember; return whether that is all."""
        all_forgotten, stream = connection.forgotten, upto.stream
        if all_forgotten is None or (forgotten := all_forgotten.get(stream)) is None:
            return True
        last = min(forgotten.last, upto.position)
        if last < forgotten.first:
            return True
        went_on_at = self._raise_all(
            connection, stream, forgotten.first, last, State.DELIVERED, most=MOST_LOOKED_UP
        )
        forgotten.first = last if went_on_at is None else went_on_at
        if last == forgotten.last and went_on_at is None:
            del all_forgotten[stream]
        return went_on_at is None

    def _raise_all(
        self,
        connection: Connection,
        stream: Stream,
        first: Position,
        last: Position,
        state: State,
        *,
        most: int | None = None,
    ) -> Position | None:
        """Note a state of what a connection was sent of these; return where ``most`` of them end,
        None if that are all.
        """
        who, audiences = Recipient.of(connection.principal), connection.audiences
        for n, sent in enumerate(self.events.since(connection.principal.tenant, stream, first)):
            if sent.position > last:
                break
            if n == most:
                return sent.position
            at = _sent_at(sent.tracked, who, audiences)
            if who in sent.tracked.by and at is not None and at <= last:
                self._raise(sent.tracked, who, state)
        return None

    def see(self, connection: Connection, event_id: str) -> None:
        """The application of a client has confirmed this event."""
        place = self._place_of(connection, event_id)
        if place is None:
            self.ignored += 1
            return
        if (tracked := self.events.original(place)) is not None:
            self._reach(connection, Sent(place.position, tracked), State.SEEN)

    def _place_of(self, connection: Connection, event_id: str) -> Place | None:
        """The place that an id names, if it was sent on this connection."""
        if (place := read_place(event_id)) is None:
            return None
        for sent_before in (connection.unconfirmed, connection.confirmed):
            if any(sent.tracked.place == place for sent in sent_before or ()):
                return place
        tracked = self.events.original(place)
        if tracked is not None and Recipient.of(connection.principal) not in tracked.by:
            return None  # it has come into the audience since
        return place if self._was_sent(connection, *place) else None

    def _was_sent(self, connection: Connection, stream: Stream, position: Position) -> bool:
        state, extent = connection.resume_state, self._extent
        upto = extent.end if state.cursor is None else state.cursor
        begin = state.begun_at or state.accepted_at or {}
        # A stream that was read only after the connection had joined has its begin there.
        since = begin.get(stream, extent.began.get(stream, position))
        return since < position <= upto.get(stream, position) and self._history.is_for(
            stream, position, connection.audiences
        )

    def _reach(self, connection: Connection, sent: Sent, state: State) -> None:
        who, tracked = Recipient.of(connection.principal), sent.tracked
        if (receipt := tracked.by.get(who)) is None:
            receipt = tracked.by[who] = Receipt(step=sent.step)
            if tracked.event.branch_id not in connection.principal.branches:
                receipt.branches = connection.principal.branches
        steps = tracked.steps_of(connection.audiences)
        if steps & ~receipt.steps:  # another device of the user may be in other audiences
            receipt.steps |= steps
            self._writing.changed(tracked, who, receipt)
        self._raise(tracked, who, state)

    def confirm_earlier(
        self, principal: Principal, upto: Place, *, names_event: bool = False
    ) -> None:
        """A client came back with its place, or names in a request the last event that it has.

        It has what it was sent before that on any connection, of any process. What it was sent at
        a later place of the stream, in a step, it has only if it names that event.
        """
        who, audiences = Recipient.of(principal), audiences_of(principal)
        newest = self.events.newest(principal.tenant, upto.stream)
        was_sent_here = False
        for n, sent in enumerate(islice(newest, MOST_LOOKED_UP)):
            tracked = sent.tracked
            receipt = tracked.by.get(who)
            if n < MOST_RECENT:
                was_sent_here |= receipt is not None
            elif not was_sent_here or (receipt is not None and receipt.delivered is not None):
                break
            elif receipt is None:
                continue
            if tracked.place == upto and names_event:
                self._raise(tracked, who, State.DELIVERED, tracked.last_step)
                continue
            at = _sent_at(tracked, who, audiences)
            if receipt is None and tracked.place == upto:  # its sectors may have changed since
                at = upto.position
            if at is not None and at <= upto.position:
                self._raise(tracked, who, State.DELIVERED, tracked.step_at(upto.position))

    def see_earlier(self, principal: Principal, place: Place) -> None:
        """The application of a client says in a request that it has seen this event."""
        tracked = self.events.original(place)
        if tracked is None or tracked.event.tenant_id != principal.tenant:
            return
        who = Recipient.of(principal)
        if who in tracked.by or tracked.sent_at(audiences_of(principal)) is not None:
            self._raise(tracked, who, State.SEEN, tracked.last_step)

    def _raise(self, tracked: Tracked, who: Recipient, state: State, step: int = 0) -> None:
        """Note a state of one who was sent the event, by this process or maybe by another; then it
        was in this step or an earlier one.
        """
        now = int(self._clock() * 1000)
        if (receipt := tracked.by.get(who)) is not None:
            was_sent, was_delivered = receipt.sent is not None, receipt.delivered is not None
            if receipt.reach(state, now):
                self.counts[state] += 1
                self._writing.changed(tracked, who, receipt)
                if not was_sent:
                    self._times.sent(tracked.place, tracked.event, trio.current_time())
                if not was_delivered and receipt.delivered is not None:
                    self._times.confirmed(tracked.place, tracked.event, trio.current_time())
        else:
            seen = now if state is State.SEEN else None
            self._writing.changed(tracked, who, Receipt(delivered=now, seen=seen, step=step))


def _sent_at(tracked: Tracked, who: Recipient, audiences: Collection[Audience]) -> Position | None:
    """Where in the stream one in these audiences was sent an event; None if nowhere yet."""
    if (receipt := tracked.by.get(who)) is not None:
        return tracked.escalated.get(receipt.step, tracked.place.position)
    return tracked.sent_at(audiences)


def _note_forgotten(connection: Connection, sent: Sent) -> None:
    """Note that a connection does not remember any more that it was sent this."""
    if connection.forgotten is None:
        connection.forgotten = {}
    stream = sent.tracked.place.stream
    if (forgotten := connection.forgotten.get(stream)) is None:
        forgotten = connection.forgotten[stream] = Forgotten(sent.position)
    forgotten.add(sent.position, waits=connection.waiting_bytes > 0)


def _had(connection: Connection, tracked: Tracked) -> bool:
    """Whether the user or session of a connection was written an event, or this one is sent it."""
    receipt = tracked.by.get(Recipient.of(connection.principal))
    if receipt is not None and receipt.state >= State.WRITTEN:
        return True
    if any(sent.tracked is tracked for sent in connection.unconfirmed or ()):
        return True
    forgotten = (connection.forgotten or {}).get(tracked.place.stream)
    return receipt is not None and forgotten is not None and tracked.place.position in forgotten
