"""The SSE transport: events in an HTTP response, for networks that break WebSockets."""

import json
import math
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from types import MappingProxyType
from typing import Any, Final, NoReturn, Protocol

import trio

from ..core.audiences import Endpoint
from ..core.client_request import ClientRequest
from ..core.close_codes import RETRY_AFTER, Close, Rejected, parse_retry_hint
from ..core.frames import boundary
from ..core.sse import HELLO, MEDIA_TYPE, EventWriter, close_event
from ..runtime.socket import LINGER, Disconnected, ProtocolViolation
from .asgi import ClientControl

PATHS: Final[Mapping[str, Endpoint]] = MappingProxyType({f"{e.path}/events": e for e in Endpoint})

Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class Reception(Protocol):
    """What an event stream needs of the gateway."""

    @property
    def draining(self) -> bool: ...

    def count_refusal(self, status: int) -> None: ...

    def serve_connection(
        self, request: ClientRequest, socket: "EventStream"
    ) -> Awaitable[None]: ...


async def serve(
    reception: Reception, handshake: ClientRequest, scope: Any, receive: Receive, send: Send
) -> None:
    """Serve a request for an event stream; returns when the stream has ended. A client that is not
    admitted is answered with an HTTP status.
    """
    match scope["method"]:
        case "GET" if reception.draining:
            reception.count_refusal(503)
            await _refuse(send, 503, Close.GOING_AWAY, "draining", RETRY_AFTER[503])
        case "GET":
            await reception.serve_connection(handshake, EventStream(scope, receive, send))
        case _:
            await answer(send, 405, {"Allow": "GET, OPTIONS"})


class EventStream:
    """A one-way socket: the client sends nothing, and leaves by closing the connection.

    The response begins when the client is admitted. A close before that is an HTTP status.
    """

    def __init__(self, scope: Any, receive: Receive, send: Send) -> None:
        self._receive = receive
        self._send = send
        self._start = _start(200, _STREAM_HEADERS)
        self._writer = EventWriter()
        self._reset, self.traffic, self.has_left, self.measures_progress = ClientControl.of(scope)
        self.is_plain = False  # the response begins with the first receive
        self.answers_pings = False  # a ping is a comment, which no client answers
        if scope["http_version"].startswith("1"):
            # A client that reconnects must not come back on this connection to a draining gateway.
            self._start["headers"].append((b"connection", b"close"))
        self._lock = trio.Lock()  # either the reader or the writer begins the response
        self._begun = False
        self._broken = False  # a send was cut off: the client may have half an event
        self._ended = False
        self._aborted = False

    def try_write(self, data: bytes) -> int:
        if self._aborted:
            raise BrokenPipeError
        return 0

    async def send_some(self, head: Callable[[], memoryview]) -> int:
        data = head()
        if not self.measures_progress:  # one event has one deadline
            data = data[: boundary(data, 1)]
        await self._write(self._writer.convert(data))
        return len(data)

    async def receive(self) -> NoReturn:
        try:
            await self._write(b"")
        except OSError:
            raise Disconnected(Close.ABNORMAL) from None
        while (message := await self._receive())["type"] != "http.disconnect":
            if message.get("body"):
                raise ProtocolViolation(Close.UNSUPPORTED_DATA, "a stream of events takes no body")
        async with self._lock:  # a write that took too long reports that first
            raise Disconnected(Close.ABNORMAL)

    async def refuse(self, rejected: Rejected) -> None:
        """Answer a client that is not admitted; the response has not begun."""
        with trio.move_on_after(LINGER), suppress(OSError):
            await _refuse(
                self._send, rejected.status, rejected.close, rejected.text, rejected.retry_after
            )
            self._ended = True

    def interrupt(self) -> None:
        raise AssertionError("it is not plain")

    async def close(self, code: int, reason: str) -> None:
        if code == Close.ABNORMAL or self._broken or self._aborted:
            return
        with trio.move_on_after(LINGER), suppress(OSError):
            if not self._begun:
                status = Close(code).status
                await _refuse(self._send, status, code, reason, RETRY_AFTER.get(status))
            else:
                await self._write(close_event(code, reason), more=False)
            self._ended = True

    def abort(self) -> None:
        self._aborted = True
        if not self._ended and self._reset is not None:
            self._reset()

    async def _write(self, events: bytes, *, more: bool = True) -> None:
        async with self._lock:
            if self._aborted:
                raise BrokenPipeError
            self._broken = True
            if not self._begun:
                self._begun = True
                await self._send(self._start)
                events = HELLO + events
            if events:
                await self._send({"type": "http.response.body", "body": events, "more_body": more})
            self._broken = False


_STREAM_HEADERS: Final = {
    "Content-Type": MEDIA_TYPE,
    # A proxy that compresses or rewrites the stream delays events (RFC 9111, 5.2.2.6).
    "Cache-Control": "no-store, no-transform",
    "X-Accel-Buffering": "no",  # nginx would delay events until its buffer is full
}


async def _refuse(send: Send, status: int, code: int, reason: str, again: float | None) -> None:
    """Refuse as the other HTTP routes do; ``code`` is the close code that a WebSocket would get."""
    found = {"Content-Type": "application/json", "Cache-Control": "no-store"}
    if status == 401:
        found["WWW-Authenticate"] = "Bearer"
    if (after := parse_retry_hint(reason) or again) is not None:
        found["Retry-After"] = str(max(1, math.ceil(after)))
    await answer(send, status, found, json.dumps({"code": int(code), "error": reason}).encode())


async def answer(send: Send, status: int, headers: Mapping[str, str], body: bytes = b"") -> None:
    """Send a whole HTTP response."""
    await send(_start(status, {**headers, "Content-Length": str(len(body))}))
    await send({"type": "http.response.body", "body": body, "more_body": False})


def _start(status: int, headers: Mapping[str, str]) -> dict[str, Any]:
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    return {"type": "http.response.start", "status": status, "headers": raw}
