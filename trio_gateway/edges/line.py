"""The line: a socket that asks for a WebSocket never reaches Hypercorn's protocol code.

Hypercorn looks up ``TCPServer`` by name when it starts serving; :func:`install` puts
:class:`Line` there. It reads the first request head. An upgrade is answered here and served by
the gateway on the Trio stream, from the first byte to the last; for anything else the bytes go
back in front of the stream and Hypercorn serves it as ever.
"""

import os
import re
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Final, Protocol, cast

import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.trio.run
import structlog
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer
from wsproto.connection import Connection as WebSocket
from wsproto.connection import ConnectionState, ConnectionType
from wsproto.events import BytesMessage, CloseConnection, TextMessage
from wsproto.events import Ping as PingFrame
from wsproto.events import Pong as PongFrame

from ..core.closing import Close
from ..core.frames import CLOSE, close_frame, frame
from ..core.limits import LogLimit
from ..runtime.connection import Left, Ping, Pong, Violation
from ..runtime.outbox import Outbox
from ..runtime.supervision import leaves
from ..runtime.turnstile import TooMany, Turnstile
from .bounded import MOST_FRAGMENTS, BoundedBuffer, BoundedStream
from .handshake import (
    MAX_HEAD_BYTES,
    Handshake,
    Refusal,
    acceptance,
    parse_head,
    refusal_response,
)

log = structlog.get_logger()

LINGER: Final = 1.0  # seconds
CUT: Final = "cut"  # in the state that an app is given: ends the TCP connection at once
_CHUNK: Final = 65_536
# Of frames at a time: seven bytes may be a frame of their own, and others wait meanwhile.
_FRAMES_CHUNK: Final = 4096
_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
# Windows can't os.write to a socket; there the writer task sends everything.
_WRITES_DIRECTLY: Final = sys.platform != "win32"
_GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)


# The protocol that is spoken, what was read of the request, and how to refuse it if it is bad.
Shaken = tuple[str | None, bytes, Refusal | None]


class Served(Protocol):
    """What the line needs of the gateway."""

    accept_timeout: float
    write_timeout: float
    max_message_size: int
    draining: bool
    refused: Counter[int]  # by status
    log_limit: LogLimit
    heads: Turnstile["Shaken"]

    def serve_connection(self, handshake: Handshake, socket: "LineSocket") -> Awaitable[None]: ...

    def watch(self, terminated: Callable[[], Awaitable[None]]) -> None: ...


