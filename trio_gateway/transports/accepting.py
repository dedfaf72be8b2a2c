"""Balance new connections among worker processes that accept on the same listener.

The kernel wakes every worker for a new connection, and the first to accept gets it: mostly the same
worker. Here each worker publishes its number of clients in shared memory. A worker with more
clients than another one leaves the next connection to it for a moment. A worker that is full or
not ready leaves it to the others for longer, as long as one of them has room.
"""

import mmap
import os
import struct
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final, NamedTuple, NoReturn, cast

import trio

from . import listener

# A published load: when (monotonic seconds; 0 is never), clients, max_clients.
_ENTRY: Final = struct.Struct("=ddd")
_PUBLISH_INTERVAL: Final = 0.1  # seconds, while the load changes
_IDLE_INTERVAL: Final = 0.8  # seconds at most, while it does not
_STALE_AFTER: Final = 2.0  # seconds; then the worker that published it is stuck or dead
_POLL_INTERVAL: Final = 0.002  # seconds between two looks at whether another worker has accepted
_DELAY: Final = 0.05  # seconds that a worker with fewer clients has to accept
_PAUSE: Final = 0.05  # seconds without such delays after one in which no other worker accepted
_DELAY_IF_FULL: Final = 2.0  # seconds that a worker with room has to accept, if this one has none


class Load(NamedTuple):
    """How many clients a worker has, connecting ones included, and how many it may have."""

    clients: float
    max_clients: float

    @property
    def full(self) -> bool:
        """Whether it has no room for another client."""
        return self.clients >= self.max_clients


def accept_delay(own: Load, others: Sequence[Load]) -> float:
    """Seconds for which a worker leaves a new connection to the others.

    A difference of up to four clients, or of two per cent, does not count.
    """
    with_room = [other for other in others if not other.full]
    if own.full and with_room:
        return _DELAY_IF_FULL
    tolerated = own.clients - max(4.0, own.clients * 0.02)
    return _DELAY if any(other.clients < tolerated for other in with_room) else 0.0


class WorkerLoads:
    """The loads of a supervisor's workers, in memory that they share; each has a slot in it."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor
        self._memory = mmap.mmap(descriptor, 0)

    @classmethod
    def create(cls, slots: int) -> "WorkerLoads":
        """Make the memory, with empty slots. Raises :exc:`OSError`."""
        if hasattr(os, "memfd_create"):
            descriptor = os.memfd_create("trio-gateway-loads")
        else:  # not Linux
            with tempfile.TemporaryFile() as file:
                descriptor = os.dup(file.fileno())
        os.ftruncate(descriptor, slots * _ENTRY.size)
        return cls(descriptor)

    def publish(self, slot: int, load: Load) -> None:
        """Write a worker's load, with the present time."""
        _ENTRY.pack_into(self._memory, slot * _ENTRY.size, time.monotonic(), *load)

    def clear(self, slot: int) -> None:
        """Empty a slot: its worker accepts no more connections."""
        _ENTRY.pack_into(self._memory, slot * _ENTRY.size, 0.0, 0.0, 0.0)

    def others(self, slot: int) -> list[Load]:
        """The loads in all other slots, without the stale ones."""
        since = time.monotonic() - _STALE_AFTER
        return [
            Load(clients, max_clients)
            for at, (when, clients, max_clients) in enumerate(_ENTRY.iter_unpack(self._memory))
            if at != slot and when > since
        ]


class AcceptBalancer:
    """Balances one worker with the others.

    ``load`` returns its own load, or None if it accepts no more connections.
    """

    def __init__(self, loads: WorkerLoads, slot: int, load: Callable[[], Load | None]) -> None:
        self._loads = loads
        self._slot = slot
        self._load = load

    def delay(self) -> float:
        """Publish the own load; returns :func:`accept_delay` with the loads of the others."""
        return accept_delay(self._publish() or Load(0, 0), self._loads.others(self._slot))

    async def keep_published(self) -> NoReturn:
        """Publish the load at intervals; returns only when cancelled, and then clears the slot."""
        before, pause = None, _PUBLISH_INTERVAL
        try:
            while True:
                load = self._publish()
                pause = min(2 * pause, _IDLE_INTERVAL) if load == before else _PUBLISH_INTERVAL
                before = load
                await trio.sleep(pause)
        finally:
            self._loads.clear(self._slot)

    def _publish(self) -> Load | None:
        load = self._load()
        if load is None:
            self._loads.clear(self._slot)
        else:
            self._loads.publish(self._slot, load)
        return load

    def install(self) -> None:
        """Let Hypercorn's Trio worker accept through this balancer."""
        listener.install(partial(_Listener, self, listener.installed()))


class _Listener(listener.Listening):
    """A listener that leaves connections to other workers as the balancer says."""

    def __init__(
        self,
        balancer: AcceptBalancer,
        listen: Callable[[Any], listener.Listening],
        socket: trio.socket.SocketType,
    ) -> None:
        self._balancer = balancer
        self._listener = listen(socket)
        self._paused_until = 0.0
        self.socket = socket

    async def accept(self) -> trio.SocketStream:
        waiting_since: float | None = None
        while True:
            await trio.lowlevel.wait_readable(cast("Any", self.socket))
            now, delay = trio.current_time(), self._balancer.delay()
            if delay == _DELAY and now < self._paused_until:
                delay = 0.0
            if waiting_since is None:
                waiting_since = now
            if now < waiting_since + delay:
                await trio.sleep(_POLL_INTERVAL)
                if not self.socket.is_readable():  # another worker accepted it
                    waiting_since = None
                continue
            if delay:
                self._paused_until = now + _PAUSE
            # Another worker may still be quicker; then this one must not wait here for the next.
            with trio.move_on_after(_POLL_INTERVAL):
                return await self._listener.accept()
            waiting_since = None

    async def aclose(self) -> None:
        await self._listener.aclose()
