"""Resume: decide where in the history a connection begins, or goes on after a loss.

:mod:`.resume_state` has the theory: the phases of a connection, and why nothing is lost or
doubled between the history and live events. Here is what moves a connection from one to the next,
until :mod:`.feeding` sends it what it missed.
"""

from collections import Counter, deque
from typing import Final

import trio

from ..core.delivery_times import DeliveryTimes
from ..core.event_ids import Cursor, Position, Stream, cursor_id, read_cursor
from ..core.messages import GAP, Resume, resumed
from ..core.receipts import Place
from .connection import Connection
from .feeding import Feeding
from .history import History
from .hub import Hub
from .older_events import OlderEvents
from .places import Places
from .receipts import ReceiptLog
from .resume_state import Phase, Step

UNDECIDED: Final = 0.5  # seconds that a silent client may still ask to resume
_TOGETHER: Final = 0.05  # seconds: whose time comes so soon is decided at once, in one wake-up
PATIENCE: Final = 2.0  # seconds for us to read what another process has delivered already
_PER_CHECKPOINT: Final = 50  # connections that go live at a time
_BEFORE: Final = 1.0  # seconds that an entry's time may be behind: Redis looks it up now and then


class Replays:
    """Lets connections begin where they left off."""

    def __init__(
        self,
        history: History,
        hub: Hub,
        places: Places | None = None,
        older: OlderEvents | None = None,
        receipts: ReceiptLog | None = None,
        times: DeliveryTimes | None = None,
    ) -> None:
        self._receipts = receipts
        self._history = history
        self._extent = history.extent
        self._older = OlderEvents(history) if older is None else older
        self._hub = hub
        self._places = places or Places(history.extent)
        self._undecided: deque[tuple[float, Connection]] = deque()
        self._begun = trio.lowlevel.ParkingLot()
        self.feeding = Feeding(history, hub, self._places, self._older, receipts, times)
        self.resumes: Counter[str] = Counter()  # by outcome

    def hold(self, connection: Connection, now: float) -> None:
        """Hold back durable events for a connection that has just joined, until it is decided."""
        state = connection.resume_state
        state.accepted_at = self._places.of(connection.principal.tenant, state.accepted_at)
        if state.resume_from is not None:
            self._hub.step(connection, Step.JOIN_RESUMING, state.accepted_at)
            self._seek(connection, Resume(state.resume_from))
        else:
            self._hub.step(connection, Step.JOIN, state.accepted_at)
            self._undecided.append((now + UNDECIDED, connection))
            self._begun.unpark_all()

    async def decide(self) -> None:
        """Let silent connections go live after a while; returns only when cancelled."""
        while True:
            while not self._undecided:
                await self._begun.park()
            await trio.sleep_until(self._undecided[0][0])
            together = trio.current_time() + _TOGETHER
            for _ in range(_PER_CHECKPOINT):
                if not self._undecided or self._undecided[0][0] > together:
                    break
                _, connection = self._undecided.popleft()
                if connection.resume_state.phase is Phase.HELD:
                    self.go_live(connection)

    def go_live(self, connection: Connection) -> None:
        """Send a connection that does not resume what came since it joined, and let it go live.

        While a stream of its tenant is being read for the first time, it stays held: what is sent
        from another one would be out of order.
        """
        if connection.ending:
            return
        connection.resume_state.is_decided = True
        if not self._places.is_known(connection.principal.tenant):
            return
        if connection.resume_state.cursor == self._end(connection):  # as mostly: nothing came
            self._hub.step(connection, Step.CATCH_UP)
            return
        if self._extent.forgot(self.feeding.cursor_of(connection)):
            connection.send(GAP)
            self._hub.step(connection, Step.GAP, self._past_forgotten(connection))
        if not self.feeding.try_catch_up(connection):
            self._hub.step(connection, Step.REPLAY)
            self.feeding.start(connection)

    def lag(self, connection: Connection) -> None:
        """Send a connection durable events from the history: too much waits in its outbox."""
        self.feeding.lag(connection)

    async def feed(self, connection: Connection) -> None:
        """Send a connection what comes next: its client has taken all that it was sent before."""
        await self.feeding.feed(connection)

    def _seek(self, connection: Connection, wish: Resume) -> None:
        """Look for the place to resume from, next to what the connection does meanwhile."""
        state = connection.resume_state
        if not state.is_sought:
            state.is_sought = True
            connection.start_task(self._resume, connection, wish)

    def begin(self, stream: Stream, ahead: float | None) -> None:
        """Tell that a stream has been read for the first time.

        Clients that connected earlier are sent what entered it since they joined, or a gap.
        ``ahead`` is a lower bound of Redis' unix time minus Trio's, None if it is unknown.
        """
        extent = self._extent
        for connection in list(self._hub.connections):
            if not self._places.concern(stream, connection.principal.tenant):
                continue
            since = None
            if ahead is not None:
                moment = connection.joined_at - _BEFORE
                if connection.resume_state.accepted_time is not None:
                    moment = connection.resume_state.accepted_time
                since = extent.position_at(stream, moment + ahead)
            if since is None:
                connection.send(GAP)
            elif since < extent.end[stream]:
                self._hold_back(connection, stream, since)

    def begun(self, stream: Stream) -> None:
        """Let connections go live that were held only because this stream was not read yet."""
        for connection in list(self._hub.held):
            state = connection.resume_state
            is_concerned = self._places.concern(stream, connection.principal.tenant)
            if is_concerned and state.phase is Phase.HELD and state.is_decided:
                self.go_live(connection)

    def _hold_back(self, connection: Connection, stream: Stream, since: Position) -> None:
        """Send a connection this stream from ``since`` on, before it is live in it."""
        state = connection.resume_state
        is_held = state.phase is Phase.HELD
        cursor = self._end(connection) if state.cursor is None else state.cursor
        state.accepted_at = {**(state.accepted_at or {}), stream: since}
        self._hub.step(connection, Step.OWE, {**cursor, stream: since})
        if not is_held:
            self.feeding.start(connection)

    def tell_of_gap(self, *streams: Stream) -> None:
        """Tell the clients of these streams once to refetch, because events of them were lost."""
        self.feeding.forget_shared()
        for connection in list(self._hub.connections):
            tenant = connection.principal.tenant
            if any(self._places.concern(stream, tenant) for stream in streams):
                if connection in self._hub.held:
                    end = connection.resume_state.accepted_at = self._end(connection)
                    self._hub.step(connection, Step.GAP, end)
                connection.send(GAP)

    def forget(self, stream: Stream) -> None:
        """Note that a stream without clients is not read any more."""
        self._older.forget(stream)

    def ask(self, connection: Connection, wish: Resume) -> None:
        """Answer a message that asks to resume: only a client's first may."""
        if connection.messages == 1 and connection.resume_state.may_resume:
            self._hub.step(connection, Step.ASK)
            self._seek(connection, wish)
        elif self._end(connection):
            self._refuse(connection)
        else:
            connection.start_task(self._refuse_when_read, connection)

    async def _refuse_when_read(self, connection: Connection) -> None:
        await self._wait_read(connection, trio.current_time())
        if not connection.ending:
            self._refuse(connection)

    async def _wait_read(self, connection: Connection, asked_at: float) -> None:
        """Wait for the streams that are being read for the first time, so that the answer to a
        client that is refused can name the present place.
        """
        with trio.move_on_at(asked_at + PATIENCE):
            await self._places.wait_begun(connection.principal.tenant)

    async def _resume(self, connection: Connection, wish: Resume) -> None:
        """Answer a client that asks to resume, and let it be replayed what it missed."""
        state = connection.resume_state
        was_live = state.phase is Phase.LIVE
        # What is not a string is an invalid id, too.
        last_event_id = "?" if wish.last_event_id is None else wish.last_event_id
        asked_at = trio.current_time()
        if (cursor := await self._find(connection, last_event_id)) is None:
            await self._wait_read(connection, asked_at)
        if connection.ending:
            return
        if cursor is None or (was_live and not self._in_order(connection)):
            if state.cursor is not None:  # it refetches its state: what is forgotten is not a loss
                self._hub.step(connection, Step.GAP, self._past_forgotten(connection))
            self._refuse(connection)
        else:
            self.resumes["recovered"] += 1
            # Streams that the id does not name are followed from where it was accepted.
            place = {**self._accepted_at(connection), **cursor}
            state.came_back_at = cursor if last_event_id else None
            self._hub.step(connection, Step.REPLAY, place)
            count = self._begin_replay(connection, self._older.behind(cursor))
            if not count:  # else the id that holds is the client's own, until theirs come
                end = self._end(connection)
                place = {**place, **{s: max(p, place.get(s, p)) for s, p in end.items()}}
            state.begun_at = place
            if self._receipts is not None and last_event_id and wish.confirms:
                for stream, position in cursor.items():
                    upto = Place(stream, position)
                    self._receipts.confirm_earlier(connection.principal, upto)
            connection.confirmed_id = cursor_id(place)
            connection.send(
                resumed(recovered=True, count=count, last_event_id=connection.confirmed_id)
            )
        state.is_sought = False
        self.feeding.start(connection)

    def _begin_replay(self, connection: Connection, behind: Cursor) -> int:
        """Let it read on from its cursor, in these streams from before the history; return how many
        events it missed.
        """
        connection.resume_state.older = frozenset(behind)
        older = self._older.missed(behind, connection.audiences)
        rest = {**self.feeding.cursor_of(connection), **self._older.ends(behind)}
        found = self._history.missed_in_any_order(rest, connection.audiences, again=True)
        return len(older) + len(self.feeding.undelivered(connection, found))

    def _refuse(self, connection: Connection) -> None:
        self.resumes["not_recovered"] += 1
        has_cursor = connection.resume_state.cursor is not None
        place = self.feeding.cursor_of(connection) if has_cursor else self._end(connection)
        connection.confirmed_id = cursor_id(place)
        connection.send(resumed(recovered=False, count=0, last_event_id=connection.confirmed_id))

    async def _find(self, connection: Connection, last_event_id: str) -> Cursor | None:
        """The cursor of this id, if everything after it is known."""
        try:
            cursor = read_cursor(last_event_id) if last_event_id else None
        except ValueError:
            return None
        tenant = connection.principal.tenant
        with trio.move_on_after(PATIENCE) as scope:
            if cursor is None:
                await self._places.wait_begun(tenant)
                cursor = self._accepted_at(connection)
            else:
                cursor = await self._places.after(cursor, tenant)
        if scope.cancelled_caught or cursor is None:
            return None
        known = self._extent.covers(cursor) or await self._older.find(cursor)
        if known and (not last_event_id or await self._older.name_entries(cursor)):
            await self._history.prepare(cursor, connection.audiences)
            # The history may have moved past it meanwhile.
            if self._older.covers(cursor) or await self._older.find(cursor):
                return cursor
        return None

    def _accepted_at(self, connection: Connection) -> Cursor:
        """From where on it misses nothing; for a stream that was read later, its begin."""
        accepted_at = connection.resume_state.accepted_at
        assert accepted_at is not None
        return {**self._places.of(connection.principal.tenant, self._extent.began), **accepted_at}

    def _end(self, connection: Connection) -> Cursor:
        """The present place in its streams."""
        return self._places.of(connection.principal.tenant)

    def _in_order(self, connection: Connection) -> bool:
        """Whether no durable event was sent live to it: then a replay is still in order."""
        accepted_at = self._accepted_at(connection)
        if self._extent.forgot(accepted_at):  # what was forgotten may have been sent to it
            return False
        return not self._history.following(accepted_at, connection.audiences, 1)

    def _past_forgotten(self, connection: Connection) -> Cursor:
        """Its cursor, or behind what the history has forgotten."""
        return self._extent.past_forgotten(self.feeding.cursor_of(connection))
