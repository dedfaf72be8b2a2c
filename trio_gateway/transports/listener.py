"""Accept TCP connections in fewer steps than Trio's listener does."""

import socket as stdlib
import sys
from collections.abc import Callable
from typing import Any, Final

import hypercorn.trio.run
import trio

from .progress import enable_keepalive

_IN_A_ROW: Final = 8  # connections that are accepted without a checkpoint
# Whether the connections of a listening socket have its options.
_INHERITED: Final = sys.platform == "linux"

Listening = trio.abc.Listener[trio.SocketStream]


class Listener(Listening):
    """A ``trio.SocketListener`` that takes a crowd of clients a few at a time.

    ``write_timeout`` is for :func:`.progress.enable_keepalive`, which is applied to the listening
    socket where the connections inherit that: six system calls less for each.
    """

    def __init__(self, socket: trio.socket.SocketType, write_timeout: float) -> None:
        self._listener = trio.SocketListener(socket)
        self.socket = socket
        self._write_timeout = write_timeout
        if _INHERITED:
            enable_keepalive(socket, write_timeout)
        # The same socket once more, because Trio's needs a checkpoint for each connection.
        self._direct = stdlib.fromfd(socket.fileno(), socket.family, socket.type)
        self._direct.setblocking(False)
        self._in_a_row = 0

    async def accept(self) -> trio.SocketStream:
        if self._in_a_row < _IN_A_ROW:
            try:
                accepted, _ = self._direct.accept()
            except OSError:  # mostly nobody waits; Trio's listener knows which others to ignore
                pass
            else:
                self._in_a_row += 1
                return self._kept_alive(trio.SocketStream(trio.socket.from_stdlib_socket(accepted)))
        self._in_a_row = 0
        return self._kept_alive(await self._listener.accept())

    def _kept_alive(self, stream: trio.SocketStream) -> trio.SocketStream:
        if not _INHERITED:
            enable_keepalive(stream.socket, self._write_timeout)
        return stream

    async def aclose(self) -> None:
        self._direct.close()
        await self._listener.aclose()


class _Trio:
    """The ``trio`` module as Hypercorn sees it, with another ``SocketListener``."""

    def __init__(self, listener: Callable[[Any], Listening]) -> None:
        self.SocketListener = listener

    def __getattr__(self, name: str) -> Any:
        return getattr(trio, name)


def install(listener: Callable[[Any], Listening]) -> None:
    """Let Hypercorn's Trio worker make its listeners with this."""
    hypercorn.trio.run.trio = _Trio(listener)  # type: ignore[assignment,attr-defined]


def installed() -> Callable[[Any], Listening]:
    """What makes the listeners of Hypercorn's Trio worker now."""
    found: Callable[[Any], Listening] = hypercorn.trio.run.trio.SocketListener  # type: ignore[attr-defined]
    return found
