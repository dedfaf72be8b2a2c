"""Deadlines measure progress: a slow client stays connected, a stuck one is closed."""

import os
import signal
import ssl
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import trio
from hypercorn.config import Config
from trio.testing import wait_all_tasks_blocked

from tests.support.gateways import (
    TABLE_SECRET,
    Running,
    environment,
    free_port,
    make_settings,
    process,
    running,
    until,
    wait,
    with_certificate,
)
from tests.support.sockets import PONG_TEXT, Client, dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.close_codes import Close
from trio_gateway.gateway import Gateway
from trio_gateway.testing import make_payload, make_principal, make_table_token
from trio_gateway.transports.progress import ProgressStream, acknowledged, wait_writable

NO_REDIS: Final = "redis://127.0.0.1:1"
WRITE_TIMEOUT: Final = 0.6
HEALTH: Final = b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n"


class BySession:
    """Admits every client as a diner of the session that its token names."""

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        await trio.lowlevel.checkpoint()
        return make_principal(Endpoint.DINER, session=int(credential))


@asynccontextmanager
async def serving(config: Config | None = None, **changes: Any) -> AsyncIterator[Running]:
    settings = make_settings(
        NO_REDIS, **{"ws_write_timeout": WRITE_TIMEOUT, "ws_outbox_bytes": 50_000_000} | changes
    )
    auth = dict.fromkeys(Endpoint, BySession())
    async with running(settings, auth=auth, wait_ready=False, config=config) as gateway:
        yield gateway


async def upgrade(client: Client, session: int) -> None:
    await client.upgrade(f"/ws/diner?table_token={session}")


async def upgrade_later(client: Client, session: int) -> None:
    await client.send(HEALTH)
    await client.response()
    await upgrade(client, session)


