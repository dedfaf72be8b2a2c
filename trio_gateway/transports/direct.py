"""The direct transport: a WebSocket on a Trio stream, with few steps between it and the kernel."""

import os
import select
import socket as stdlib
import struct
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Final

import trio
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.events import Ping as PingFrame
from wsproto.events import Pong as PongFrame
from wsproto.extensions import Extension, PerMessageDeflate

from ..core.client_frames import is_closing, short_frame
from ..core.close_codes import Close
from ..core.frames import CLOSE, PING, PONG, close_frame, frame
from ..runtime.socket import LINGER, Disconnected, Ping, Pong, ProtocolViolation
from .hypercorn_bounds import MOST_FRAGMENTS
from .progress import DIRECT, ProgressStream, has_left, traffic

_RESETS: Final = struct.pack("ii", 1, 0)  # with SO_LINGER, a close resets at once
CHUNK: Final = 65_536
# Bytes of frames that are read at a time: a frame may have seven, and other clients wait meanwhile.
_FRAMES_CHUNK: Final = 4096
STREAM_ERRORS: Final = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)


async def receive(stream: trio.abc.Stream, size: int) -> bytes:
    """Receive up to ``size`` bytes; none at the end of the stream.

    Raises :exc:`OSError` or one of :data:`STREAM_ERRORS`. A plain socket is read directly, which
    is cheaper than through the stream.
    """
    if not DIRECT or type(stream) is not trio.SocketStream:
        return bytes(await stream.receive_some(size))
    while not is_closed(stream):
        await trio.lowlevel.wait_readable(stream.socket)
        if (data := receive_nowait(stream, size)) is not None:
            return data
    raise trio.ClosedResourceError("socket is closed")


def receive_nowait(stream: trio.abc.Stream, size: int) -> bytes | None:
    """As :func:`receive`, but return None if it would have to wait, or if this is not known."""
    if not DIRECT or type(stream) is not trio.SocketStream:
        return None
    # Ask for the descriptor each time: it is -1 once closed, and a new client gets the old number.
    if (descriptor := stream.socket.fileno()) == -1:
        return None
    try:
        return os.read(descriptor, size)
    except BlockingIOError:
        return None


async def linger(stream: trio.abc.Stream, most: float = LINGER) -> None:
    """Send an end, and read on until the peer ends too, sends nothing for a second, or ``most``
    seconds have passed.

    Closing a socket with unread data resets it, and what was sent last is lost.
    """
    with trio.move_on_after(most):
        try:
            if (send_eof := getattr(stream, "send_eof", None)) is not None:  # not with TLS
                await send_eof()
            while True:
                with trio.fail_after(LINGER):
                    if not await stream.receive_some(CHUNK):
                        return
        except (*STREAM_ERRORS, trio.TooSlowError):
            pass


def is_readable(sock: Any) -> bool:
    """Whether a read would not wait: there is a byte, or the end."""
    if not DIRECT:
        return False
    poll = select.poll()
    poll.register(sock.fileno(), select.POLLIN)
    return bool(poll.poll(0))


def is_closed(stream: trio.abc.Stream) -> bool:
    """Whether it is a plain socket that is closed already; closing one again is not cheap."""
    return isinstance(stream, trio.SocketStream) and stream.socket.fileno() == -1


def reset(stream: trio.abc.Stream) -> None:
    """Reset the connection at once, below TLS if there is any.

    After an ordinary close, the kernel would keep unsent data for minutes for a peer that takes
    nothing, and the peer would not learn of the end.
    """
    socket = socket_of(stream)
    if socket is not None and socket.fileno() != -1:
        with suppress(OSError):
            socket.setsockopt(stdlib.SOL_SOCKET, stdlib.SO_LINGER, _RESETS)
        socket.close()


def socket_of(stream: trio.abc.Stream) -> Any:
    """The socket that carries a stream, below TLS if there is any; None if it has no socket."""
    return getattr(getattr(stream, "transport_stream", stream), "socket", None)


