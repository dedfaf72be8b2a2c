"""Slow clients with a real Redis and real sockets: they lag, and miss no durable event."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Final

import pytest
import redis
import trio

from tests.support.gateways import JWT_SECRET, Running, make_settings, running, until
from tests.support.sockets import Client, dialled
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import TEXT
from trio_gateway.testing import make_jwt, make_payload

STREAM: Final = "events:critical"
HEALTH: Final = b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n"
UNLIMITED: Final = {"ws_max_connections_per_user": 1000}


def target(user: int) -> str:
    return f"/ws/waiter?token={make_jwt(JWT_SECRET, sub=str(user))}"


async def upgrade(client: Client, path: str) -> None:
    await client.upgrade(path)


async def upgrade_later(client: Client, path: str) -> None:
    """The second request of a connection goes through Hypercorn and Quart."""
    await client.send(HEALTH)
    await client.response()
    await upgrade(client, path)


async def listen(client: Client, path: str) -> None:
    path = path.replace("?", "/events?")
    await client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())


TRANSPORTS: Final[Mapping[str, Callable[[Client, str], Awaitable[None]]]] = {
    "direct": upgrade,
    "ASGI": upgrade_later,
    "event stream": listen,
}


@asynccontextmanager
async def opened(gateway: Running, transport: str, user: int) -> AsyncIterator[Client]:
    """A client with small buffers that is live."""
    async with dialled(gateway.port, receive_buffer=4096) as client:
        before = len(gateway.app.parts.hub)
        await TRANSPORTS[transport](client, target(user))
        await until(lambda: len(gateway.app.parts.hub) > before)
        yield client


async def live(gateway: Running) -> None:
    await until(lambda: not gateway.app.parts.hub.held)


def publish(backend: "redis.Redis", first: int, last: int, *, size: int = 0) -> None:
    with backend.pipeline(transaction=False) as pipe:
        for n in range(first, last):
            pipe.xadd(STREAM, {"data": make_payload(entity={"n": n}, x="x" * size)})
        pipe.execute()


async def numbers(client: Client, transport: str, count: int) -> list[int]:
    """The numbers of the next ``count`` events."""
    if transport != "event stream":
        return [json.loads(await client.text())["entity"]["n"] for _ in range(count)]
    data, found = b"", list[int]()
    while len(found) < count:
        received = await client.stream.receive_some(65_536)
        assert received, "the stream has ended"
        *lines, data = (data + received).split(b"\n")
        found += [
            json.loads(line.removeprefix(b"data: "))["entity"]["n"]
            for line in lines
            if line.startswith(b"data: {")
        ]
    return found


def written(gateway: Running) -> int:
    """How many events the delivery times count as written."""
    times = gateway.app.parts.dispatch.times
    return times.figures(1, trio.current_time()).last_hour.written.count


@pytest.mark.parametrize("transport", TRANSPORTS)
async def test_client_that_falls_behind_gets_every_durable_event_in_order(
    backend: "redis.Redis", redis_url: str, transport: str
) -> None:
    settings = make_settings(redis_url, ws_outbox_bytes=100_000)
    async with running(settings) as gateway, opened(gateway, transport, 1) as client:
        hub, replays = gateway.app.parts.hub, gateway.app.parts.replays
        await live(gateway)
        publish(backend, 0, 4000, size=2000)
        await until(lambda: hub.lagging)
        with trio.fail_after(10):
            assert await numbers(client, transport, 4000) == list(range(4000))
        await until(lambda: not hub.lagging)
        publish(backend, 4000, 4001)
        with trio.fail_after(2):
            assert await numbers(client, transport, 1) == [4000]
        assert replays.feeding.lags >= 1
        await until(lambda: written(gateway) == 4001)  # each once, though it was counted again
        assert not hub.closed


async def test_burst_closes_no_client_and_loses_nothing(
    backend: "redis.Redis", redis_url: str
) -> None:
    """The clients do not read while the burst is delivered: their process has no core."""
    async with running(make_settings(redis_url, **UNLIMITED)) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(opened(gateway, "direct", n)) for n in range(15)]
        await live(gateway)
        publish(backend, 0, 4000, size=800)
        await until(lambda: len(gateway.app.parts.hub.lagging) == len(clients), 10)
        found = dict[Client, list[int]]()

        async def read(client: Client) -> None:
            found[client] = [n async for n in events(client, 4000)]

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(read, client)
        assert all(each == list(range(4000)) for each in found.values())
        assert len(found) == len(clients)
        assert not gateway.app.parts.hub.closed


async def test_burst_on_pubsub_reaches_whole_the_clients_that_read(
    backend: "redis.Redis", redis_url: str
) -> None:
    """More than all buffers hold, beside a client that is stuck."""

    def publish_all() -> None:
        with backend.pipeline(transaction=False) as pipe:
            for n in range(4000):
                pipe.publish(
                    "channel:branch:1:waiters", make_payload(entity={"n": n}, x="x" * 2000)
                )
            pipe.execute()

    async with running(make_settings(redis_url)) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(opened(gateway, "direct", n)) for n in range(3)]
        await stack.enter_async_context(opened(gateway, "direct", 9))
        await live(gateway)
        found = dict[Client, list[int]]()

        async def read(client: Client) -> None:
            found[client] = [n async for n in events(client, 4000)]

        with trio.fail_after(30):
            async with trio.open_nursery() as nursery:
                for client in clients:
                    nursery.start_soon(read, client)
                nursery.start_soon(trio.to_thread.run_sync, publish_all)
        assert all(found[client] == list(range(4000)) for client in clients)
        assert gateway.app.parts.replays.feeding.lags == 1
        assert gateway.app.parts.pubsub_queue.dropped == 0


async def events(client: Client, count: int) -> AsyncIterator[int]:
    for _ in range(count):
        opcode, payload = await client.frame()
        if opcode == TEXT:
            yield int(payload.partition(b'"n": ')[2].partition(b"}")[0])


async def test_frozen_client_is_closed_after_the_write_timeout_and_delays_nobody(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, ws_write_timeout=0.6, ws_outbox_bytes=100_000)
    async with (
        running(settings) as gateway,
        opened(gateway, "direct", 1),
        opened(gateway, "direct", 2) as reader,
    ):
        hub = gateway.app.parts.hub
        await live(gateway)
        publish(backend, 0, 4000, size=1000)
        with trio.fail_after(10):
            assert [n async for n in events(reader, 4000)] == list(range(4000))
        await until(lambda: hub.closed == {Close.SLOW_CONSUMER: 1})
        publish(backend, 4000, 4001)
        with trio.fail_after(2):
            assert [n async for n in events(reader, 1)] == [4000]
