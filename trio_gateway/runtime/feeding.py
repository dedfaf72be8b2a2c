"""Feeding: send a connection what the history holds for it, no faster than its client takes it.

A connection is fed while it is REPLAYING or LAGGING, see :mod:`.resume_state`: by its writer, chunk
by chunk, until nothing is left and it is LIVE. It costs a place in the history, and a writer task
that waits with one frame of it.
"""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Final, NamedTuple

import trio

from ..core.audiences import Audience
from ..core.close_codes import Close
from ..core.delivery_times import DeliveryTimes, Owed
from ..core.event_ids import Cursor, Position, Stream, before
from ..core.messages import GAP
from ..core.receipts import Place
from .connection import Connection
from .history import History, StoredEvent
from .hub import Hub
from .older_events import OlderEvents
from .places import Places
from .receipts import ReceiptLog
from .resume_state import Phase, Step

_CHUNK_EVENTS: Final = 200
_CHUNK_BYTES: Final = 65_536
_PER_CHECKPOINT: Final = 50  # connections that are looked at at a time
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


class Feeding:
    """Feeds connections from the history, and from the older events before it."""

    def __init__(
        self,
        history: History,
        hub: Hub,
        places: Places,
        older: OlderEvents,
        receipts: ReceiptLog | None = None,
        times: DeliveryTimes | None = None,
    ) -> None:
        self._history = history
        self._extent = history.extent
        self._hub = hub
        self._places = places
        self._older = older
        self._receipts = receipts
        self._times = times or DeliveryTimes()
        self._started = trio.lowlevel.ParkingLot()
        self.replayed = 0  # events
        self.lags = 0
        # Clients that began to lag in the same batch are at the same places one after the other.
        self._shared: dict[
            tuple[tuple[tuple[Stream, Position], ...], frozenset[Audience]], _Chunk
        ] = {}

    def lag(self, connection: Connection) -> None:
        """Send a connection durable events from the history: too much waits in its outbox."""
        state = connection.resume_state
        if connection.ending or state.phase is Phase.LAGGING:
            return
        self.lags += 1
        # All that dispatch has planned so far is in its outbox, or will be before its next batch.
        end = self._places.of(connection.principal.tenant) if state.cursor is None else None
        self._hub.step(connection, Step.LAG, end)
        self.start(connection)

    def start(self, connection: Connection) -> None:
        """Feed a connection, unless its phase says that it is not fed."""
        if connection.resume_state.is_fed:
            connection.start_writing()
            self._started.unpark_all()

    def try_catch_up(self, connection: Connection) -> bool:
        """Let a connection that was not fed yet go live in this step, if one chunk is enough.

        Returns whether it is live. If it is not, it is to be fed.
        """
        if connection.waiting_bytes:
            return False
        if not self._history.try_prepare(self.cursor_of(connection), connection.audiences):
            return False
        chunk = self._next_chunk(connection)
        if not self._send(connection, chunk) or not chunk.is_last:
            return False
        self._hub.step(connection, Step.CATCH_UP)
        return True

    def cursor_of(self, connection: Connection) -> Cursor:
        """The place up to which it has everything; for a stream that was read later, its begin."""
        cursor = connection.resume_state.cursor
        assert cursor is not None
        return {**self._places.of(connection.principal.tenant, self._extent.began), **cursor}

    def undelivered(
        self, connection: Connection, found: Iterable[StoredEvent]
    ) -> list[StoredEvent]:
        """Without those that it was sent live: a Pub/Sub copy, or before they were escalated."""
        number, state = connection.number, connection.resume_state
        skips_from = state.lagged_at if state.phase is Phase.LAGGING else math.inf
        return [
            stored
            for stored in found
            if not number <= stored.delivered_up_to < skips_from  # in a lag it skips the copy
            and not (stored.unless and self._has_original(connection, stored))
        ]

    def _has_original(self, connection: Connection, escalated: StoredEvent) -> bool:
        if escalated.unless.isdisjoint(connection.audiences):
            return False
        place = Place(escalated.stream, escalated.position)
        return self._receipts is None or not self._receipts.lacks(connection, place)

    async def feed(self, connection: Connection) -> None:
        """Send a connection what the history holds next for it; let it go live if that is all.

        Its writer calls this when the client has taken all that it was sent before.
        """
        state = connection.resume_state
        await self._history.prepare(self.cursor_of(connection), connection.audiences)
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
        return state.cursor is None or not self._extent.forgot(self.cursor_of(connection))

    def _behind(self, connection: Connection) -> Cursor:
        """The part of its cursor that is before the history."""
        state = connection.resume_state
        return {s: p for s, p in self.cursor_of(connection).items() if s in state.older}

    async def keep_ahead(self) -> None:
        """Keep the cursors of connections that wait for their clients where their next events are;
        returns only when cancelled.

        Else the events of others would be enough for the history to move past them.
        """
        while True:
            await trio.sleep(_LOOKS_EVERY)
            while not (fed := [each for each in self._hub.held if each.resume_state.is_fed]):
                self._shared.clear()
                await self._started.park()
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
        if self._extent.forgot(cursor := self.cursor_of(connection)):
            return
        if not (found := history.following(cursor, connection.audiences, 1, again=True)):
            state.advance(self._places.of(connection.principal.tenant))
            return
        next_one, milliseconds = found[0], found[0].position[0]
        others = before(Position((milliseconds, 0)))  # one of the same millisecond may follow
        for stream, end in self._places.of(connection.principal.tenant).items():
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
        cursor = self.cursor_of(connection)
        key = tuple(cursor.items()), audiences
        if (chunk := self._shared.get(key)) is not None:
            return chunk
        found = history.following(cursor, audiences, _CHUNK_EVENTS, again=True)
        most = _fitting(found)
        wanted = self.undelivered(connection, found[:most])
        if len(found) < most:
            return _chunk(wanted, self._places.of(connection.principal.tenant), is_last=True)
        upto = {stored.stream: stored.position for stored in found[:most]}
        chunk = _chunk(wanted, upto)
        # No event can come between those of a chunk that is full.
        if not any(stored.delivered_up_to or stored.unless for stored in found[:most]):
            if len(self._shared) >= _SHARED_CHUNKS:
                del self._shared[next(iter(self._shared))]
            self._shared[key] = chunk
        return chunk

    def forget_shared(self) -> None:
        """Read anew what was read for several connections: events were lost."""
        self._shared.clear()

    def _send(self, connection: Connection, chunk: _Chunk) -> bool:
        """Send what the client takes of a chunk, and move its cursor behind that; return whether it
        is all of it.
        """
        begun = 0
        if chunk.frames:
            begun = connection.write_stored(chunk.data, chunk.frames, trio.current_time())
            self.replayed += begun
            if self._receipts is not None and self._receipts.events.tracks:
                _note_receipts(self._receipts, connection, chunk.events[:begun])
            self._note_times(connection, chunk.events[:begun])
        is_all = begun == len(chunk.frames)
        places = chunk.upto if is_all else {e.stream: e.position for e in chunk.events[:begun]}
        connection.resume_state.advance(places)
        return is_all

    def _note_times(self, connection: Connection, events: Sequence[StoredEvent]) -> None:
        """Count as written, once its client has taken them, what entered Redis after it connected.

        What it missed before is no delay: nobody was there.
        """
        if not events:
            return
        since = self._times.redis_now(events[-1].stream, connection.joined_at)
        if events[-1].position[0] < since:  # as mostly when it resumes
            return
        places = [Place(each.stream, each.position) for each in events if each.position[0] >= since]
        owed = Owed(self._times, connection.principal.tenant, places)
        if connection.waiting_bytes:
            connection.owe(owed)
        else:
            owed.written(trio.current_time())


def _note_receipts(
    receipts: ReceiptLog, connection: Connection, events: Sequence[StoredEvent]
) -> None:
    """Note that a connection was sent these."""
    tracked = []
    for stored in [each for each in events if each.is_tracked]:
        if (found := receipts.events.find(Place(stored.stream, stored.position))) is not None:
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
