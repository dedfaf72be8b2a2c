"""Pauses: in a burst, a tenant's Pub/Sub events wait a moment until its clients have caught up."""

import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Final, NamedTuple

import trio

from ..core.audiences import TenantId
from ..core.limits import Allowance
from .connection import Connection
from .queue import EventQueue

# Seconds that a tenant may be paused, and how fast they grow back: however its clients read, its
# events are not delayed by more, and not for more than a tenth of the time.
MOST: Final = 2.0
_MOST_A_SECOND: Final = 0.1
# A client is waited for while it takes _HEALTHY bytes again and again. Between two times it may
# take nothing for as long as a busy machine may leave it without a core. A user, or a session, that
# takes nothing is waited for _IN_VAIN seconds a minute at most.
_HEALTHY: Final = 65_536
_IN_VAIN: Final = 0.25
_WORTH_WAITING: Final = 0.05
_LOOKS_EVERY: Final = 0.002
_LOOKS_WHO_READS_EVERY: Final = 0.05


class _Waited(NamedTuple):
    """A client that is waited for: what it had taken, and when, when it last took enough."""

    taken: int
    since: float
    patience: float


class _Pause:
    """A tenant's pause, and who is waited for. Times are those of :class:`_RunTime`."""

    def __init__(self, began_at: float, ends_at: float) -> None:
        self.began_at = self.looked_at = began_at
        self.ends_at = ends_at
        self.clients: dict[Connection, _Waited] = {}


class _RunTime:
    """A clock that stands still while the machine lets this process wait for a core.

    In that time clients cannot be sent anything, so it says nothing about them.
    """

    def __init__(self) -> None:
        self._seconds = self._looked_at = self._worked = 0.0

    def read(self, now: float) -> float:
        """Seconds so far, if it is read every :data:`_LOOKS_EVERY`."""
        worked = time.thread_time()
        ran = 2 * _LOOKS_EVERY + worked - self._worked  # it slept, and it worked
        self._seconds += min(now - self._looked_at, ran)
        self._looked_at, self._worked = now, worked
        return self._seconds


class Pauses:
    """Pauses the tenants of a Pub/Sub queue whose clients fall behind in a burst.

    Events that are not durable are skipped for a client whose outbox is full. So when more than
    half of it is in use, its tenant's events stay in the queue until it is empty. The other tenants
    go on. When the queue is full, nothing is read from Redis.
    """

    def __init__(self, queue: EventQueue) -> None:
        self._queue = queue
        self._paused: dict[TenantId, _Pause] = {}
        self._run_time = _RunTime()
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
        found: defaultdict[TenantId, dict[Connection, float]] = defaultdict(dict)
        for connection in behind:
            who = connection.principal
            if connection.fills_fast(now):
                patience = self._in_vain.left(who.owner, now)
                if patience > _WORTH_WAITING:
                    found[who.tenant][connection] = patience
        for tenant, connections in found.items():
            if (left := self._allowed.left(tenant, now)) > 0:
                self._queue.pause(tenant)
                ran = self._run_time.read(now)
                pause = self._paused[tenant] = _Pause(ran, ran + left)
                for connection, patience in connections.items():
                    pause.clients[connection] = _Waited(connection.taken, ran, patience)

    def _look(self, now: float) -> None:
        ran = self._run_time.read(now)
        for tenant, pause in list(self._paused.items()):
            for connection in [each for each in pause.clients if not each.is_behind]:
                del pause.clients[connection]
            if ran - pause.looked_at >= _LOOKS_WHO_READS_EVERY:
                pause.looked_at = ran
                self._look_who_reads(pause, ran, now)
            if not pause.clients or ran >= pause.ends_at:
                del self._paused[tenant]
                self._allowed.use(tenant, ran - pause.began_at, now)
                self._queue.unpause(tenant)

    def _look_who_reads(self, pause: _Pause, ran: float, now: float) -> None:
        for connection, (before, since, patience) in list(pause.clients.items()):
            if (taken := connection.taken) - before >= _HEALTHY:
                pause.clients[connection] = _Waited(taken, ran, patience)
            elif ran - since >= patience:
                self._in_vain.use(connection.principal.owner, ran - since, now)
                del pause.clients[connection]
