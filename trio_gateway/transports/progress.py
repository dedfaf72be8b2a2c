"""Progress: a write may go on for as long as the peer takes some of it within the timeout."""

import math
import os
import select
import socket
import sys
from contextlib import suppress
from struct import Struct
from typing import Any, Final

import trio

if sys.platform == "linux":
    import fcntl
    import termios

# Whether a socket can be written to by its descriptor; on Windows it cannot.
DIRECT: Final = sys.platform != "win32"
_LOOKS: Final = 4  # checks of progress within one timeout
# tcpi_bytes_acked in the kernel's struct tcp_info (Linux 4.1)
_TCP_INFO: Final = getattr(socket, "TCP_INFO", None) if sys.platform == "linux" else None
_BYTES_ACKED: Final = Struct("=120xQ")
_INT: Final = Struct("i")

_UNACKNOWLEDGED_AFTER: Final = 30.0  # seconds
# Seconds of silence before the first probe, seconds between two, number of probes. On macOS the
# first option has another name.
_KEEP_ALIVE: Final = (
    ("TCP_KEEPIDLE" if hasattr(socket, "TCP_KEEPIDLE") else "TCP_KEEPALIVE", 30),
    ("TCP_KEEPINTVL", 10),
    ("TCP_KEEPCNT", 3),
)


def acknowledged(sock: Any) -> int:
    """How many bytes the peer has acknowledged so far; 0 where the kernel does not tell.

    That a socket becomes writable is too coarse a sign of progress: the kernel reports it only when
    a third of a buffer of megabytes is free, for which a slow peer may need minutes.
    """
    if _TCP_INFO is not None:
        with suppress(OSError):
            info = sock.getsockopt(socket.IPPROTO_TCP, _TCP_INFO, _BYTES_ACKED.size)
            if len(info) == _BYTES_ACKED.size:
                return int(_BYTES_ACKED.unpack(info)[0])
    return 0


def outstanding(sock: Any) -> int:
    """How many written bytes the peer has yet to acknowledge; 0 if the kernel does not tell."""
    if _TCP_INFO is None or sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return 0
    try:
        return int(_INT.unpack(fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(_INT.size)))[0])
    except (OSError, ValueError):  # ValueError: closed
        return 0


def traffic(sock: Any) -> tuple[int, int]:
    """The bytes that the peer has acknowledged so far, and those that it has yet to."""
    return (0, 0) if sock is None else (acknowledged(sock), outstanding(sock))


def has_left(sock: Any) -> bool:
    """Whether the peer has ended its side of the connection; bytes before that may be unread.

    Without POLLRDHUP, which Linux has, only a reset is seen.
    """
    if not DIRECT or sock is None:
        return False
    if sock.fileno() == -1:
        return True
    poll = select.poll()
    poll.register(sock.fileno(), getattr(select, "POLLRDHUP", 0))  # errors are told in any case
    return bool(poll.poll(0))


async def wait_writable(sock: Any, timeout: float) -> None:
    """Wait until the socket can be written to.

    Raises :exc:`TimeoutError` if it cannot, and the peer acknowledges nothing, for ``timeout``
    seconds; :exc:`trio.ClosedResourceError` if it is closed.
    """
    acked, moved_at = acknowledged(sock), trio.current_time()
    while True:
        if sock.fileno() == -1:  # Trio would raise ValueError
            raise trio.ClosedResourceError("socket is closed")
        with trio.move_on_after(timeout / _LOOKS) as scope:
            await trio.lowlevel.wait_writable(sock)
        if not scope.cancelled_caught:
            return
        if (now_acked := acknowledged(sock)) != acked:
            acked, moved_at = now_acked, trio.current_time()
        elif trio.current_time() - moved_at >= timeout:
            raise TimeoutError("the peer takes nothing")


def enable_keepalive(sock: Any, write_timeout: float) -> None:
    """Let the kernel end a connection within a minute after its peer has vanished.

    It ends when sent data is not acknowledged for half a minute, or when keepalive probes of a
    silent connection are not answered. Both take longer than the write timeout, so that a client
    that is only slow is closed with the code for it.
    """
    if sock.family not in {socket.AF_INET, socket.AF_INET6}:
        return
    unacknowledged = int(max(_UNACKNOWLEDGED_AFTER, 1.5 * write_timeout) * 1000)
    with suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in (*_KEEP_ALIVE, ("TCP_USER_TIMEOUT", unacknowledged)):
            if (option := getattr(socket, name, None)) is not None:
                sock.setsockopt(socket.IPPROTO_TCP, option, value)


class ProgressStream(trio.abc.HalfCloseableStream):
    """A stream whose writes raise :exc:`TimeoutError` if the peer takes nothing for ``timeout``
    seconds.

    It may carry TLS, or be written to by Hypercorn: neither sees how much the peer takes.
    ``shield`` is a shielded scope around a write; the write lowers the shield when it has to wait.
    """

    def __init__(self, stream: trio.abc.HalfCloseableStream, timeout: float) -> None:
        self._stream = stream
        self._timeout = timeout
        self.shield: trio.CancelScope | None = None
        self.socket: Any = stream.socket if type(stream) is trio.SocketStream else None

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        sock = self.socket
        if not DIRECT or sock is None:
            self._lower_shield()
            for piece in _pieces(memoryview(data)):
                with trio.move_on_after(self._timeout) as scope:
                    await self._stream.send_all(piece)
                if scope.cancelled_caught:
                    raise TimeoutError("the peer takes nothing")
            return
        sent = 0
        while sent < len(data):
            if sock.fileno() == -1:
                raise trio.ClosedResourceError("socket is closed")
            try:
                sent += os.write(sock.fileno(), memoryview(data)[sent:])
            except BlockingIOError:
                self._lower_shield()
                await wait_writable(sock, self._timeout)
            except OSError as error:
                raise trio.BrokenResourceError("socket is broken") from error
        await (
            trio.lowlevel.cancel_shielded_checkpoint()
        )  # all is sent, so cancelling comes too late

    def _lower_shield(self) -> None:
        if self.shield is not None:
            self.shield.shield, self.shield.deadline = False, math.inf

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return bytes(await self._stream.receive_some(max_bytes))

    async def aclose(self) -> None:
        await self._stream.aclose()


_PIECE: Final = 4096  # bytes


def _pieces(data: memoryview) -> list[memoryview]:
    return [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]