class Line(TCPServer):
    """A TCP connection: ours if it asks for a WebSocket, Hypercorn's if not."""

    def __init__(
        self, app: Any, config: Any, context: Any, state: Any, stream: trio.abc.Stream
    ) -> None:
        # Hypercorn's own makes locks and more, which only those need that it serves.
        self.app, self.config, self.context, self.state = app, config, context, state
        self.stream = cast("Any", stream)

    async def _hand_over(self) -> None:
        """Let Hypercorn serve it. The app is told how to cut it off, which ASGI has no word for."""
        state = {**self.state, CUT: lambda: _cut(self.stream)}
        super().__init__(self.app, self.config, self.context, state, self.stream)
        await super().run()

    async def run(self) -> None:
        """Serve one connection; its faults end it alone, and never reach the server's nursery."""
        gateway = cast("Served | None", getattr(self.app, "app", None))
        if not hasattr(gateway, "serve_connection"):  # another app, or a middleware around ours
            await self._hand_over()
            return
        assert gateway is not None
        gateway.watch(self.context.terminated.wait)
        try:
            await self._serve(gateway)
        except* (OSError, *_GONE):
            pass
        except* Exception as faults:
            kinds = sorted({type(each).__name__ for each in leaves(faults)})
            held_back = gateway.log_limit.allows("connection failed", trio.current_time())
            if held_back is not None:
                log.warning("connection failed", errors=kinds, held_back=held_back)
        finally:
            if not _is_closed(self.stream):
                await trio.aclose_forcefully(self.stream)

    async def _serve(self, gateway: Served) -> None:
        try:
            shaken = await gateway.heads.run(lambda: self._shake(gateway), gateway.accept_timeout)
        except TooMany:
            gateway.refused[503] += 1  # without a word: there are too many to linger for each
            return
        if shaken is None:  # it had not said what it wants, and now we are stopping
            return
        protocol, data, refusal = shaken
        if protocol is None:
            return
        if protocol == "h2":
            await self._hand_over()
            return
        if refusal is not None:
            await self._refuse(gateway, refusal)
            return
        if not data:
            return
        end = _END_OF_HEAD.search(data)
        head = data[: end.end()] if end else data
        match parse_head(head):
            case Handshake() if gateway.draining:
                await self._refuse(gateway, Refusal(503, "draining"))
            case Handshake() as handshake:
                with trio.move_on_after(gateway.accept_timeout) as scope:
                    await self.stream.send_all(acceptance(handshake))
                if scope.cancelled_caught:
                    return
                socket = LineSocket(self.stream, data[len(head) :], gateway.max_message_size)
                await gateway.serve_connection(handshake.seen_from(_peer(self.stream)), socket)
            case Refusal() as refusal:
                await self._refuse(gateway, refusal)
            case None:
                self.stream = cast("Any", Replayed(self.stream, data))
                await self._hand_over()

    async def _shake(self, gateway: Served) -> "Shaken":
        protocol = await self._secure(gateway.accept_timeout)
        if protocol != "http/1.1":
            return protocol, b"", None
        return protocol, *await read_head(self.stream, gateway.accept_timeout)

    async def _secure(self, timeout: float) -> str | None:
        """The protocol that is spoken once TLS, if there is any, is through; None if it failed."""
        if not hasattr(self.stream, "do_handshake"):
            return "http/1.1"
        try:
            with trio.fail_after(min(timeout, self.config.ssl_handshake_timeout)):
                await self.stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return None
        return "h2" if self.stream.selected_alpn_protocol() == "h2" else "http/1.1"

    async def _refuse(self, gateway: Served, refusal: Refusal) -> None:
        gateway.refused[refusal.status] += 1
        kind = f"refused {refusal.status}"
        if (held_back := gateway.log_limit.allows(kind, trio.current_time())) is not None:
            log.info(
                "upgrade refused",
                status=refusal.status,
                reason=refusal.reason,
                held_back=held_back,
            )
        await answer(self.stream, refusal)

    async def _read_data(self) -> None:
        """As Hypercorn does it, but when the peer is gone the task that pings it is not waited
        for: it may sleep on for as long as ``websocket_ping_interval``.
        """
        await super()._read_data()
        assert self._task_group._nursery is not None
        self._task_group._nursery.cancel_scope.deadline = trio.current_time() + LINGER

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn does it, but with a deadline: its own send is shielded for ever, so that
        one client that stops reading hangs the shutdown. Its close is not shielded at all, and
        runs in a task that Quart-Trio cancels at that moment, so that it never came to pass.
        """
        if isinstance(event, Closed):
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LINGER):
                await super().protocol_send(event)
            return
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            timeout = getattr(getattr(self.app, "app", None), "write_timeout", LINGER)
            try:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + timeout) as scope:
                    await self.stream.send_all(event.data)
                gone = scope.cancelled_caught
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                gone = True
        if gone:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())


def install() -> None:
    """Let Hypercorn's Trio worker serve with :class:`Line`, and bound what it does itself."""
    vars(hypercorn.trio.run)["TCPServer"] = Line
    vars(hypercorn.protocol.h11)["WSStream"] = BoundedStream
    vars(hypercorn.protocol.h2)["WSStream"] = BoundedStream
    vars(hypercorn.protocol.h2)["StreamBuffer"] = BoundedBuffer


async def read_head(stream: trio.abc.Stream, timeout: float) -> tuple[bytes, Refusal | None]:
    """Read until a request head is complete, and maybe beyond; bounded in size and time.

    Returns what was read, and how to refuse it if it is no head. Nothing read: nobody there.
    """
    data = bytearray()
    with trio.move_on_after(timeout):
        while True:
            received = await stream.receive_some(_CHUNK)
            if not received:
                return bytes(data), Refusal(400, "incomplete request") if data else None
            # The end may have begun in what was there before.
            start = max(0, len(data) - 3)
            data += received
            end = _END_OF_HEAD.search(data, start)
            if (end.end() if end else len(data)) > MAX_HEAD_BYTES:
                return b"", Refusal(431, f"request head is over {MAX_HEAD_BYTES} bytes")
            if end:
                return bytes(data), None
    return bytes(data), Refusal(408, "request head took too long") if data else None


async def answer(stream: trio.abc.Stream, refusal: Refusal) -> None:
    """Refuse over HTTP, such that the answer arrives."""
    with trio.move_on_after(LINGER):
        await stream.send_all(refusal_response(refusal))
    await linger(stream)


async def linger(stream: trio.abc.Stream) -> None:
    """Say that nothing more comes, and read on until the peer is done or a second has passed: a
    socket that is closed with unread data is reset, and what was sent last is lost.
    """
    with trio.move_on_after(LINGER):
        try:
            if isinstance(stream, trio.abc.HalfCloseableStream):
                await stream.send_eof()
            while await stream.receive_some(_CHUNK):
                pass
        except _GONE:
            pass


