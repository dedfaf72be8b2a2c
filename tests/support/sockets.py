"""Raw bytes: valid and invalid request heads, frames, and a client that may break any rule."""

import socket
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final, Literal, NamedTuple

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState
from trio.testing import memory_stream_pair

from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT
from trio_gateway.gateway import Gateway
from trio_gateway.transports.tcp import TcpConnection

KEY: Final = "dGhlIHNhbXBsZSBub25jZQ=="  # the example of RFC 6455, 1.3
ACCEPT: Final = "s3pPLMBiTxaQ9kYGzzhZRbK+xOo="
PONG_TEXT: Final = '{"type":"pong"}'
CONTINUATION: Final = 0x0
BINARY: Final = 0x2
_MASK: Final = b"\x01\x80\x03\xff"
_GOOD: Final = {
    "Host": "gateway.example",
    "Connection": "Upgrade",
    "Upgrade": "websocket",
    "Sec-WebSocket-Version": "13",
    "Sec-WebSocket-Key": KEY,
}


def make_head(*more: str, request: str = "GET /ws/waiter HTTP/1.1", **changes: str | None) -> bytes:
    """The request head of an upgrade. ``changes`` sets headers, or removes them (None)."""
    named = {name.replace("_", "-"): value for name, value in changes.items()}
    lines = [request]
    for name, good in _GOOD.items():
        value = named.get(name.lower(), good)
        if value is not None:
            lines.append(f"{name}: {value}")
    return "\r\n".join([*lines, *more, "", ""]).encode("latin-1")


class HeadCase(NamedTuple):
    """A request head, which part answers it, and with which status."""

    data: bytes
    by: Literal["direct", "hypercorn"]
    status: int


def _ours(
    status: int, *more: str, request: str = "GET /ws/waiter HTTP/1.1", **changes: Any
) -> HeadCase:
    return HeadCase(make_head(*more, request=request, **changes), "direct", status)


def _raw(status: int, text: str, by: Literal["direct", "hypercorn"] = "direct") -> HeadCase:
    return HeadCase(text.encode("latin-1"), by, status)


_READ_HEADERS: Final = (
    "Connection", "Upgrade", "Host", "Origin", "Authorization", "Last-Event-ID",
    "Sec-WebSocket-Key", "Sec-WebSocket-Version", "Sec-WebSocket-Protocol",
    "Sec-WebSocket-Extensions",
)  # fmt: skip


def _with_high_byte(name: str) -> HeadCase:
    if name in _GOOD:
        return _ours(400, **{name.lower().replace("-", "_"): _GOOD[name] + ", \xe9"})
    return _ours(400, f"{name}: a\xe9")


