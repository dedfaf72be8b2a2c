"""Bounds for what Hypercorn's HTTP and WebSocket code would buffer, or wait for, without end."""

import math
from contextlib import suppress
from typing import Any, Final

import h11
import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import trio
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from hypercorn.events import Closed
from hypercorn.protocol import ProtocolWrapper
from hypercorn.protocol.events import Data, Event, Response, StreamClosed
from hypercorn.protocol.h2 import (
    BUFFER_HIGH_WATER,
    BUFFER_LOW_WATER,
    BufferCompleteError,
    H2Protocol,
    StreamBuffer,
)
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import ASGIHTTPState, HTTPStream
from hypercorn.protocol.ws_stream import (
    ASGIWebsocketState,
    FrameTooLargeError,
    WebsocketBuffer,
    WSStream,
)
from hypercorn.typing import ASGISendEvent, WebsocketAcceptEvent
from wsproto.connection import ConnectionState
from wsproto.events import CloseConnection, Message
from wsproto.events import Event as WebSocketEvent
from wsproto.events import Ping as PingFrame
from wsproto.events import Pong as PongFrame

from ..core.close_codes import Close
from ..core.limits import RateLimit
from ..runtime.socket import LINGER
from .asgi import control_of

MOST_FRAGMENTS: Final = 256  # of one message: each costs as much as a whole message
_MOST_CONTROL: Final = 100  # pings and pongs in a second; the gateway does not see them here
_PIECE: Final = 1024  # bytes that are handled at a time: a frame may have seven
_CUT_OFF: Final = (h11.SEND_BODY, h11.ERROR)
_MAX_UNTIL_CLOSED: Final = 16_384  # bytes within which the answer to our close must come


class _Buffer(WebsocketBuffer):
    """Limits the number of fragments of a message, too."""

    def __init__(self, max_length: int) -> None:
        super().__init__(max_length)
        self._fragments = 0

    def extend(self, event: Message[Any]) -> None:
        self._fragments += event.frame_finished
        if self._fragments > MOST_FRAGMENTS:
            raise FrameTooLargeError
        super().extend(event)

    def clear(self) -> None:
        super().clear()
        self._fragments = 0


class BoundedStream(WSStream):
    """Accepts no extension, limits fragments and control frames, and yields to other tasks."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.buffer = _Buffer(self.config.websocket_max_message_size)
        self._control = RateLimit(_MOST_CONTROL, 1.0)
        self._over_at: float | None = None  # when a limit was exceeded and we closed
        self._bytes_left = _MAX_UNTIL_CLOSED

    async def handle(self, event: Event) -> None:
        if not isinstance(event, Data):
            await super().handle(event)
            return
        for at in range(0, len(event.data), _PIECE):
            piece = event.data[at : at + _PIECE]
            if self._bytes_left > 0:
                await super().handle(Data(event.stream_id, piece))
            if self._over_at is not None:
                await self._await_close(len(piece))
            await trio.lowlevel.checkpoint()

    async def _await_close(self, size: int) -> None:
        """Discard data for a second after our close, so that no reset loses our close frame."""
        self._bytes_left -= size
        assert self._over_at is not None
        if trio.current_time() - self._over_at > LINGER and self.app_put is not None:
            self._over_at = math.inf
            await self.app_put({"type": "websocket.disconnect", "code": int(Close.ABNORMAL)})

    async def _accept(self, message: WebsocketAcceptEvent) -> None:
        # With permessage-deflate 65 KB can become 200 MB, and Hypercorn has no bound for that.
        self.handshake.extensions = None
        await super()._accept(message)

    async def _handle_events(self) -> None:
        for event in self.connection.events():
            if isinstance(event, CloseConnection):
                if self.connection.state is ConnectionState.REMOTE_CLOSING:
                    await self._send_wsproto_event(event.response())
                await self.send(StreamClosed(stream_id=self.stream_id))
            elif self._over_at is None and self.state is not ASGIWebsocketState.CLOSED:
                # Once the app has closed it receives no more, and putting would wait for ever.
                await self._handle_message(event)

    async def _handle_message(self, event: WebSocketEvent) -> None:
        match event:
            case Message():
                try:
                    self.buffer.extend(event)
                except FrameTooLargeError:
                    await self._refuse(Close.MESSAGE_TOO_BIG)
                    return
                if event.message_finished:
                    assert self.app_put is not None
                    await self.app_put(self.buffer.to_message())
                    self.buffer.clear()
            case PingFrame() | PongFrame() if self._control.exceeded(trio.current_time()):
                await self._refuse(Close.RATE_LIMITED)
            case PingFrame():
                await self._send_wsproto_event(event.response())

    async def _refuse(self, close: Close) -> None:
        self._over_at = trio.current_time()
        self.buffer.clear()
        await self._send_wsproto_event(CloseConnection(code=int(close)))


class BoundedHttp(HTTPStream):
    """Hands over a request only while its app may take it: Hypercorn waits for that without end.

    What follows after the response is discarded.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._handing_over = trio.CancelScope()
        self._has_ended = False  # the app

    async def handle(self, event: Event) -> None:
        if isinstance(event, StreamClosed):
            self._handing_over.cancel()  # in the task that reads the connection
        is_over = self._has_ended or self.state is ASGIHTTPState.CLOSED
        with trio.CancelScope(deadline=-math.inf if is_over else math.inf) as self._handing_over:
            await super().handle(event)

    async def app_send(self, message: ASGISendEvent | None) -> None:
        if message is None:
            self._has_ended = True
            self._handing_over.cancel()
        await super().app_send(message)


