"""Resume: from the history to live events, with nothing lost or doubled at the seam.

A connection with a ``cursor`` hears no durable event live: what stands after that place reaches
it from the history. Dispatch adds a batch to the history and takes its snapshot of the members
in one synchronous step, and a connection gives up its cursor in one with finding that nothing
is left to replay. So each event reaches it in exactly one of the two ways.

Every connection begins so, for a moment: its first message may be a ``resume``, and live events
sent before that would come out of order. Any other first message decides, or half a second.
"""

from collections import Counter, deque
from typing import Final

import trio

from ..core.messages import resumed
from ..core.positions import Cursor, cursor_id, read_cursor
from .connection import Connection
from .history import History, Kept
from .hub import Hub

UNDECIDED: Final = 0.5  # seconds that a silent client may still ask to resume
PATIENCE: Final = 2.0  # seconds for us to read what another process has delivered already
_CHUNK_EVENTS: Final = 200
_CHUNK_BYTES: Final = 65_536


class Replays:
    """Lets connections begin where they left off."""

    def __init__(self, history: History, hub: Hub) -> None:
        self._history = history
        self._hub = hub
        self._undecided: deque[tuple[float, Connection]] = deque()
        self._begun = trio.Event()
        self.resumes: Counter[str] = Counter()  # by outcome
        self.replayed = 0  # events

    def hold(self, connection: Connection, now: float) -> None:
        """It has just joined: durable events wait in the history until it is decided."""
        connection.joined_at_cursor = self._history.end
        if connection.accepted_at is None:
            connection.accepted_at = self._history.end
        connection.cursor = connection.accepted_at
        self._hub.held.add(connection)
        if connection.resume_from is None:
            self._undecided.append((now + UNDECIDED, connection))
            self._begun.set()

    async def decide(self) -> None:
        """Let go live who has said nothing for a while; returns only when cancelled."""
        while True:
            while not self._undecided:
                self._begun = trio.Event()
                await self._begun.wait()
            until, connection = self._undecided[0]
            await trio.sleep_until(until)
            self._undecided.popleft()
            if not connection.resuming:
                self.go_live(connection)

    def go_live(self, connection: Connection) -> None:
        """It did not ask to resume: live from here, after what came since it joined."""
        if connection.cursor is None or connection.ending:
            return
        missed = self._missed(connection, connection.cursor)
        if len(missed) <= _CHUNK_EVENTS and not connection.waiting_bytes:
            self._write(connection, missed)
            self._let_go(connection)
        else:
            connection.resuming = True
            connection.start(self._catch_up, connection, missed)

    def ask(self, connection: Connection, last_event_id: str | None) -> None:
        """It asks to resume in a message: that must be its first."""
        if connection.messages == 1 and not connection.resuming:
            connection.resuming = True
            # What is no string names no place either.
            connection.start(
                self.resume, connection, "?" if last_event_id is None else last_event_id
            )
            return
        self.resumes["not_recovered"] += 1
        place = connection.cursor if connection.cursor is not None else self._history.end
        connection.send(resumed(recovered=False, count=0, last_event_id=cursor_id(place)))

    async def resume(self, connection: Connection, last_event_id: str) -> None:
        """Answer a client that asks to resume, replay, and let it go live."""
        connection.resuming = True
        history = self._history
        cursor = await self._find(last_event_id) if last_event_id else connection.accepted_at
        if cursor is None or not self._in_order(connection):
            self.resumes["not_recovered"] += 1
            place = connection.cursor if connection.cursor is not None else history.end
            connection.send(resumed(recovered=False, count=0, last_event_id=cursor_id(place)))
            if connection.cursor is not None:
                await self._catch_up(connection, self._missed(connection, connection.cursor))
            return
        self.resumes["recovered"] += 1
        connection.cursor = cursor
        self._hub.held.add(connection)
        missed = self._missed(connection, cursor)
        place = {**cursor, **{s: max(p, cursor.get(s, p)) for s, p in history.end.items()}}
        connection.send(resumed(recovered=True, count=len(missed), last_event_id=cursor_id(place)))
        await self._catch_up(connection, missed)

    async def _find(self, last_event_id: str) -> Cursor | None:
        """The place that the id names, if all that came after it is known."""
        try:
            cursor = read_cursor(last_event_id)
        except ValueError:
            return None
        with trio.move_on_after(PATIENCE) as scope:
            await self._history.wait_for(cursor)
        if scope.cancelled_caught or not self._history.covers(cursor):
            return None
        return cursor

    def _in_order(self, connection: Connection) -> bool:
        """Whether it was sent no durable event yet, which a replay would have to precede."""
        if connection.cursor is not None:
            return True
        assert connection.accepted_at is not None
        return not self._history.missed(connection.accepted_at, connection.audiences)

    def _missed(self, connection: Connection, cursor: Cursor) -> list[Kept]:
        """What it has to be sent, without what it was sent live as a Pub/Sub copy."""
        joined = connection.joined_at_cursor
        return [
            kept
            for kept in self._history.missed(cursor, connection.audiences)
            if not (kept.heard_before and joined.get(kept.stream, kept.position) < kept.position)
        ]

    async def _catch_up(self, connection: Connection, missed: list[Kept]) -> None:
        """Send what was missed, no faster than the client takes it, then what came meanwhile,
        until nothing is left.
        """
        while not connection.ending:
            while missed:
                chunk, missed = _first(missed)
                self._write(connection, chunk)
                await connection.wait_written()
                if connection.ending:
                    return
            assert connection.cursor is not None
            missed = self._missed(connection, connection.cursor)
            if not missed:
                self._let_go(connection)
                return

    def _write(self, connection: Connection, chunk: list[Kept]) -> None:
        if not chunk:
            return
        assert connection.cursor is not None
        places = {kept.stream: kept.position for kept in chunk}
        connection.cursor = {**connection.cursor, **places}
        data = b"".join([kept.frame for kept in chunk])
        connection.write(data, len(chunk), trio.current_time())
        self.replayed += len(chunk)

    def _let_go(self, connection: Connection) -> None:
        connection.cursor = None
        self._hub.held.discard(connection)


def _first(missed: list[Kept]) -> tuple[list[Kept], list[Kept]]:
    """A chunk to write at once, and the rest."""
    size = 0
    for n, kept in enumerate(missed[:_CHUNK_EVENTS], 1):
        size += len(kept.frame)
        if size >= _CHUNK_BYTES:
            return missed[:n], missed[n:]
    return missed[:_CHUNK_EVENTS], missed[_CHUNK_EVENTS:]