HEADS: Final[dict[str, HeadCase]] = {
    # Valid but unusual
    "good": _ours(101),
    "names in another case": _raw(
        101, make_head().decode().replace("Sec-WebSocket", "sEC-wEBsOCKET").replace("Host", "HOST")
    ),
    "tokens among others": _ours(101, connection="keep-alive, UPGRADE", upgrade="h2c, WebSocket"),
    "connection in two headers": _ours(101, "Connection: keep-alive"),
    "tab before a value": _ours(101, host="\tgateway.example\t"),
    "an empty line before the request": _raw(101, "\r\n" + make_head().decode()),
    "content-length 0": _ours(101, "Content-Length: 0"),
    "bytes above 0x7f in another header": _ours(101, "X-Name: caf\xe9"),
    "absolute target": _ours(101, request="GET http://gateway.example/ws/waiter HTTP/1.1"),
    "percent-encoded path": _ours(101, request="GET /ws/w%61iter HTTP/1.1"),
    "an extension is not agreed to": _ours(101, "Sec-WebSocket-Extensions: permessage-deflate"),
    # No endpoint
    "unknown path": _ours(404, request="GET /ws/cook HTTP/1.1"),
    "slash behind the path": _ours(404, request="GET /ws/waiter/ HTTP/1.1"),
    "path in another case": _ours(404, request="GET /WS/Waiter HTTP/1.1"),
    "two slashes": _ours(404, request="GET //gateway.example/ws/waiter HTTP/1.1"),
    "dots in the path": _ours(404, request="GET /ws/../ws/waiter HTTP/1.1"),
    "asterisk": _ours(404, request="GET * HTTP/1.1"),
    # Missing
    "no host": _ours(400, host=None),
    "empty host": _ours(400, host=""),
    "no connection": _ours(400, connection=None),
    "no upgrade": _ours(426, upgrade=None),
    "no version": _ours(426, sec_websocket_version=None),
    "no key": _ours(400, sec_websocket_key=None),
    # Wrong
    "connection without upgrade": _ours(400, connection="keep-alive"),
    "another upgrade with a key": _ours(426, upgrade="h2c"),
    "version 8": _ours(426, sec_websocket_version="8"),
    "two versions in one": _ours(426, sec_websocket_version="13, 8"),
    "short key": _ours(400, sec_websocket_key="AAAAAAAAAAAAAAAAAAAA"),
    "long key": _ours(400, sec_websocket_key="AAAA" * 8),
    "empty key": _ours(400, sec_websocket_key=""),
    "key not base64": _ours(400, sec_websocket_key="!" * 22 + "=="),
    "key with something behind": _ours(400, sec_websocket_key=KEY + " x"),
    "POST": _ours(400, request="POST /ws/waiter HTTP/1.1"),
    "HEAD": _ours(400, request="HEAD /ws/waiter HTTP/1.1"),
    "CONNECT": _ours(400, request="CONNECT gateway.example:80 HTTP/1.1"),
    "method in lower case": _ours(400, request="get /ws/waiter HTTP/1.1"),
    "HTTP/1.0": _ours(400, request="GET /ws/waiter HTTP/1.0"),
    "HTTP/1.2": _ours(400, request="GET /ws/waiter HTTP/1.2"),
    "HTTP/2.0": _ours(400, request="GET /ws/waiter HTTP/2.0"),
    "no target": _ours(400, request="GET HTTP/1.1"),
    "broken absolute target": _ours(400, request="GET http://[::1/ws/waiter HTTP/1.1"),
    "fragment in the target": _ours(400, request="GET /ws/waiter#here HTTP/1.1"),
    "body announced": _ours(400, "Content-Length: 5"),
    "chunked body announced": _ours(400, "Transfer-Encoding: chunked"),
    "both bodies announced": _ours(400, "Content-Length: 5", "Transfer-Encoding: chunked"),
    "content-length no number": _ours(400, "Content-Length: five"),
    "content-length negative": _ours(400, "Content-Length: -1"),
    "101 headers": _ours(431, *["X-More: y"] * 96),
    # Repeated
    "two hosts": _ours(400, "Host: gateway.example"),
    "two keys": _ours(400, f"Sec-WebSocket-Key: {KEY}"),
    "two version headers": _ours(400, "Sec-WebSocket-Version: 13"),
    "two upgrades": _ours(400, "Upgrade: websocket"),
    "two origins": _ours(400, "Origin: http://a.example", "origin: http://b.example"),
    "two credentials": _ours(400, "Authorization: Bearer a", "Authorization: Bearer b"),
    "two content-lengths": _ours(400, "Content-Length: 0", "Content-Length: 0"),
    # Folded, truncated, with odd bytes
    "folded host": _ours(400, host="gateway\r\n .example"),
    "folded upgrade": _ours(400, upgrade="\r\n websocket"),
    "folded with a tab": _ours(400, connection="keep-alive,\r\n\tUpgrade"),
    "space before the colon": _raw(400, make_head().decode().replace("Host:", "Host :")),
    "no colon": _ours(400, "Just words"),
    "no name": _ours(400, ": value"),
    "NUL in a value": _ours(400, host="gateway\0.example"),
    "NUL in the target": _ours(400, request="GET /ws/waiter\0 HTTP/1.1"),
    "bare CR in a value": _ours(400, host="gateway\r.example"),
    "bare LF after one line": _raw(
        400, make_head().decode().replace("gateway.example\r\n", "gateway.example\n")
    ),
    "bare LF after every line": _raw(400, make_head().decode().replace("\r\n", "\n")),
    "bytes above 0x7f in a name": _ours(400, "X-N\xe9: y"),
    "bytes above 0x7f in the target": _ours(400, request="GET /ws/waiter?\xe9 HTTP/1.1"),
    **{f"bytes above 0x7f in {name}": _with_high_byte(name) for name in _READ_HEADERS},
    "nothing but empty lines": _raw(400, "\r\n\r\n"),
    "TLS hello with empty lines": _raw(400, "\x16\x03\x01\x02\x00\x01\n\n"),
    "no request at all": _raw(400, "hello\r\n\r\n"),
    # Not an upgrade to WebSocket
    "health": _raw(200, "GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n", "hypercorn"),
    "plain GET of an endpoint": _raw(
        426, "GET /ws/waiter HTTP/1.1\r\nHost: a\r\n\r\n", "hypercorn"
    ),
    "plain GET of nothing": _raw(404, "GET / HTTP/1.1\r\nHost: a\r\n\r\n", "hypercorn"),
    "HTTP/1.0 health": _raw(200, "GET /ws/health HTTP/1.0\r\nHost: a\r\n\r\n", "hypercorn"),
    "two hosts, no upgrade": _raw(
        400, "GET /ws/health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", "hypercorn"
    ),
    "HTTP/2 preface": _raw(400, "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/2 preface behind an empty line": _raw(400, "\r\nPRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"),
    "HTTP/3.0": _raw(400, "GET /ws/health HTTP/3.0\r\nHost: a\r\n\r\n"),
    "h2c": _raw(  # an upgrade that a server may ignore
        200,
        "GET /ws/health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
        "Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n",
        "hypercorn",
    ),
}


def client_frame(
    opcode: int, payload: bytes | str = b"", *, fin: bool = True, rsv: int = 0, masked: bool = True
) -> bytes:
    """A client's frame, valid or invalid (RFC 6455, 5.2)."""
    data = payload.encode() if isinstance(payload, str) else payload
    size = len(data)
    first, mask = fin << 7 | rsv << 4 | opcode, masked << 7
    if size < 126:
        start = bytes([first, mask | size])
    elif size < 1 << 16:
        start = bytes([first, mask | 126]) + size.to_bytes(2, "big")
    else:
        start = bytes([first, mask | 127]) + size.to_bytes(8, "big")
    if not masked:
        return start + data
    repeated = int.from_bytes((_MASK * (size // 4 + 1))[:size], "big")
    return start + _MASK + (int.from_bytes(data, "big") ^ repeated).to_bytes(size, "big")


def close_payload(code: int, reason: str = "") -> bytes:
    return code.to_bytes(2, "big") + reason.encode()


def take_frames(data: bytearray) -> Iterator[tuple[int, bytes]]:
    """Remove the complete frames from the front of a buffer; returns opcodes and payloads."""
    while len(data) >= 2:
        size, start = data[1], 2
        if size >= 126:
            start += 2 if size == 126 else 8
            size = int.from_bytes(data[2:start], "big")
        if len(data) < start + size:
            return
        opcode, payload = data[0] & 0x0F, bytes(data[start : start + size])
        assert data[0] & 0x70 == 0, "a reserved bit is set"
        del data[: start + size]
        yield opcode, payload


class Client:
    """A client that sends any bytes, valid or not."""

    def __init__(self, stream: trio.abc.HalfCloseableStream) -> None:
        self.stream = stream
        self._data = bytearray()

    async def send(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def say(self, text: str) -> None:
        await self.send(client_frame(TEXT, text))

    async def upgrade(
        self, target: str = "/ws/waiter", *more: str, behind: bytes = b"", **changes: Any
    ) -> "Client":
        """Upgrade to a WebSocket; ``behind`` is sent directly after the head."""
        request = f"GET {target} HTTP/1.1"
        await self.send(make_head(*more, request=request, **changes) + behind)
        status, _ = await self.response()
        assert status == 101
        return self

    async def response(self) -> tuple[int, bytes]:
        """Status and body of an HTTP response; a 101 has none."""
        while (end := self._data.find(b"\r\n\r\n")) < 0:
            await self._more()
        head = bytes(self._data[:end]).decode("latin-1")
        del self._data[: end + 4]
        status = int(head.split(" ")[1])
        size = 0
        for line in head.splitlines():
            name, _, value = line.partition(":")
            if name.lower() == "content-length":
                size = int(value)
        return status, await self._take(size)

    async def frame(self) -> tuple[int, bytes]:
        """Opcode and payload of the next frame. Raises :exc:`EOFError` if there is none."""
        while (found := next(take_frames(self._data), None)) is None:
            await self._more()
        return found

    async def contains(self, wanted: bytes) -> bool:
        """Read until these bytes have arrived; False if the stream ends before."""
        while wanted not in self._data:
            try:
                await self._more()
            except EOFError:
                return False
        return True

    async def text(self) -> str:
        """The next message; pings and pongs before it are skipped."""
        while (frame := await self.frame())[0] in {PING, PONG}:
            pass
        assert frame[0] == TEXT, frame
        return frame[1].decode()

    async def closed(self) -> tuple[int, str]:
        """Code and reason of the close frame; frames before it are skipped."""
        while (frame := await self.frame())[0] != CLOSE:
            pass
        return int.from_bytes(frame[1][:2], "big"), frame[1][2:].decode()

    async def pings(self) -> None:
        """Check that the client is served: a ping is answered, in both forms."""
        await self.send(client_frame(PING, b"hm") + client_frame(TEXT, "ping"))
        assert await self.frame() == (PONG, b"hm")
        assert await self.frame() == (TEXT, PONG_TEXT.encode())

    async def rest(self) -> bytes:
        """Everything until the peer has ended or reset the connection."""
        try:
            while True:
                await self._more()
        except (EOFError, trio.BrokenResourceError):
            return bytes(self._data)

    async def half_close(self) -> None:
        await self.stream.send_eof()

    async def leave(self) -> None:
        await trio.aclose_forcefully(self.stream)

    async def reset(self) -> None:
        """Disconnect with a TCP reset instead of a FIN."""
        assert isinstance(self.stream, trio.SocketStream)
        self.stream.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        await self.leave()

    async def _take(self, size: int) -> bytes:
        while len(self._data) < size:
            await self._more()
        taken = bytes(self._data[:size])
        del self._data[:size]
        return taken

    async def _more(self) -> None:
        received = await self.stream.receive_some(65_536)
        if not received:
            raise EOFError
        self._data += received


@asynccontextmanager
async def dialled(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[Client]:
    """A client on a real socket, disconnected at the end."""
    with trio.socket.socket() as sock:
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        await sock.connect(("127.0.0.1", port))
        yield Client(trio.SocketStream(sock))


class _SocketStandIn:
    """The socket methods that Hypercorn calls, for a stream in memory."""

    family = socket.AF_INET

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def getpeername(self) -> tuple[str, int]:
        return "127.0.0.1", 50_000

    def getsockname(self) -> tuple[str, int]:
        return "127.0.0.1", 8001

    def fileno(self) -> int:
        return 0

    def setsockopt(self, *option: object) -> None:
        pass

    def getsockopt(self, *option: object) -> int:
        return 0

    def close(self) -> None:
        self._stream.send_stream.close()
        self._stream.receive_stream.close()


Dial = Callable[[], Client]


@asynccontextmanager
async def in_memory(
    app: Gateway, pair: Callable[[], tuple[Any, Any]] = memory_stream_pair
) -> AsyncIterator[Dial]:
    """Serve over streams in memory: each call connects a client.

    What a connection raises ends the nursery, as it would end Hypercorn's server.
    """
    config = Config()
    config.include_date_header = config.include_server_header = False
    config.errorlog = None
    wrapped, context = ASGIWrapper(app), WorkerContext(None)
    async with trio.open_nursery() as nursery:

        def dial() -> Client:
            ours, theirs = pair()
            theirs.socket = _SocketStandIn(theirs)
            served = TcpConnection(wrapped, config, context, ConnectionState({}), theirs)
            nursery.start_soon(served.run)
            return Client(ours)

        yield dial
        nursery.cancel_scope.cancel()
