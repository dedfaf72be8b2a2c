"""HTTP/2: accepted only if TLS negotiated it, and with deadlines although flow control blocks."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import h2.config
import h2.connection
import h2.events
import h2.settings
import pytest
import structlog
import trio
from hypercorn.config import Config
from trio.testing import wait_all_tasks_blocked

from tests.support.gateways import Running, connect, make_settings, running, until, with_certificate
from tests.support.sockets import PONG_TEXT, Client, client_frame, dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import TEXT
from trio_gateway.testing import NullAuth

NO_REDIS: Final = "redis://127.0.0.1:1"
EVERYBODY: Final = dict.fromkeys(Endpoint, NullAuth())
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
SETTINGS: Final = b"\0\0\0\4\0\0\0\0\0"
HEALTH: Final = b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n"
UPGRADE: Final = (
    b"GET /ws/health HTTP/1.1\r\nHost: a\r\nConnection: Upgrade, HTTP2-Settings\r\n"
    b"Upgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n\r\n"
)


class Served(NamedTuple):
    gateway: Running
    trusting: ssl.SSLContext


@asynccontextmanager
async def serving(folder: Path, **changes: Any) -> AsyncIterator[Served]:
    """A gateway with HTTP/2 and HTTP/1.1 over TLS, chosen by ALPN."""
    config = Config()
    config.alpn_protocols = ["h2", "http/1.1"]
    config.graceful_timeout = 0.5
    trusting = with_certificate(config, folder)
    made = make_settings(NO_REDIS, **changes)
    async with running(made, auth=EVERYBODY, wait_ready=False, config=config) as gateway:
        yield Served(gateway, trusting)


@asynccontextmanager
async def dial_tls(served: Served, protocol: str | None) -> AsyncIterator[Client]:
    """A client over TLS that offers this protocol by ALPN."""
    if protocol is not None:
        served.trusting.set_alpn_protocols([protocol])
    with trio.fail_after(5):
        stream = await trio.open_ssl_over_tcp_stream(
            "localhost", served.gateway.port, ssl_context=served.trusting, https_compatible=True
        )
        await stream.do_handshake()
    try:
        anything: Any = stream
        yield Client(anything)
    finally:
        await trio.aclose_forcefully(stream)


class Peer:
    """An HTTP/2 client with this initial window. The test opens the windows further."""

    def __init__(self, client: Client, window: int | None = None) -> None:
        self.client = client
        self.data: dict[int, bytes] = {}
        self.status: dict[int, str] = {}
        self.resets: set[int] = set()
        self.h2 = h2.connection.H2Connection(
            h2.config.H2Configuration(
                client_side=True, validate_outbound_headers=False, header_encoding="utf-8"
            )
        )
        if window is not None:
            self.h2.local_settings = h2.settings.Settings(
                client=True,
                initial_values={h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window},
            )
        self.h2.initiate_connection()

    async def ask(self, path: str, *, method: str = "GET") -> int:
        stream = self.h2.get_next_available_stream_id()
        head = [(":method", method), (":path", path), (":scheme", "https"), (":authority", "a")]
        self.h2.send_headers(stream, head, end_stream=True)
        await self.flush()
        return stream

    async def upgrade(self, path: str) -> int:
        """A WebSocket (RFC 8441)."""
        stream = self.h2.get_next_available_stream_id()
        head = [
            (":method", "CONNECT"), (":protocol", "websocket"), (":path", path),
            (":scheme", "https"), (":authority", "a"),
            ("sec-websocket-version", "13"), ("sec-websocket-protocol", "gateway.v1"),
        ]  # fmt: skip
        self.h2.send_headers(stream, head)
        await self.flush()
        return stream

    async def flush(self) -> None:
        await self.client.send(self.h2.data_to_send())

    async def read(self) -> None:
        received = bytes(await self.client.stream.receive_some(65_536))
        if not received:
            raise EOFError
        for event in self.h2.receive_data(received):
            match event:
                case h2.events.ResponseReceived():
                    self.status[event.stream_id] = str(dict[Any, Any](event.headers)[":status"])
                case h2.events.DataReceived():
                    before = self.data.get(event.stream_id, b"")
                    self.data[event.stream_id] = before + bytes(event.data)
                case h2.events.StreamReset():
                    self.resets.add(event.stream_id)
        await self.flush()

    async def answers(self) -> bool:
        return await self.status_of(await self.ask("/ws/health")) == "200"

    async def status_of(self, stream: int) -> str:
        with trio.fail_after(5):
            while stream not in self.status:
                await self.read()
        return self.status[stream]


# Not negotiated


@pytest.mark.parametrize("tls", [None, "no protocol", "http/1.1"])
async def test_http2_preface_is_400_if_not_negotiated(tls: str | None, tmp_path: Path) -> None:
    sent = PREFACE + SETTINGS
    async with serving(tmp_path) as served:
        for cut in (1, 10, 16, 20, len(PREFACE)):
            if tls is None:
                dial = dialled_plainly(served)
            else:
                dial = dial_tls(served, None if tls == "no protocol" else tls)
            async with dial as client:
                await client.send(sent[:cut])
                await wait_all_tasks_blocked()
                await client.send(sent[cut:])
                assert (await client.response())[0] == 400


@asynccontextmanager
async def dialled_plainly(served: Served) -> AsyncIterator[Client]:
    """A client without TLS, of the same server behind a plain listener."""
    made = make_settings(NO_REDIS)
    async with (
        running(made, auth=EVERYBODY, wait_ready=False) as gateway,
        dialled(gateway.port) as client,
    ):
        yield client


@pytest.mark.parametrize("tls", [False, True])
@pytest.mark.parametrize("requests_before", [0, 1, 2])
async def test_upgrade_to_http2_is_ignored(tls: bool, requests_before: int, tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        dial = dial_tls(served, "http/1.1") if tls else dialled_plainly(served)
        async with dial as client:
            for _ in range(requests_before):
                await client.send(HEALTH)
                assert (await client.response())[0] == 200
            await client.send(UPGRADE + HEALTH)
            assert [(await client.response())[0] for _ in range(2)] == [200, 200]
            await client.send(PREFACE + SETTINGS)
            assert (await client.response())[0] == 400


# Negotiated


async def test_http2_over_tls_is_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as served, dial_tls(served, "h2") as client:
        peer = Peer(client)
        assert await peer.answers()
        stream = await peer.upgrade("/ws/waiter")
        assert await peer.status_of(stream) == "200"
        peer.h2.send_data(stream, client_frame(TEXT, "ping"))
        await peer.flush()
        with trio.fail_after(5):
            while PONG_TEXT.encode() not in peer.data.get(stream, b""):
                await peer.read()


@pytest.mark.parametrize("bad", ["no path", "data on no stream"])
async def test_invalid_http2_affects_no_other_client(bad: str, tmp_path: Path) -> None:
    async with serving(tmp_path) as served:
        url = f"wss://localhost:{served.gateway.port}/ws/waiter"
        async with connect(url, ssl_context=served.trusting) as other:
            async with dial_tls(served, "h2") as client:
                with structlog.testing.capture_logs() as logs:
                    if bad == "no path":
                        peer = Peer(client)
                        head = [(":method", "CONNECT"), (":authority", "a")]
                        peer.h2.send_headers(1, head)
                        await peer.flush()
                        await until(lambda: "connection failed" in [e["event"] for e in logs])
                    else:
                        await client.send(PREFACE + SETTINGS + b"\0\0\1" + b"\0" * 6 + b"x")
                    await client.rest()
            await other.send_message("ping")
            assert await other.get_message() == PONG_TEXT


async def test_stream_without_a_window_is_closed_as_slow(tmp_path: Path) -> None:
    async with (
        serving(tmp_path, ws_write_timeout=0.2, ws_outbox_bytes=50_000_000) as served,
        dial_tls(served, "h2") as client,
    ):
        app = served.gateway.app
        peer = Peer(client)
        await peer.ask("/ws/waiter/events")
        await until(lambda: app.parts.hub.connections)
        (connection,) = app.parts.hub.connections
        for _ in range(5):
            connection.send(b"1" * 100_000)
        await until(lambda: not app.parts.hub.connections, 2)
        await app.parts.hub.wait_empty()
        assert app.parts.hub.closed == {Close.SLOW_CONSUMER: 1}
        while len(peer.data.get(1, b"")) < 65_535:  # the window
            received = bytes(await client.stream.receive_some(65_536))
            for event in peer.h2.receive_data(received):
                if isinstance(event, h2.events.DataReceived):
                    peer.data[1] = peer.data.get(1, b"") + bytes(event.data)
        assert peer.data[1].startswith(b"retry: 3000\n\ndata: 111")


async def test_zero_window_ends_with_the_write_timeout_and_leaves_no_task(
    tmp_path: Path,
) -> None:
    """For WebSockets that are refused or closed, event streams, and plain requests."""
    async with serving(tmp_path, ws_write_timeout=0.3) as served:
        app = served.gateway.app
        async with dial_tls(served, "h2") as client:
            assert await Peer(client).answers()
        await wait_all_tasks_blocked(0.05)
        before = trio.lowlevel.current_statistics().tasks_living
        async with dial_tls(served, "h2") as client:
            peer = Peer(client, window=0)
            for _ in range(5):
                await peer.ask("/ws/health")
                await peer.ask("/ws/kitchen/events")
                await peer.upgrade("/ws/waiter")
            await until(lambda: len(app.parts.hub) == 10)
            for connection in list(app.parts.hub.connections):
                connection.send(b"x" * 100)
                connection.close(Close.GOING_AWAY)
            await app.parts.hub.wait_empty()
            watch = Stopwatch()
            with trio.fail_after(30):
                while len(peer.resets) < 15:
                    await peer.read()
            assert watch.net < 3
            assert await peer.answers()  # the connection itself still works
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= before, 3)


async def test_zero_window_does_not_delay_the_shutdown(tmp_path: Path) -> None:
    async with trio.open_nursery() as nursery:
        opened = trio.Event()

        async def hold(served: Served) -> None:
            async with dial_tls(served, "h2") as client:
                peer = Peer(client, window=0)
                for _ in range(5):
                    await peer.ask("/ws/health")
                    await peer.ask("/ws/kitchen/events")
                    await peer.upgrade("/ws/waiter")
                opened.set()
                await trio.sleep_forever()

        async with serving(tmp_path) as served:
            nursery.start_soon(hold, served)
            await opened.wait()
            await until(lambda: len(served.gateway.app.parts.hub) == 10)
            for connection in served.gateway.app.parts.hub.connections:
                connection.send(b"x" * 100_000)
            watch = Stopwatch()
            served.gateway.stop.set()
        assert watch.net < 2.5
        nursery.cancel_scope.cancel()