class DirectSocket:
    """A WebSocket on a Trio stream. It writes ready-made frames; it reads short frames itself, and
    the others through wsproto.

    ``rest`` is what the client sent behind its request head: its first frames. A message of more
    than ``max_size`` bytes is a violation.
    """

    __slots__ = (
        "_aborted", "_broken", "_fragments", "_has_read", "_pieces", "_size", "_socket", "_stream",
        "_unread", "_websocket", "deflate", "max_size", "measures_progress",
    )  # fmt: skip

    def __init__(self, stream: trio.abc.Stream, rest: bytes, max_size: int) -> None:
        self._stream = stream
        self._socket: Any = None
        if DIRECT and type(stream) is trio.SocketStream:
            # The socket within Trio's: its send() does not wait.
            self._socket = getattr(stream.socket, "_sock", None)
        self.measures_progress = self._socket is None and isinstance(
            getattr(stream, "transport_stream", None), ProgressStream
        )
        self._has_read = False
        self.max_size = max_size
        self.deflate: PerMessageDeflate | None = None  # reads compressed messages, if negotiated
        self._unread = rest
        self._websocket: WebSocket | None = None  # from the first frame that is not short
        self._pieces: list[str] | None = None  # of an incomplete message
        self._size = 0  # their bytes
        self._fragments = 0  # its frames so far
        self._broken = False  # a write was cancelled: the peer may have half a frame
        self._aborted = False

    @property
    def answers_pings(self) -> bool:
        return True

    @property
    def is_plain(self) -> bool:
        return self._socket is not None

    def traffic(self) -> tuple[int, int]:
        return traffic(socket_of(self._stream))

    def has_left(self) -> bool:
        return has_left(socket_of(self._stream)) or is_closing(self._unread + self._peek())

    def _peek(self) -> bytes:
        """What could be read now; nothing of TLS."""
        if self._socket is None:
            return b""
        with (
            suppress(OSError),
            stdlib.fromfd(self._socket.fileno(), stdlib.AF_INET, stdlib.SOCK_STREAM) as same,
        ):
            return same.recv(_FRAMES_CHUNK, stdlib.MSG_PEEK | stdlib.MSG_DONTWAIT)
        return b""

    def try_write(self, data: bytes | memoryview) -> int:
        if (socket := self._socket) is None:
            if self._aborted:
                raise BrokenPipeError
            return 0
        try:
            # Not by its descriptor: once it is closed, a new client may have that number.
            taken: int = socket.send(data)
        except BlockingIOError:
            return 0
        return taken

    async def send_some(self, head: Callable[[], memoryview]) -> int:
        if self._socket is None:
            data = head()
            await self._send_all(data)
            return len(data)
        if self._socket.fileno() == -1:
            raise BrokenPipeError
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except trio.ClosedResourceError:
            if self._socket.fileno() == -1:
                raise BrokenPipeError from None
            return 0  # it was interrupt(), which is for the reader
        data = head()  # only now: it may have changed meanwhile
        return self.try_write(data) if data else 0

    async def send(self, data: bytes, timeout: float) -> None:
        """Send all of it, while nobody else writes. Raises :exc:`OSError` if the client is gone,
        :exc:`trio.TooSlowError` if it has not taken all within ``timeout`` seconds.
        """
        if (sent := self.try_write(data)) == len(data):
            return

        def rest() -> memoryview:
            return memoryview(data)[sent:]

        with trio.fail_after(timeout):
            while sent < len(data):
                sent += await self.send_some(rest)

    async def receive(self) -> str | Ping | Pong:
        while True:
            received = self._short() if self._websocket is None else self._message(self._websocket)
            if received is not None:
                return received
            try:
                if self._socket is None:
                    data = await receive(self._stream, _FRAMES_CHUNK)
                else:  # as there, without a coroutine more for each client
                    if self._has_read:
                        await trio.lowlevel.wait_readable(self._socket)
                    self._has_read = True  # in a crowd, the first message has come meanwhile
                    data = os.read(self._socket.fileno(), _FRAMES_CHUNK)
            except BlockingIOError:
                continue
            except (OSError, ValueError, *STREAM_ERRORS):  # ValueError: to wait for a closed one
                data = b""
            if not data:
                raise Disconnected(Close.ABNORMAL)
            if self._websocket is None:
                self._unread = data
            else:
                self._websocket.receive_data(data)

    def interrupt(self) -> None:
        # It wakes the task that waits for this descriptor, and closes nothing.
        if self._socket is not None and self._socket.fileno() != -1:
            trio.lowlevel.notify_closing(self._socket)

    def _short(self) -> str | Ping | Pong | None:
        """The next frame, if it is short and complete, as nearly all are. From the first that is
        not, wsproto reads everything.
        """
        if not self._unread:
            return None
        if (found := short_frame(self._unread)) is None:
            extensions: list[Extension] = [] if self.deflate is None else [self.deflate]
            self._websocket = WebSocket(ConnectionType.SERVER, extensions, self._unread)
            self._unread = b""
            return self._message(self._websocket)
        opcode, payload, end = found
        self._unread = self._unread[end:]
        if opcode == PING:
            return Ping(payload)
        if opcode == PONG:
            return Pong()
        if len(payload) > self.max_size:
            raise self._too_big()
        try:
            return payload.decode()
        except UnicodeDecodeError:
            raise ProtocolViolation(Close.INVALID_DATA, _reason(Close.INVALID_DATA)) from None

    def _message(self, websocket: WebSocket) -> str | Ping | Pong | None:
        """The next whole message, ping or pong, if wsproto has one."""
        for event in websocket.events():
            match event:
                case TextMessage():
                    if (text := self._text(event)) is not None:
                        return text
                case PingFrame(payload=payload):
                    return Ping(bytes(payload))
                case PongFrame():
                    return Pong()
                case BytesMessage():
                    raise ProtocolViolation(
                        Close.UNSUPPORTED_DATA, "binary frames are not supported"
                    )
                case CloseConnection(code=code, reason=reason):
                    if websocket.state is ConnectionState.REMOTE_CLOSING:
                        raise Disconnected(int(code), reason or "")
                    # wsproto found a violation of RFC 6455, or a message inflates to too much.
                    if code == Close.MESSAGE_TOO_BIG:
                        raise self._too_big()
                    raise ProtocolViolation(Close(int(code)), _reason(Close(int(code))))
        return None

    def _text(self, event: TextMessage) -> str | None:
        """The message, if this piece completes it. Raises :exc:`ProtocolViolation` if too big."""
        piece = event.data
        self._size += len(piece) if piece.isascii() else len(piece.encode())
        if self._size > self.max_size:
            raise self._too_big()
        self._fragments += event.frame_finished
        if self._fragments > MOST_FRAGMENTS:
            raise ProtocolViolation(Close.MESSAGE_TOO_BIG, "too many fragments")
        if event.message_finished:
            text = "".join([*self._pieces, piece]) if self._pieces else piece
            self._pieces = None
            self._size = self._fragments = 0
            return text
        if piece:
            self._pieces = self._pieces or []
            self._pieces.append(piece)
        return None

    def _too_big(self) -> ProtocolViolation:
        return ProtocolViolation(Close.MESSAGE_TOO_BIG, f"message is over {self.max_size} bytes")

    async def close(self, code: int, reason: str) -> None:
        if code != Close.ABNORMAL and not self._broken and not self._aborted:
            # RFC 6455, 5.5.1: a close frame without a code is answered by one without
            last = frame(CLOSE, b"") if code == Close.NO_STATUS else close_frame(code, reason)
            with suppress(OSError, trio.TooSlowError):
                await self.send(last, LINGER)
                await linger(self._stream)
        self._aborted = True
        if (socket := socket_of(self._stream)) is not None:
            socket.close()
        if not is_closed(self._stream):
            await trio.aclose_forcefully(self._stream)

    def abort(self) -> None:
        self._aborted = True
        reset(self._stream)

    async def _send_all(self, data: memoryview) -> None:
        self._broken = True
        try:
            await self._stream.send_all(data)
        except STREAM_ERRORS:
            raise BrokenPipeError from None
        self._broken = False


def _reason(close: Close) -> str:
    return "text is not UTF-8" if close is Close.INVALID_DATA else "frames break RFC 6455"
