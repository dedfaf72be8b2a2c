"""The ASGI transport: a WebSocket over Quart's, for clients that the direct one cannot serve."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Self

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


class ClientControl(NamedTuple):
    """What can be done with the connection of one client, see :class:`TcpControl`."""

    abort: Callable[[], None] | None = None  # if it is possible
    traffic: Callable[[], tuple[int, int]] = lambda: (0, 0)
    has_left: Callable[[], bool] = lambda: False
    measures_progress: bool = False  # a send has a deadline that measures what the client takes

    @classmethod
    def of(cls, scope: Any) -> Self:
        """That of the client of an ASGI scope."""
        if (control := control_of(scope.get("state"))) is None:
            return cls()
        # An HTTP/2 connection carries other streams, too.
        is_alone = scope.get("http_version", "1.1").startswith("1")
        abort = control.abort if is_alone else None
        return cls(abort, control.traffic, control.has_left, measures_progress=True)


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
        self._reset, self.traffic, self.has_left, self.measures_progress = ClientControl.of(scope)
        self._closed = False
        self._aborted = False
        self.is_plain = False
        self.answers_pings = False  # ASGI has no message for a ping

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
