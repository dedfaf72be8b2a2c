"""Resume and lag: send a connection durable events from the history, then let it go live.

:mod:`.resume_state` has the theory: the phases of a connection, and why nothing is lost or
doubled between the history and live events. Here is what moves a connection from one to the next.
A connection costs a place in the history, and a writer task that waits with one frame of it.
"""

import math
from collections import Counter, deque
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import trio

from ..core.audiences import Audience
from ..core.close_codes import Close
from ..core.event_ids import Cursor, Position, Stream, before, cursor_id, read_cursor
from ..core.messages import GAP, Resume, resumed
from ..core.receipts import Place
from .connection import Connection
from .history import History, StoredEvent
from .hub import Hub
from .older_events import OlderEvents
from .places import Places
from .receipts import ReceiptLog
from .resume_state import Phase, Step

UNDECIDED: Final = 0.5  # seconds that a silent client may still ask to resume
_TOGETHER: Final = 0.05  # seconds: whose time comes so soon is decided at once, in one wake-up
PATIENCE: Final = 2.0  # seconds for us to read what another process has delivered already
_PER_CHECKPOINT: Final = 50  # connections that go live at a time
_CHUNK_EVENTS: Final = 200
_BEFORE: Final = 1.0  # seconds that an entry's time may be behind: Redis looks it up now and then
_CHUNK_BYTES: Final = 65_536
_LOOKS_EVERY: Final = 1.0  # seconds between two looks whether what comes next is still far
_SHARED_CHUNKS: Final = 32  # that are kept for other connections at the same place
_PASSED_BY: Final = "too slow: the history has moved past it"


class _Chunk(NamedTuple):
    """What a connection is sent at once."""

    events: Sequence[StoredEvent]
    frames: Sequence[bytes]  # theirs
    data: bytes  # all of them, joined
    upto: Cursor  # its cursor when it has that
    is_last: bool = False  # nothing follows in the history