def is_cut_off(protocol: ProtocolWrapper) -> bool:
    """Whether the client is still sending a request that is answered, or not understood."""
    connection = getattr(protocol.protocol, "connection", None)
    return isinstance(connection, h11.Connection) and connection.their_state in _CUT_OFF


class BoundedH11(H11Protocol):
    """Speaks HTTP/1 only.

    Hypercorn also changes to HTTP/2 where it was not negotiated: for ``Upgrade: h2c``, which a
    server may ignore (RFC 9110, 7.8), and for the request line of HTTP/2's preface.

    A response before the end of the request says that the connection closes (RFC 9112, 9.3): a
    client that sent its next request there would get no answer.
    """

    async def stream_send(self, event: Event) -> None:
        if isinstance(event, Response) and self.connection.their_state is h11.SEND_BODY:
            headers = [*event.headers, (b"connection", b"close")]
            event = Response(event.stream_id, headers, event.status_code)
        await super().stream_send(event)

    async def _check_protocol(self, event: h11.Request) -> None:
        pass

    async def _create_stream(self, request: h11.Request) -> None:
        if not request.http_version.startswith(b"1."):
            await self._send_error_response(400)
            await self.send(Closed())
            return
        await super()._create_stream(request)


class BoundedH2(H2Protocol):
    """Resets an HTTP/2 stream if its client opens no window within the write timeout."""

    async def stream_send(self, event: Event) -> None:
        buffer = self.stream_buffers.get(event.stream_id)
        control = control_of(self.connection_state)
        if isinstance(buffer, BoundedBuffer) and control is not None:
            buffer.timeout = control.write_timeout
        if isinstance(event, StreamClosed) and buffer is not None and buffer.buffer:
            await self._reset(event.stream_id)  # the gateway has given up on the client
        try:
            await super().stream_send(event)
        except TimeoutError:
            await self._reset(event.stream_id)
            raise

    async def _reset(self, stream_id: int) -> None:
        """End one stream; the sending task drops its buffered data."""
        with suppress(KeyError, ProtocolError):
            self.connection.reset_stream(stream_id, ErrorCodes.CANCEL)
            self.priority.unblock(stream_id)
        await self.has_data.set()
        await self._flush()


class BoundedBuffer(StreamBuffer):
    """The data of one HTTP/2 stream that waits for flow control.

    Hypercorn lets the sender go on when little was taken out, instead of when little is left: for
    a client that opens no window it would buffer without end, and the client would never count as
    slow. A wait raises :exc:`TimeoutError` if nothing is taken out for ``timeout`` seconds.
    """

    timeout = math.inf

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._taken = 0

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            await self._wait(self._paused)
            await self._paused.clear()

    async def drain(self) -> None:
        await self._wait(self._is_empty)

    async def _wait(self, event: Any) -> None:
        while True:
            taken = self._taken
            with trio.move_on_after(self.timeout) as scope:
                await event.wait()
            if not scope.cancelled_caught:
                return
            if self._taken == taken:
                raise TimeoutError("the client opens no window")

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        self._taken += len(data)
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


# The modules in which Hypercorn looks up a class by its name, and what stands there instead.
_REPLACED: Final = (
    (hypercorn.protocol, "H11Protocol", BoundedH11),
    (hypercorn.protocol, "H2Protocol", BoundedH2),
    (hypercorn.protocol.h11, "HTTPStream", BoundedHttp),
    (hypercorn.protocol.h2, "HTTPStream", BoundedHttp),
    (hypercorn.protocol.h11, "WSStream", BoundedStream),
    (hypercorn.protocol.h2, "WSStream", BoundedStream),
    (hypercorn.protocol.h2, "StreamBuffer", BoundedBuffer),
)


def bound_protocols() -> None:
    """Let Hypercorn use the bounded classes of this module. May be called again."""
    for module, name, bounded in _REPLACED:
        setattr(module, name, bounded)