async def listen(client: Client, session: int) -> None:
    await client.send(
        f"GET /ws/diner/events?table_token={session} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    )


TRANSPORTS: Final[Mapping[str, Callable[[Client, int], Awaitable[None]]]] = {
    "direct": upgrade,
    "second request": upgrade_later,
    "event stream": listen,
}


@asynccontextmanager
async def opened(gateway: Running, name: str, tls: ssl.SSLContext | None) -> AsyncIterator[Client]:
    """A client with small buffers."""
    async with dialled(gateway.port, receive_buffer=4096) as client:
        if tls is not None:
            plain: Any = client.stream
            stream: Any = trio.SSLStream(
                plain, tls, server_hostname="localhost", https_compatible=True
            )
            client = Client(stream)
        await TRANSPORTS[name](client, 1)
        yield client


async def read_slowly(client: Client) -> None:
    """Read 20 KB/s continuously. The kernel acknowledges that every 0.3 s."""
    stream: Any = client.stream
    carrier = getattr(stream, "transport_stream", stream)
    while True:
        await carrier.receive_some(512)
        await trio.sleep(0.025)


def fill(app: Gateway, size: int = 8_000_000) -> None:
    for connection in app.parts.hub.connections:
        for _ in range(size // 50_000):
            connection.send(b"x" * 50_000)


@pytest.mark.parametrize("with_tls", [False, True])
async def test_slow_reader_stays_connected_and_stuck_reader_is_closed(
    with_tls: bool, tmp_path: Any
) -> None:
    config = Config()
    tls = with_certificate(config, tmp_path) if with_tls else None
    async with serving(config) as gateway, AsyncExitStack() as stack:
        hub = gateway.app.parts.hub
        slow = [await stack.enter_async_context(opened(gateway, name, tls)) for name in TRANSPORTS]
        await until(lambda: len(hub) == len(slow))
        staying = set(hub.connections)
        stuck = [await stack.enter_async_context(opened(gateway, name, tls)) for name in TRANSPORTS]
        await until(lambda: len(hub) == len(slow) + len(stuck))
        async with trio.open_nursery() as nursery:
            for client in slow:
                nursery.start_soon(read_slowly, client)
            fill(gateway.app)
            await trio.sleep(4 * WRITE_TIMEOUT)
            left = {connection: connection.code for connection in staying if connection.ending}
            nursery.cancel_scope.cancel()
        assert not left
        assert set(hub.connections) == staying
        assert hub.closed == {Close.SLOW_CONSUMER: len(stuck)}


async def test_plain_response_may_take_any_time_while_bytes_are_accepted() -> None:
    async with (
        serving() as gateway,
        dialled(gateway.port, receive_buffer=4096) as slow,
        dialled(gateway.port, receive_buffer=4096) as stuck,
    ):
        gateway.app.add_url_rule("/big", "big", lambda: "x" * 20_000_000)
        for client in (slow, stuck):
            await client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
        with trio.move_on_after(4 * WRITE_TIMEOUT) as reading:
            await read_slowly(slow)
        assert reading.cancelled_caught
        assert len(await stuck.rest()) < 10_000_000
        assert gateway.app.config["RESPONSE_TIMEOUT"] is None


async def test_stuck_clients_delay_the_shutdown_by_the_graceful_timeout_at_most(
    tmp_path: Any,
) -> None:
    config = Config()
    config.graceful_timeout = 0.5
    tls = with_certificate(config, tmp_path)
    async with AsyncExitStack() as stack:
        async with serving(config, ws_write_timeout=10) as gateway:
            for name in TRANSPORTS:
                await stack.enter_async_context(opened(gateway, name, tls))
            await until(lambda: len(gateway.app.parts.hub) == len(TRANSPORTS))
            fill(gateway.app)
            await wait_all_tasks_blocked()
            watch = Stopwatch()
            gateway.stop.set()
        assert watch.net < 2.5  # of a write timeout of 10 s


@pytest.mark.parametrize("workers", [pytest.param(1, marks=pytest.mark.chaos), 2])
async def test_sigterm_exits_with_0_although_clients_do_not_read(
    redis_url: str, tmp_path: Path, workers: int
) -> None:
    port = free_port()
    config = tmp_path / "hypercorn.toml"
    config.write_text(
        f'worker_class = "trio"\nbind = ["127.0.0.1:{port}"]\nworkers = {workers}\n'
        "graceful_timeout = 1\n"
    )
    env = environment(redis_url, WS_OUTBOX_BYTES="50000000", LOG_LEVEL="warning")
    command = ("trio_gateway", "serve", "--config", str(config))
    async with process(*command, env=env, port=port) as started, AsyncExitStack() as stack:
        token = make_table_token(TABLE_SECRET)
        for _ in range(4):
            client = await stack.enter_async_context(dialled(port, receive_buffer=4096))
            await client.send(HEALTH)
            await client.response()
            await client.upgrade(f"/ws/diner?table_token={token}")
            await client.say("ping")
            assert await client.text() == PONG_TEXT
        with redis.Redis.from_url(redis_url) as backend:
            for n in range(160):
                event = make_payload("CART_SYNC", session_id=456, n=n, data="x" * 50_000)
                backend.publish("channel:session:456", event)
        await trio.sleep(0.3)
        watch = Stopwatch()
        os.kill(started.pid, signal.SIGTERM)
        status, _, errors = await wait(started)
        assert (status, errors.count(b"Traceback")) == (0, 0), errors
        assert watch.net < 4  # of a write timeout of 10 s


# The stream


async def test_write_cancelled_before_it_blocks_is_complete() -> None:
    ours, theirs = await tcp_pair()
    stream = ProgressStream(ours, 1)
    with trio.CancelScope() as outer:
        outer.cancel()
        with trio.CancelScope(shield=True) as stream.shield:
            await stream.send_all(b"whole")
    assert not outer.cancelled_caught
    assert await theirs.receive_some(10) == b"whole"

    with trio.move_on_after(0.05) as outer:
        with trio.CancelScope(shield=True) as stream.shield:
            await stream.send_all(b"x" * 20_000_000)
    assert outer.cancelled_caught
    await ours.aclose()
    await theirs.aclose()


async def test_stuck_peer_is_a_timeout_and_a_closed_one_is_not() -> None:
    ours, theirs = await tcp_pair()
    stream = ProgressStream(ours, 0.2)
    watch = Stopwatch()
    with pytest.raises(TimeoutError):
        await stream.send_all(b"x" * 20_000_000)
    assert watch.elapsed >= 0.2
    assert watch.net < 0.6
    await theirs.aclose()
    with pytest.raises(trio.BrokenResourceError):
        await stream.send_all(b"x" * 20_000_000)
    await ours.aclose()
    with pytest.raises(trio.ClosedResourceError):
        await stream.send_all(b"x")
    with pytest.raises(trio.ClosedResourceError):
        await wait_writable(ours.socket, 1)


async def test_socket_that_is_closed_while_it_is_waited_for_is_told() -> None:
    ours, theirs = await tcp_pair()
    async with theirs, trio.open_nursery() as nursery:
        stream = ProgressStream(ours, 10)

        async def fill() -> None:
            with pytest.raises(trio.ClosedResourceError):
                await stream.send_all(b"x" * 20_000_000)

        nursery.start_soon(fill)
        await wait_all_tasks_blocked()
        ours.socket.close()


async def test_acknowledged_bytes_are_counted() -> None:
    ours, theirs = await tcp_pair()
    before = acknowledged(ours.socket)
    await ours.send_all(b"x" * 1000)
    await theirs.receive_some(1000)
    if sys.platform == "linux":
        await until(lambda: acknowledged(ours.socket) == before + 1000)
    left, right = trio.socket.socketpair()
    with left, right:  # a unix socket: the kernel counts no acknowledged bytes
        assert acknowledged(left) == 0
    await ours.aclose()
    await theirs.aclose()


async def tcp_pair() -> tuple[trio.SocketStream, trio.SocketStream]:
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        theirs = await trio.open_tcp_stream(*listener.socket.getsockname())
        return await listener.accept(), theirs
