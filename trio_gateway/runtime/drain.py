"""The drain: stop receiving, deliver what was received, close every connection."""

import random
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import structlog
import trio

from ..core.close_codes import Close, format_retry_hint
from .hub import Hub
from .queue import EventQueue

log = structlog.get_logger()

PATIENCE: Final = 5.0  # seconds for all of it, where the server does not say
_FOR_QUEUES: Final = 0.4  # of it, for the queues; the rest is for the closes
_FOR_OTHERS: Final = 1.0  # seconds
_RECONNECTS_PER_SECOND: Final = 500  # that the retry hints spread clients to
_FIRST_WINDOW: Final = 2.0  # seconds; the window of a gateway with few clients


class Drain:
    """Ends a gateway, within ``patience`` seconds.

    1. Call ``stop``: no event comes in any more.
    2. Deliver the events in the queues.
    3. Close every connection, with a hint when to reconnect.
    4. Cut the connections that are left.

    Then ``tell_others``, which other processes may wait for, has :data:`_FOR_OTHERS` seconds.
    """

    def __init__(
        self,
        hub: Hub,
        queues: Sequence[EventQueue],
        stop: Callable[[], None],
        tell_others: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        self._hub = hub
        self._queues = queues
        self._stop = stop
        self._tell_others = tell_others
        self._done = trio.Event()
        self._window = _FIRST_WINDOW  # seconds over which the retry hints are spread
        self.begun = False
        self.patience = PATIENCE  # seconds: the server's graceful_timeout

    async def run(self, *, after_bug: bool = False) -> None:
        """Drain, or wait for the drain that is under way. Cancelled, it cuts what is left.

        After a bug the gateway's tasks have ended: nobody delivers what is queued or writes to
        Redis, so this only closes the connections.
        """
        if self.begun:
            await self._done.wait()
            return
        self.begun = True
        hub, started = self._hub, trio.current_time()
        clients = len(hub)
        self._window = max(_FIRST_WINDOW, clients / _RECONNECTS_PER_SECOND)
        self._stop()
        try:
            with trio.move_on_after(0 if after_bug else self.patience * _FOR_QUEUES):
                for queue in self._queues:
                    await queue.wait_idle()
            undelivered = sum(queue.undelivered for queue in self._queues)
            self._close_all()
            with trio.move_on_at(started + self.patience):
                await hub.wait_empty()
            log.info(
                "drained",
                clients=clients,
                aborted=len(hub.connections) + len(hub.leaving),
                undelivered=undelivered,
                seconds=round(trio.current_time() - started, 3),
            )
        finally:
            for connection in [*hub.connections, *hub.leaving]:
                connection.abort()
            try:
                if self._tell_others is not None and not after_bug:
                    with trio.move_on_after(_FOR_OTHERS):
                        await self._tell_others()
            finally:
                self._done.set()

    def hint(self, place: float | None = None) -> str:
        """When to reconnect, for a client at this place (0 to 1) of the window; None for any."""
        if place is None:
            place = random.random()  # noqa: S311 - spreads load
        return format_retry_hint(self._window * place)

    def _close_all(self) -> None:
        connections = list(self._hub.connections)
        random.shuffle(connections)
        for i, connection in enumerate(connections):
            place = (i + random.random()) / len(connections)  # noqa: S311 - spreads load
            connection.close(Close.GOING_AWAY, self.hint(place))
