"""The private parts of Hypercorn that this package replaces, overrides or reads.

If a test fails with a new Hypercorn, adapt the transports before you raise the version in
pyproject.toml. Until then the ASGI transport serves every client, but slower.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import hypercorn.protocol
import hypercorn.protocol.h2
import hypercorn.protocol.h11
import hypercorn.trio.run
import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.http_stream import HTTPStream
from hypercorn.protocol.ws_stream import WebsocketBuffer, WSStream
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from trio.testing import memory_stream_pair

from trio_gateway.transports.asgi import control_of
from trio_gateway.transports.hypercorn_bounds import (
    BoundedBuffer,
    BoundedH2,
    BoundedH11,
    BoundedHttp,
    BoundedStream,
)
from trio_gateway.transports.hypercorn_server import HypercornServer, PrefixedStream
from trio_gateway.transports.tcp import TcpConnection, install

REPLACED: list[tuple[ModuleType, str, type, Callable[..., Any], str]] = [
    (hypercorn.trio.run, "TCPServer", TcpConnection, hypercorn.trio.run.worker_serve, "TCPServer,"),
    (
        hypercorn.protocol, "H11Protocol", BoundedH11,
        hypercorn.protocol.ProtocolWrapper.__init__, "H11Protocol(",
    ),
    (
        hypercorn.protocol, "H2Protocol", BoundedH2,
        hypercorn.protocol.ProtocolWrapper.__init__, "H2Protocol(",
    ),
    (hypercorn.protocol.h11, "HTTPStream", BoundedHttp, H11Protocol._create_stream, "HTTPStream("),
    (hypercorn.protocol.h2, "HTTPStream", BoundedHttp, H2Protocol._create_stream, "HTTPStream("),
    (hypercorn.protocol.h11, "WSStream", BoundedStream, H11Protocol._create_stream, "WSStream("),
    (hypercorn.protocol.h2, "WSStream", BoundedStream, H2Protocol._create_stream, "WSStream("),
    (hypercorn.protocol.h2, "StreamBuffer", BoundedBuffer, H2Protocol._create_stream,
     "StreamBuffer("),
]  # fmt: skip

OVERRIDDEN = {
    (HypercornServer, TCPServer): ("protocol_send", "_read_data", "_initiate_server_close"),
    (BoundedHttp, HTTPStream): ("handle", "app_send"),
    (BoundedH11, H11Protocol): ("_check_protocol", "_create_stream", "stream_send"),
    (BoundedH2, H2Protocol): ("stream_send",),
    (BoundedStream, WSStream): ("handle", "_accept", "_handle_events"),
    (BoundedBuffer, StreamBuffer): ("push", "drain", "pop"),
}


@pytest.mark.parametrize(
    ("module", "name", "ours", "where", "use"),
    REPLACED,
    ids=[f"{each[0].__name__}.{each[1]}" for each in REPLACED],
)
def test_replaced_class_is_looked_up_by_its_name(
    module: ModuleType, name: str, ours: type, where: Callable[..., Any], use: str
) -> None:
    install(10.0)

    assert getattr(module, name) is ours
    assert where.__globals__ is vars(module)
    assert use in inspect.getsource(where)


@pytest.mark.parametrize(
    ("ours", "base", "method"),
    [(*pair, method) for pair, methods in OVERRIDDEN.items() for method in methods],
)
def test_overridden_method_has_the_signature_of_its_base(
    ours: type, base: type, method: str
) -> None:
    overridden = vars(base)[method]

    assert method in vars(ours)
    assert inspect.iscoroutinefunction(overridden)
    assert [*inspect.signature(vars(ours)[method]).parameters] == [
        *inspect.signature(overridden).parameters
    ]


@pytest.mark.parametrize(("ours", "base"), OVERRIDDEN)
def test_no_other_method_is_overridden(ours: type, base: type) -> None:
    shared = {name for name in vars(ours).keys() & vars(base) if not name.startswith("__")}

    assert shared == set(OVERRIDDEN[ours, base])


def test_tcp_server_has_the_arguments_of_a_connection_and_is_awaited() -> None:
    names = ["app", "config", "context", "state", "stream"]

    assert [*inspect.signature(TCPServer).parameters] == names
    assert [*inspect.signature(TcpConnection).parameters][:5] == names
    assert "self.run().__await__()" in inspect.getsource(TCPServer.__await__)


async def test_tcp_server_has_the_attributes_that_the_overrides_use() -> None:
    stream, _ = memory_stream_pair()
    app = ASGIWrapper(lambda *_: None)  # type: ignore[arg-type]
    server = HypercornServer(
        app, Config(), WorkerContext(None), {"of": "lifespan"}, stream,
        received=b"GET", write_timeout=7.0,
    )  # fmt: skip

    assert isinstance(server.send_lock, trio.Lock)
    assert isinstance(server.stream, PrefixedStream)
    assert server.state["of"] == "lifespan"
    control = control_of(server.state)
    assert control is not None
    assert (control.traffic(), control.write_timeout) == ((0, 0), 7.0)
    run = inspect.getsource(TCPServer.run)
    assert "self.protocol = ProtocolWrapper(" in run
    assert "self._task_group = task_group" in run
    assert "ConnectionState(self.state)" in run
    assert "self.stream.do_handshake()" in run
    assert "self.stream.receive_some" in inspect.getsource(TCPServer._read_data)


def test_hypercorn_has_the_attributes_that_the_bounds_read() -> None:
    assert isinstance(vars(StreamBuffer(trio.Event))["buffer"], bytearray)  # type: ignore[arg-type]
    assert {"_complete", "_is_empty", "_paused"} <= vars(StreamBuffer(trio.Event)).keys()  # type: ignore[arg-type]
    assert {"extend", "clear", "to_message"} <= vars(WebsocketBuffer).keys()
    for name in ("connection_state", "stream_buffers", "priority", "has_data"):
        assert f"self.{name}" in inspect.getsource(H2Protocol.__init__)
    assert hasattr(H2Protocol, "_flush")
    for name in ("buffer", "app_put", "handshake", "connection"):
        assert f"self.{name}" in inspect.getsource(WSStream.__init__)
    assert hasattr(WSStream, "_send_wsproto_event")
    closing = inspect.getsource(HTTPStream._send_closed)
    assert closing.index("self.state = ASGIHTTPState.CLOSED") < closing.index("StreamClosed")
    assert "self.connection: h11.Connection" in inspect.getsource(H11Protocol.__init__)
    assert "self.protocol" in inspect.getsource(hypercorn.protocol.ProtocolWrapper.__init__)
    assert hasattr(H11Protocol, "_send_error_response")
    assert hasattr(WorkerContext(None), "terminated")
    assert Config().ssl_handshake_timeout > 0


async def test_bytes_put_back_are_received_first() -> None:
    ours, theirs = memory_stream_pair()
    stream = PrefixedStream(theirs, b"abc")
    await ours.send_all(b"de")

    assert await stream.receive_some(2) == b"ab"
    assert await stream.receive_some() == b"c"
    assert await stream.receive_some() == b"de"
