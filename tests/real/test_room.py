"""Making room over real sockets: a phone that changed networks is admitted again."""

import socket
import sys
from contextlib import AsyncExitStack

import pytest
import redis
import trio

from e2e.chaos.relay import Way, open_relay
from tests.support.event_source import listening
from tests.support.gateways import (
    JWT_SECRET,
    Transport,
    admitted,
    closed,
    connect,
    http,
    make_settings,
    received,
    running,
    settle,
    until,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.close_codes import Close
from trio_gateway.testing import make_jwt, make_payload


@pytest.mark.parametrize("limit", ["user", "session"])
async def test_dead_connections_are_closed_after_two_seconds_and_live_ones_stay(
    redis_url: str, limit: str
) -> None:
    settings = make_settings(redis_url, **{f"ws_max_connections_per_{limit}": 3})
    async with (
        running(settings) as gateway,
        open_relay(gateway.port) as relay,
        AsyncExitStack() as stack,
    ):
        url = gateway.staff_url("waiter") if limit == "user" else gateway.diner_url()
        through = url.replace(f":{gateway.port}", f":{relay.port}")
        alive = await stack.enter_async_context(admitted(url))
        for _ in range(2):
            await stack.enter_async_context(admitted(through))
        relay.vanish()

        codes: list[int] = []

        async def come() -> None:
            async with connect(url) as client:
                codes.append((await closed(client))[0])

        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            for _ in range(3):  # at the same time: two places for three
                nursery.start_soon(come)
            await until(lambda: gateway.app.parts.hub.last_number == 5, 4)
            assert watch.elapsed >= 2
            assert watch.net < 3.5
            await until(lambda: codes, 1)
            assert (
                gateway.app.parts.hub.closed[Close.HEARTBEAT_TIMEOUT]
                + len(gateway.app.parts.hub.leaving)
                == 2
            )
            assert await received(alive) == []
            nursery.cancel_scope.cancel()
        assert codes == [Close.SERVER_OVERLOADED]
        relay.reset()


async def test_tenant_limit_counts_staff_and_diners_and_makes_no_room(redis_url: str) -> None:
    settings = make_settings(redis_url, ws_max_connections_per_tenant=2)
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter")) as staff,
        admitted(gateway.diner_url()),
    ):
        async with connect(gateway.staff_url("kitchen", sub="22")) as client:
            assert await closed(client) == (1013, "too many connections of this tenant")
        assert gateway.app.parts.counts.rejected["tenant_limit"] == 1
        token = make_jwt(JWT_SECRET)
        headers = {"Authorization": f"Bearer {token}"}
        assert (await http(gateway.port, "/ws/waiter/events", headers=headers)).status == 429
        async with admitted(gateway.staff_url("waiter", tenant_id=2)):
            pass
        await staff.aclose()
        await until(lambda: len(gateway.app.parts.hub) == 1)
        async with admitted(gateway.staff_url("kitchen", sub="22")):
            pass


@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_new_connection_is_refused_when_all_others_answer(
    redis_url: str, transport: Transport
) -> None:
    settings = make_settings(redis_url, ws_max_connections_per_user=2)
    async with (
        running(settings, transport=transport) as gateway,
        admitted(gateway.staff_url("waiter")) as first,
        admitted(gateway.staff_url("kitchen")) as second,
    ):
        async with connect(gateway.staff_url("waiter")) as client:
            code, _ = await closed(client)
            assert code == Close.SERVER_OVERLOADED
        token = make_jwt(JWT_SECRET)
        headers = {"Authorization": f"Bearer {token}"}
        assert (await http(gateway.port, "/ws/waiter/events", headers=headers)).status == 429
        assert await received(first) == await received(second) == []


async def test_event_stream_is_alive_while_its_data_is_acknowledged(
    redis_url: str,
) -> None:
    settings = make_settings(redis_url, ws_max_connections_per_user=1)
    headers = {"Authorization": f"Bearer {make_jwt(JWT_SECRET)}"}
    async with (
        running(settings) as gateway,
        listening(gateway.port, "/ws/waiter/events", headers) as listener,
    ):
        assert listener.status == 200
        (connection,) = gateway.app.parts.hub.connections
        assert connection._socket is not None
        async with connect(gateway.staff_url("waiter")) as client:
            code, _ = await closed(client)
            assert code == Close.SERVER_OVERLOADED
        acknowledged, outstanding = connection._socket.traffic()
        if sys.platform == "linux":
            assert acknowledged > 0
        assert outstanding == 0
        assert list(gateway.app.parts.hub.connections) == [connection]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux counts acknowledged bytes")
async def test_event_stream_that_acknowledges_nothing_is_closed(
    redis_url: str, backend: "redis.Redis"
) -> None:
    settings = make_settings(redis_url, ws_max_connections_per_user=1)
    async with running(settings) as gateway:
        stuck = trio.socket.socket()
        stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        with stuck:
            await stuck.connect(("127.0.0.1", gateway.port))
            path = f"/ws/waiter/events?token={make_jwt(JWT_SECRET)}"
            await stuck.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
            await until(lambda: len(gateway.app.parts.hub))
            for _ in range(10):
                event = make_payload("ROUND_PENDING", data="x" * 50_000)
                backend.publish("channel:branch:1:waiters", event)
            await settle(gateway)
            (connection,) = gateway.app.parts.hub.connections
            assert connection._socket is not None
            before = (-1, 0)
            while (now := connection._socket.traffic()) != before:  # until its buffer is full
                before = now
                await trio.sleep(0.2)
            started = trio.current_time()
            async with connect(gateway.staff_url("waiter")) as client:
                await until(lambda: gateway.app.parts.hub.last_number == 2, 5)
                assert trio.current_time() - started > 1.9
                assert await received(client) == []


async def test_token_that_is_revoked_while_it_waits_for_room_is_refused(
    redis_url: str, backend: "redis.Redis"
) -> None:
    settings = make_settings(redis_url, ws_max_connections_per_user=1)
    async with running(settings) as gateway, open_relay(gateway.port) as relay:
        through = gateway.staff_url("waiter").replace(f":{gateway.port}", f":{relay.port}")
        async with admitted(through):
            relay.vanish(Way.BOTH)
            async with connect(gateway.staff_url("waiter", jti="stolen")) as client:
                await trio.sleep(0.5)
                backend.set("auth:token:blacklist:stolen", "1")
                assert await closed(client) == (4001, "token revoked")
            relay.reset()