class Replayed:
    """A stream with some of its bytes put back in front."""

    def __init__(self, stream: trio.abc.Stream, data: bytes) -> None:
        self._stream = stream
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._data:
            return bytes(await self._stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        size = len(self._data) if max_bytes is None else max_bytes
        data, self._data = self._data[:size], self._data[size:]
        return data

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def aclose(self) -> None:
        await self._stream.aclose()


class LineSocket:
    """A WebSocket on a Trio stream: wsproto reads, ready-made frames are written.

    ``rest`` is what the client sent behind its request head: its first frames.
    """

    __slots__ = (
        "_aborted", "_broken", "_fragments", "_pieces", "_size", "_socket", "_stream", "_websocket",
        "max_size",
    )  # fmt: skip

    def __init__(self, stream: trio.abc.Stream, rest: bytes, max_size: int) -> None:
        self._stream = stream
        self._websocket = WebSocket(ConnectionType.SERVER, trailing_data=rest)
        self._socket = (
            stream.socket if _WRITES_DIRECTLY and isinstance(stream, trio.SocketStream) else None
        )
        self.max_size = max_size
        self._pieces: list[str] = []  # of a message that is not complete yet
        self._size = 0  # their bytes
        self._fragments = 0  # its frames
        self._broken = False  # a write was cut off: the peer may have half a frame
        self._aborted = False

    def try_write(self, data: bytes | memoryview) -> int:
        if self._aborted:
            raise BrokenPipeError
        if self._socket is None:
            return 0
        try:
            # The number is asked for each time, -1 once closed: the next client gets the old one.
            return os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return 0

    async def write_from(self, outbox: Outbox) -> None:
        if self._socket is None:
            data = outbox.head()
            outbox.took(len(data))
            await self._send_all(data)
            return
        try:
            await trio.lowlevel.wait_writable(self._socket)
        except trio.ClosedResourceError:
            raise BrokenPipeError from None
        # Only now: what the outbox holds may have changed meanwhile.
        if outbox.bytes and (taken := self.try_write(outbox.head())):
            outbox.took(taken)

    async def receive(self) -> str | Ping | Pong:
        while True:
            for event in self._websocket.events():
                match event:
                    case TextMessage():
                        if (text := self._text(event)) is not None:
                            return text
                    case PingFrame(payload=payload):
                        return Ping(bytes(payload))
                    case PongFrame():
                        return Pong()
                    case BytesMessage():
                        raise Violation(Close.UNSUPPORTED_DATA, "binary frames are not supported")
                    case CloseConnection(code=code, reason=reason):
                        if self._websocket.state is ConnectionState.REMOTE_CLOSING:
                            raise Left(int(code), reason or "")
                        # wsproto's word for what broke RFC 6455
                        raise Violation(Close(int(code)), _why(Close(int(code))))
            try:
                data = await self._stream.receive_some(_FRAMES_CHUNK)
            except _GONE:
                data = b""
            if not data:
                raise Left(Close.ABNORMAL)
            self._websocket.receive_data(bytes(data))

    def _text(self, event: TextMessage) -> str | None:
        """The message, if this piece completes it."""
        piece = event.data
        self._size += len(piece) if piece.isascii() else len(piece.encode())
        if self._size > self.max_size:
            raise Violation(Close.MESSAGE_TOO_BIG, f"message is over {self.max_size} bytes")
        self._fragments += event.frame_finished
        if self._fragments > MOST_FRAGMENTS:
            raise Violation(Close.MESSAGE_TOO_BIG, "too many fragments")
        if event.message_finished:
            text = "".join([*self._pieces, piece]) if self._pieces else piece
            self._pieces.clear()
            self._size = self._fragments = 0
            return text
        if piece:
            self._pieces.append(piece)
        return None

    async def close(self, code: int, reason: str) -> None:
        if code != Close.ABNORMAL and not self._broken and not self._aborted:
            # RFC 6455, 5.5.1: a close frame without a code is answered by one without
            last = frame(CLOSE, b"") if code == Close.NO_STATUS else close_frame(code, reason)
            outbox = Outbox()
            outbox.put(last, 1)
            with trio.move_on_after(LINGER):
                try:
                    while outbox.bytes:
                        await self.write_from(outbox)
                except OSError:
                    pass
                else:
                    await linger(self._stream)
        self.abort()
        if not _is_closed(self._stream):
            await trio.aclose_forcefully(self._stream)

    def abort(self) -> None:
        self._aborted = True
        _cut(self._stream)

    async def _send_all(self, data: memoryview) -> None:
        self._broken = True
        try:
            await self._stream.send_all(data)
        except _GONE:
            raise BrokenPipeError from None
        self._broken = False


def _peer(stream: trio.abc.Stream) -> str:
    """The address at the other end; empty for a unix socket, or if it is gone already."""
    carrier: Any = getattr(stream, "transport_stream", stream)
    try:
        name = carrier.socket.getpeername()
    except (OSError, AttributeError):
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""


def _cut(stream: trio.abc.Stream) -> None:
    carrier: Any = getattr(stream, "transport_stream", stream)
    if (socket := getattr(carrier, "socket", None)) is not None:
        socket.close()


def _is_closed(stream: trio.abc.Stream) -> bool:
    """Whether it is a plain socket that was closed already; to close one again is not cheap."""
    return isinstance(stream, trio.SocketStream) and stream.socket.fileno() == -1


def _why(close: Close) -> str:
    return "text is not UTF-8" if close is Close.INVALID_DATA else "frames break RFC 6455"
