"""A writer: writes what waits for one client, as fast as the client takes it."""

import math
from collections.abc import Awaitable, Callable
from typing import Final

import trio

from .outbox import Outbox
from .socket import Socket

_LOOKS: Final = 4  # checks of progress within one write timeout


class Writer:
    """Waits for one client with one cancel scope, by which it can be stopped.

    ``timeout`` is how long the client may take nothing, in seconds.
    """

    __slots__ = ("_scope", "_socket", "_timeout", "is_stopped")

    def __init__(self, socket: Socket, timeout: float) -> None:
        self._socket = socket
        self._timeout = timeout
        self._scope: trio.CancelScope | None = None
        self.is_stopped = False

    def stop(self) -> None:
        """Let what waits return at once."""
        self.is_stopped = True
        if self._scope is not None:
            self._scope.cancel()

    async def run(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do this, unless it is stopped."""
        with trio.CancelScope() as self._scope:
            await work()

    async def write_some(self, outbox: Outbox) -> None:
        """Wait until the client takes something. Raises :exc:`OSError` if it is gone, and of these
        :exc:`TimeoutError` if it takes nothing for the timeout.
        """
        socket = self._socket
        if socket.measures_progress:
            look = math.inf
        elif socket.is_plain:  # it may be long until there is room for more than was taken
            look = self._timeout / _LOOKS
        else:
            look = self._timeout
        acked, moved_at = self._acknowledged(), trio.current_time()
        while True:
            with trio.CancelScope(deadline=trio.current_time() + look) as self._scope:
                outbox.took(await socket.send_some(outbox.head))
                return
            if self.is_stopped:
                return
            if (now_acked := self._acknowledged()) != acked:
                acked, moved_at = now_acked, trio.current_time()
            elif trio.current_time() - moved_at >= self._timeout:
                raise TimeoutError

    def _acknowledged(self) -> int:
        """How many bytes the client has acknowledged, where that counts as progress; else 0."""
        return self._socket.traffic()[0] if self._socket.is_plain else 0