class Replays:
    """Lets connections begin where they left off."""

    def __init__(
        self,
        history: History,
        hub: Hub,
        places: Places | None = None,
        older: OlderEvents | None = None,
        receipts: ReceiptLog | None = None,
    ) -> None:
        self._receipts = receipts
        self._history = history
        self._older = OlderEvents(history) if older is None else older
        self._hub = hub
        self._places = places or Places(history)
        self._undecided: deque[tuple[float, Connection]] = deque()
        self._begun = trio.lowlevel.ParkingLot()
        self._feeding = trio.lowlevel.ParkingLot()
        self.resumes: Counter[str] = Counter()  # by outcome
        self.replayed = 0  # events
        self.lags = 0
        # Clients that began to lag in the same batch are at the same places one after the other.
        self._shared: dict[
            tuple[tuple[tuple[Stream, Position], ...], frozenset[Audience]], _Chunk
        ] = {}

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
        if self._history.forgot(self._cursor(connection)):
            connection.send(GAP)
            self._hub.step(connection, Step.GAP, self._past_forgotten(connection))
        cursor, audiences = self._cursor(connection), connection.audiences
        if not connection.waiting_bytes and self._history.try_prepare(cursor, audiences):
            chunk = self._next_chunk(connection)
            if self._send(connection, chunk) and chunk.is_last:
                self._hub.step(connection, Step.CATCH_UP)
                return
        self._hub.step(connection, Step.REPLAY)
        self._start_feeding(connection)

    def lag(self, connection: Connection) -> None:
        """Send a connection durable events from the history: too much waits in its outbox."""
        state = connection.resume_state
        if connection.ending or state.phase is Phase.LAGGING:
            return
        self.lags += 1
        # All that dispatch has planned so far is in its outbox, or will be before its next batch.
        self._hub.step(
            connection, Step.LAG, self._end(connection) if state.cursor is None else None
        )
        self._start_feeding(connection)

    def _start_feeding(self, connection: Connection) -> None:
        if connection.resume_state.is_fed:
            connection.start_writing()
            self._feeding.unpark_all()

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
        history = self._history
        for connection in list(self._hub.connections):
            if not self._places.concern(stream, connection.principal.tenant):
                continue
            since = None
            if ahead is not None:
                moment = connection.joined_at - _BEFORE
                if connection.resume_state.accepted_time is not None:
                    moment = connection.resume_state.accepted_time
                since = history.position_at(stream, moment + ahead)
            if since is None:
                connection.send(GAP)
            elif since < history.end[stream]:
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
            self._start_feeding(connection)

    def tell_of_gap(self, *streams: Stream) -> None:
        """Tell the clients of these streams once to refetch, because events of them were lost."""
        self._shared.clear()
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
            return
        self._refuse(connection)

    async def _resume(self, connection: Connection, wish: Resume) -> None:
        """Answer a client that asks to resume, and let it be replayed what it missed."""
        state = connection.resume_state
        was_live = state.phase is Phase.LIVE
        # What is not a string is an invalid id, too.
        last_event_id = "?" if wish.last_event_id is None else wish.last_event_id
        cursor = await self._find(connection, last_event_id)
        if connection.ending:
            return
        if cursor is None or (was_live and not self._in_order(connection)):
            if state.cursor is not None:  # it refetches its state: what is forgotten is no loss
                self._hub.step(connection, Step.GAP, self._past_forgotten(connection))
            self._refuse(connection)
        else:
            self.resumes["recovered"] += 1
            # Streams that the id does not name are followed from where it was accepted.
            place = {**self._accepted_at(connection), **cursor}
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
        self._start_feeding(connection)

    def _begin_replay(self, connection: Connection, behind: Cursor) -> int:
        """Let it read on from its cursor, in these streams from before the history; return how many
        events it missed.
        """
        connection.resume_state.older = frozenset(behind)
        older = self._older.missed(behind, connection.audiences)
        rest = {**self._cursor(connection), **self._older.ends(behind)}
        found = self._history.missed_in_any_order(rest, connection.audiences)
        return len(older) + len(self._undelivered(connection, found))

    def _refuse(self, connection: Connection) -> None:
        self.resumes["not_recovered"] += 1
        has_cursor = connection.resume_state.cursor is not None
        place = self._cursor(connection) if has_cursor else self._end(connection)
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
        known = self._history.covers(cursor) or await self._older.find(cursor)
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
        return {**self._began(connection), **accepted_at}

    def _began(self, connection: Connection) -> Cursor:
        """Where each of its streams was first read live."""
        return self._places.of(connection.principal.tenant, self._history.began)

    def _end(self, connection: Connection) -> Cursor:
        """The present place in its streams."""
        return self._places.of(connection.principal.tenant)

    def _in_order(self, connection: Connection) -> bool:
        """Whether no durable event was sent live to it: then a replay is still in order."""
        accepted_at = self._accepted_at(connection)
        if self._history.forgot(accepted_at):  # what was forgotten may have been sent to it
            return False
        return not self._history.following(accepted_at, connection.audiences, 1)

    def _cursor(self, connection: Connection) -> Cursor:
        """The place up to which it has everything; for a stream that was read later, its begin."""
        cursor = connection.resume_state.cursor
        assert cursor is not None
        return {**self._began(connection), **cursor}

    def _past_forgotten(self, connection: Connection) -> Cursor:
        """Its cursor, or behind what the history has forgotten."""
        return self._history.past_forgotten(self._cursor(connection))

    def _undelivered(
        self, connection: Connection, found: Iterable[StoredEvent]
    ) -> list[StoredEvent]:
        """Without those of which it was sent a Pub/Sub copy live."""
        number, state = connection.number, connection.resume_state
        skips_from = state.lagged_at if state.phase is Phase.LAGGING else math.inf
        return [
            stored
            for stored in found
            if not number <= stored.delivered_up_to < skips_from  # in a lag it skips the copy
        ]

    async def feed(self, connection: Connection) -> None:
        """Send a connection what the history holds next for it; let it go live if that is all.

        Its writer calls this when the client has taken all that it was sent before.
        """
        state = connection.resume_state
        await self._history.prepare(self._cursor(connection), connection.audiences)
        if not await self._is_known(connection):
            connection.close(Close.SLOW_CONSUMER, _PASSED_BY)
        elif state.is_fed and not connection.waiting_bytes:  # still
            chunk = self._next_chunk(connection)
            if self._send(connection, chunk) and chunk.is_last and not connection.waiting_bytes:
                self._catch_up(connection)
        await trio.lowlevel.checkpoint()

    def _catch_up(self, connection: Connection) -> None:
        state = connection.resume_state
        self._hub.step(connection, Step.CATCH_UP)
        if state.has_skipped:
            state.has_skipped = False
            connection.send(GAP)

    async def _is_known(self, connection: Connection) -> bool:
        """Whether what comes after its cursor is known, also if it has left meanwhile."""
        state = connection.resume_state
        while state.older:
            behind = self._behind(connection)
            if self._older.covers(behind):
                return True
            # Before it came to the end of the older events, the history has moved past that.
            if not await self._older.find(behind) and state.older:
                return False
        return state.cursor is None or not self._history.forgot(self._cursor(connection))

    def _behind(self, connection: Connection) -> Cursor:
        """The part of its cursor that is before the history."""
        state = connection.resume_state
        return {s: p for s, p in self._cursor(connection).items() if s in state.older}

    async def keep_ahead(self) -> None:
        """Keep the cursors of connections that wait for their clients where their next events are;
        returns only when cancelled.

        Else the events of others would be enough for the history to move past them.
        """
        while True:
            await trio.sleep(_LOOKS_EVERY)
            while not (fed := [each for each in self._hub.held if each.resume_state.is_fed]):
                self._shared.clear()
                await self._feeding.park()
            for n, connection in enumerate(fed, 1):
                if connection.waiting_bytes and connection.resume_state.is_fed:
                    self._skip_ahead(connection)
                if n % _PER_CHECKPOINT == 0:
                    await trio.lowlevel.checkpoint()

    def _skip_ahead(self, connection: Connection) -> None:
        """Move its cursor to its next event, past those that are for others."""
        state, history = connection.resume_state, self._history
        if state.cursor is None or state.older:
            return
        if history.forgot(cursor := self._cursor(connection)):
            return
        if not (found := history.following(cursor, connection.audiences, 1)):
            state.advance(self._end(connection))
            return
        next_one, milliseconds = found[0], found[0].position[0]
        others = before(Position((milliseconds, 0)))  # one of the same millisecond may follow
        for stream, end in self._end(connection).items():
            limit = before(next_one.position) if stream == next_one.stream else others
            if (position := min(limit, end)) > cursor.get(stream, position):
                state.advance({stream: position})

    def _next_chunk(self, connection: Connection) -> _Chunk:
        """What to send it next. Connections at the same place with the same audiences share it."""
        state, history, audiences = connection.resume_state, self._history, connection.audiences
        if state.older:
            behind = self._behind(connection)
            found = self._older.following(behind, audiences, _CHUNK_EVENTS)
            if not found:
                state.older = frozenset()
                return _chunk((), self._older.ends(behind))
            return _chunk(found[: _fitting(found)])
        cursor = self._cursor(connection)
        key = tuple(cursor.items()), audiences
        if (chunk := self._shared.get(key)) is not None:
            return chunk
        found = history.following(cursor, audiences, _CHUNK_EVENTS)
        most = _fitting(found)
        wanted = self._undelivered(connection, found[:most])
        if len(found) < most:
            return _chunk(wanted, self._end(connection), is_last=True)
        upto = {stored.stream: stored.position for stored in found[:most]}
        chunk = _chunk(wanted, upto)
        # No event can come between those of a chunk that is full.
        if not any(stored.delivered_up_to for stored in found[:most]):
            if len(self._shared) >= _SHARED_CHUNKS:
                del self._shared[next(iter(self._shared))]
            self._shared[key] = chunk
        return chunk

    def _send(self, connection: Connection, chunk: _Chunk) -> bool:
        """Send what the client takes of a chunk, and move its cursor behind that; return whether it
        is all of it.
        """
        begun = 0
        if chunk.frames:
            begun = connection.write_stored(chunk.data, chunk.frames, trio.current_time())
            self.replayed += begun
            if self._receipts is not None and self._receipts.tracks:
                _note_receipts(self._receipts, connection, chunk.events[:begun])
        is_all = begun == len(chunk.frames)
        places = chunk.upto if is_all else {e.stream: e.position for e in chunk.events[:begun]}
        connection.resume_state.advance(places)
        return is_all


def _note_receipts(
    receipts: ReceiptLog, connection: Connection, events: Sequence[StoredEvent]
) -> None:
    """Note that a connection was sent these."""
    tracked = []
    for stored in [each for each in events if each.is_tracked]:
        if (found := receipts.find(Place(stored.stream, stored.position))) is not None:
            if found.position == found.tracked.place.position:
                found.tracked.stand_in(stored.audiences)
            tracked.append(found)
    if tracked:
        receipts.sent(connection, tracked, waits=connection.waiting_bytes > 0)


def _fitting(found: Sequence[StoredEvent]) -> int:
    """How many of these make a chunk; more than there are if they do not fill one."""
    sizes = accumulate(len(stored.frame) for stored in found)
    return next((n for n, size in enumerate(sizes, 1) if size >= _CHUNK_BYTES), _CHUNK_EVENTS)


def _chunk(
    events: Sequence[StoredEvent], upto: Cursor | None = None, *, is_last: bool = False
) -> _Chunk:
    frames = [stored.frame for stored in events]
    if upto is None:
        upto = {stored.stream: stored.position for stored in events}
    return _Chunk(events, frames, b"".join(frames), upto, is_last)
