"""The ASGI transport: a WebSocket over Quart's, for clients that the direct one cannot serve."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import trio
from quart import Websocket

from ..core.audiences import Endpoint
from ..core.client_request import ClientRequest
from ..core.close_codes import Close
from ..core.frames import TEXT, boundary, split
from ..runtime.socket import LINGER, ProtocolViolation
from .handshake import join_headers, read_query

DRAIN = 2.0  # seconds
_CONTROL: Final = "tcp_control"  # in the state of a scope


@dataclass(frozen=True, slots=True)
class TcpControl:
    """What can be done with the TCP connection of a request, for which ASGI has no message."""

    abort: Callable[[], None]  # resets it at once
    traffic: Callable[[], tuple[int, int]]  # bytes that the client has acknowledged, and has yet to
    has_left: Callable[[], bool]  # it has ended the connection
    write_timeout: float  # seconds for which a client may take nothing of a send


def with_control(state: Mapping[str, Any], control: TcpControl) -> dict[str, Any]:
    """The state of a connection, from which :func:`control_of` gets the control."""
    return {**state, _CONTROL: control}


def control_of(state: Mapping[str, Any] | None) -> TcpControl | None:
    """The control in the state of a connection or of an ASGI scope; None under a server that is
    not :class:`~trio_gateway.transports.hypercorn_server.HypercornServer`.
    """
    found: TcpControl | None = (state or {}).get(_CONTROL)
    return found


def abort_of(scope: Any) -> Callable[[], None] | None:
    """What resets this client's connection, if that is possible: an HTTP/2 connection carries
    other streams too.
    """
    if not scope.get("http_version", "1.1").startswith("1"):
        return None
    control = control_of(scope.get("state"))
    return None if control is None else control.abort


def traffic_of(scope: Any) -> Callable[[], tuple[int, int]]:
    """What tells how much this client's side of the TCP connection has acknowledged."""
    control = control_of(scope.get("state"))
    return _unknown if control is None else control.traffic


def _unknown() -> tuple[int, int]:
    return 0, 0


def has_left_of(scope: Any) -> Callable[[], bool]:
    """What tells whether this client has ended its TCP connection."""
    control = control_of(scope.get("state"))
    return (lambda: False) if control is None else control.has_left


def measures_progress(scope: Any) -> bool:
    """Whether a send has a deadline that measures what the client takes."""
    return control_of(scope.get("state")) is not None


def read_scope(endpoint: Endpoint, scope: Any) -> ClientRequest:
    """The request of a client of this endpoint, from an ASGI scope."""
    return ClientRequest(
        endpoint,
        read_query(scope["query_string"].decode("latin-1")),
        join_headers(scope["headers"]),
        peer=lambda: str((scope.get("client") or ("",))[0]),
        one_way=scope["type"] == "http",
    )


class AsgiSocket:
    """A WebSocket over ASGI, slower than the direct transport.

    The ASGI server answers the client's pings, and does not pass on the client's close code. When
    the client leaves, Quart cancels the task that serves it.
    """

    def __init__(self, websocket: Websocket, max_size: int) -> None:
        self._websocket = websocket
        self._max_size = max_size
        scope = getattr(websocket, "scope", {})
        self._reset = abort_of(scope)
        self._closed = False
        self._aborted = False
        self.is_plain = False
        self.measures_progress = measures_progress(scope)
        self.answers_pings = False  # ASGI has no message for a ping
        self.traffic = traffic_of(scope)
        self.has_left = has_left_of(scope)

    def try_write(self, data: bytes) -> int:
        if self._aborted:
            raise BrokenPipeError
        return 0

    async def send_some(self, head: Callable[[], memoryview]) -> int:
        data = head()
        if not self.measures_progress:  # one frame has one deadline
            data = data[: boundary(data, 1)]
        for opcode, payload in split(data):
            if opcode == TEXT:  # the server sends pings itself (websocket_ping_interval)
                await self._websocket.send(str(payload, "utf-8"))
        return len(data)

    async def receive(self) -> str:
        said = await self._websocket.receive()
        if not isinstance(said, str):
            raise ProtocolViolation(Close.UNSUPPORTED_DATA, "binary frames are not supported")
        if len(said) * 4 > self._max_size and len(said.encode()) > self._max_size:
            raise ProtocolViolation(
                Close.MESSAGE_TOO_BIG, f"message is over {self._max_size} bytes"
            )
        return said

    def interrupt(self) -> None:
        raise AssertionError("it is not plain")

    async def close(self, code: int, reason: str) -> None:
        if self._aborted:
            return
        if code == Close.ABNORMAL:  # the client is gone, and the server has answered its close
            self._closed = True
            return
        # A client that opens no window, or does not read, does not receive a close either.
        with trio.move_on_after(LINGER), suppress(OSError):
            await self._websocket.close(code, reason)
            self._closed = True

    def abort(self) -> None:
        self._aborted = True
        if not self._closed and self._reset is not None:
            self._reset()
