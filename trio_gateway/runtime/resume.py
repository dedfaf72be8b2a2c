"""Resume: send a connection the durable events that it missed, then let it go live.

:mod:`.resume_state` has the theory: the phases of a connection, and why nothing is lost or
doubled between the history and live events. Here is what moves a connection from one to the next.
"""

from collections import Counter, deque
from typing import Final

import trio

from ..core.event_ids import Cursor, Position, Stream, cursor_id, read_cursor
from ..core.messages import GAP, resumed
from .connection import Connection
from .history import History, StoredEvent
from .hub import Hub
from .resume_state import Phase, Step

UNDECIDED: Final = 0.5  # seconds that a silent client may still ask to resume
_TOGETHER: Final = 0.05  # seconds: whose time comes so soon is decided at once, in one wake-up
PATIENCE: Final = 2.0  # seconds for us to read what another process has delivered already
_PER_CHECKPOINT: Final = 50  # connections that go live at a time
_CHUNK_EVENTS: Final = 200
_BEFORE: Final = 1.0  # seconds that an entry's time may be behind: Redis looks it up now and then
_CHUNK_BYTES: Final = 65_536


class Replays:
    """Lets connections begin where they left off."""

    def __init__(self, history: History, hub: Hub) -> None:
        self._history = history
        self._hub = hub
        self._undecided: deque[tuple[float, Connection]] = deque()
        self._begun = trio.lowlevel.ParkingLot()
        self.resumes: Counter[str] = Counter()  # by outcome
        self.replayed = 0  # events

    def hold(self, connection: Connection, now: float) -> None:
        """Hold back durable events for a connection that has just joined, until it is decided."""
        state = connection.resume_state
        if state.accepted_at is None:
            state.accepted_at = self._history.end
        if state.resume_from is not None:
            self._hub.step(connection, Step.JOIN_RESUMING, state.accepted_at)
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
        """Send a connection that does not resume what came since it joined, and let it go live."""
        if connection.ending:
            return
        missed = self._missed(connection)
        if len(missed) <= _CHUNK_EVENTS and not connection.waiting_bytes:
            self._write(connection, missed)
            self._hub.step(connection, Step.CATCH_UP)
        else:
            self._hub.step(connection, Step.REPLAY)
            connection.start_task(self._catch_up, connection, [], {})

    def begin(self, stream: Stream, ahead: float | None) -> None:
        """Tell that a stream has been read for the first time.

        Clients that connected earlier are sent what entered it since they joined, or a gap.
        ``ahead`` is a lower bound of Redis' unix time minus Trio's, None if it is unknown.
        """
        history = self._history
        for connection in list(self._hub.connections):
            since = None
            if ahead is not None:
                since = history.position_at(stream, connection.joined_at + ahead - _BEFORE)
            if since is None:
                connection.send(GAP)
            elif since < history.end[stream]:
                self._hold_back(connection, stream, since)

    def _hold_back(self, connection: Connection, stream: Stream, since: Position) -> None:
        """Send a connection this stream from ``since`` on, before it is live in it."""
        state = connection.resume_state
        was_live = state.phase is Phase.LIVE
        cursor = self._history.end if state.cursor is None else state.cursor
        state.accepted_at = {**(state.accepted_at or {}), stream: since}
        self._hub.step(connection, Step.OWE, {**cursor, stream: since})
        if was_live:
            connection.start_task(self._catch_up, connection, [], {})

    def tell_of_gap(self) -> None:
        """Tell every client to refetch, because events were lost between Redis and this process."""
        for connection in list(self._hub.held):
            connection.resume_state.accepted_at = self._history.end
            self._hub.step(connection, Step.GAP, self._history.end)
        for connection in list(self._hub.connections):
            connection.send(GAP)

    def ask(self, connection: Connection, last_event_id: str | None) -> None:
        """Answer a message that asks to resume: only a client's first may."""
        if connection.messages == 1 and connection.resume_state.may_resume:
            self._hub.step(connection, Step.ASK)
            # What is not a string is an invalid id, too.
            connection.start_task(
                self.resume, connection, "?" if last_event_id is None else last_event_id
            )
            return
        self._refuse(connection)

    async def resume(self, connection: Connection, last_event_id: str) -> None:
        """Answer a client that asks to resume, replay what it missed, and let it go live."""
        history = self._history
        cursor = await self._find(connection, last_event_id)
        if connection.ending:
            return
        if cursor is None or not self._in_order(connection):
            self._refuse(connection)
            if connection.resume_state.cursor is not None:
                await self._catch_up(connection, self._missed(connection), history.end)
            return
        self.resumes["recovered"] += 1
        # Streams that the id does not name are followed from where it was accepted.
        place = {**self._accepted_at(connection), **cursor}
        self._hub.step(connection, Step.REPLAY, place)
        missed = self._missed(connection)
        if not missed:  # else the id that holds is the client's own, until theirs come
            place = {**place, **{s: max(p, place.get(s, p)) for s, p in history.end.items()}}
        connection.send(resumed(recovered=True, count=len(missed), last_event_id=cursor_id(place)))
        await self._catch_up(connection, missed, history.end)

    def _refuse(self, connection: Connection) -> None:
        self.resumes["not_recovered"] += 1
        began, cursor = self._history.began, connection.resume_state.cursor
        place = self._history.end if cursor is None else {**began, **cursor}
        connection.send(resumed(recovered=False, count=0, last_event_id=cursor_id(place)))

    async def _find(self, connection: Connection, last_event_id: str) -> Cursor | None:
        """The cursor of this id, if everything after it is known."""
        try:
            cursor = read_cursor(last_event_id) if last_event_id else None
        except ValueError:
            return None
        with trio.move_on_after(PATIENCE) as scope:
            await self._history.wait_begun()
            if cursor is not None:
                await self._history.wait_for(cursor)
        if scope.cancelled_caught:
            return None
        if cursor is None:
            cursor = self._accepted_at(connection)
        return cursor if self._history.covers(cursor) else None

    def _accepted_at(self, connection: Connection) -> Cursor:
        """From where on it misses nothing; for a stream that was read later, its begin."""
        accepted_at = connection.resume_state.accepted_at
        assert accepted_at is not None
        return {**self._history.began, **accepted_at}

    def _in_order(self, connection: Connection) -> bool:
        """Whether a replay is still in order: no durable event was sent to it live."""
        if connection.resume_state.cursor is not None:
            return True
        return not self._history.missed(self._accepted_at(connection), connection.audiences)

    def _missed(self, connection: Connection) -> list[StoredEvent]:
        """The events that it missed, without those of which it was sent a Pub/Sub copy live."""
        cursor = connection.resume_state.cursor
        assert cursor is not None
        cursor = {**self._history.began, **cursor}
        if self._history.forgot(cursor):  # while it was held: it read too slowly
            connection.send(GAP)
        return [
            kept
            for kept in self._history.missed(cursor, connection.audiences)
            if connection.number > kept.delivered_up_to
        ]

    async def _catch_up(
        self, connection: Connection, missed: list[StoredEvent], upto: Cursor
    ) -> None:
        """Send what was missed, which reaches up to ``upto``, no faster than the client takes it;
        then what came meanwhile, until nothing is left, and let it go live.
        """
        state = connection.resume_state
        while not connection.ending:
            cursor = state.cursor
            await connection.wait_written()
            if state.cursor is None:  # it has left meanwhile
                return
            if state.cursor is not cursor:  # told of a gap: what was before it is over
                missed, upto = self._missed(connection), self._history.end
            if missed:
                chunk, missed = _first(missed)
                self._write(connection, chunk)
                continue
            state.advance(upto)
            missed, upto = self._missed(connection), self._history.end
            if not missed:
                self._hub.step(connection, Step.CATCH_UP)
                return

    def _write(self, connection: Connection, chunk: list[StoredEvent]) -> None:
        connection.resume_state.advance({kept.stream: kept.position for kept in chunk})
        # It may have got other audiences since this was found.
        frames = [k.frame for k in chunk if not connection.audiences.isdisjoint(k.audiences)]
        if frames:
            connection.write(b"".join(frames), len(frames), trio.current_time())
            self.replayed += len(frames)


def _first(missed: list[StoredEvent]) -> tuple[list[StoredEvent], list[StoredEvent]]:
    """The first chunk to write at once, and the rest."""
    size = 0
    for n, kept in enumerate(missed[:_CHUNK_EVENTS], 1):
        size += len(kept.frame)
        if size >= _CHUNK_BYTES:
            return missed[:n], missed[n:]
    return missed[:_CHUNK_EVENTS], missed[_CHUNK_EVENTS:]
