"""Pauses: in a burst, a tenant's Pub/Sub events wait a moment until its clients have caught up."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Final

import trio

from ..core.audiences import TenantId
from ..core.limits import Allowance
from .connection import Connection
from .queue import EventQueue

# Seconds that a tenant may be paused, and how fast they grow back: however its clients read, its
# events are not delayed by more, and not for more than a tenth of the time.
MOST: Final = 2.0
_MOST_A_SECOND: Final = 0.1
# A client is waited for while it takes so many bytes in each window. A user, or a session, that
# does not has a few windows a minute.
_WINDOW: Final = 0.1
_HEALTHY: Final = 65_536
_IN_VAIN: Final = 0.3
_LOOKS_EVERY: Final = 0.002


class _Pause:
    """A tenant's pause: who is waited for, with what each had taken at the last look."""

    def __init__(self, connections: Sequence[Connection], now: float, left: float) -> None:
        self.began_at = self.looked_at = now
        self.ends_at = now + left
        self.taken = {connection: connection.taken for connection in connections}


class Pauses:
    """Pauses the tenants of a Pub/Sub queue whose clients fall behind in a burst.

    Events that are not durable are skipped for a client whose outbox is full. So when more than
    half of it is in use, its tenant's events stay in the queue until it is empty. The other tenants
    go on. When the queue is full, nothing is read from Redis.
    """

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._paused: dict[TenantId, _Pause] = {}
        self._allowed = Allowance(MOST, _MOST_A_SECOND)
        self._in_vain = Allowance(_IN_VAIN, _IN_VAIN / 60)

    async def wait(self) -> None:
        """Wait until an event can be taken from the queue; meanwhile end pauses that are over."""
        while self._paused:
            self._look(trio.current_time())
            with trio.move_on_after(_LOOKS_EVERY):
                await self._queue.wait()
                return
        await self._queue.wait()

    def note(self, behind: Sequence[Connection], now: float) -> None:
        """Tell which clients have not taken all of a batch that was just written to them."""
        found: defaultdict[TenantId, list[Connection]] = defaultdict(list)
        for connection in behind:
            who = connection.principal
            if connection.fills_fast(now) and self._in_vain.left(who.owner, now) > _WINDOW / 2:
                found[who.tenant].append(connection)
        for tenant, connections in found.items():
            if (left := self._allowed.left(tenant, now)) > 0:
                self._queue.pause(tenant)
                self._paused[tenant] = _Pause(connections, now, left)

    def _look(self, now: float) -> None:
        for tenant, pause in list(self._paused.items()):
            pause.taken = {each: taken for each, taken in pause.taken.items() if each.is_behind}
            if now - pause.looked_at >= _WINDOW:
                self._look_who_reads(pause, now)
            if not pause.taken or now >= pause.ends_at:
                del self._paused[tenant]
                self._allowed.use(tenant, now - pause.began_at, now)
                self._queue.unpause(tenant)

    def _look_who_reads(self, pause: _Pause, now: float) -> None:
        for connection, before in list(pause.taken.items()):
            pause.taken[connection] = connection.taken
            if connection.taken - before < _HEALTHY:
                self._in_vain.use(connection.principal.owner, now - pause.looked_at, now)
                del pause.taken[connection]
        pause.looked_at = now
