"""The second door: a socket over Quart's websocket, for whatever does not come by the line."""

from typing import Any

from quart import Websocket

from ..core.audiences import Endpoint
from ..core.closing import Close
from ..core.frames import TEXT, split
from ..runtime.connection import Violation
from ..runtime.outbox import Outbox
from .handshake import Handshake, join_headers, read_query

DRAIN = 2.0  # seconds


def read_scope(endpoint: Endpoint, scope: Any) -> Handshake:
    """What an ASGI server says of a client that is at this endpoint's door."""
    return Handshake(
        endpoint,
        read_query(scope["query_string"].decode("latin-1")),
        join_headers(scope["headers"]),
        peer=lambda: str((scope.get("client") or ("",))[0]),
        one_way=scope["type"] == "http",
    )


class AsgiSocket:
    """Slower than the line, and with less to see: the ASGI server answers the client's pings and
    keeps its close code to itself; when the client leaves, whoever serves it is cancelled.
    """

    def __init__(self, websocket: Websocket, max_size: int) -> None:
        self._websocket = websocket
        self._max_size = max_size
        self._aborted = False

    def try_write(self, data: bytes) -> int:
        if self._aborted:
            raise BrokenPipeError
        return 0

    async def write_from(self, outbox: Outbox) -> None:
        data = outbox.head()
        outbox.took(len(data))
        for opcode, payload in split(data):
            if opcode == TEXT:  # pings are the server's own (websocket_ping_interval)
                await self._websocket.send(str(payload, "utf-8"))

    async def receive(self) -> str:
        said = await self._websocket.receive()
        if not isinstance(said, str):
            raise Violation(Close.UNSUPPORTED_DATA, "binary frames are not supported")
        if len(said) * 4 > self._max_size and len(said.encode()) > self._max_size:
            raise Violation(Close.MESSAGE_TOO_BIG, f"message is over {self._max_size} bytes")
        return said

    async def close(self, code: int, reason: str) -> None:
        if code != Close.ABNORMAL:  # nothing in ASGI cuts a client off: the server would say 1000
            await self._websocket.close(code, reason)

    def abort(self) -> None:
        self._aborted = True
