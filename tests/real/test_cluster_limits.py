"""Limits over several processes, and making room in all of them, over real sockets."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager

import pytest
import trio

from e2e.chaos.relay import open_relay
from tests.support.gateways import Running, admitted, closed, connect, received, serving, until
from trio_gateway.core.close_codes import Close


@asynccontextmanager
async def service(redis_url: str, **limits: int) -> AsyncIterator[list[Running]]:
    """Two processes that know each other."""
    settings = {"ws_max_connections_per_user": 3, "ws_max_connections_per_session": 3} | limits
    async with (
        serving(redis_url, "direct", ws_cluster=True, **settings) as one,
        serving(redis_url, "asgi", ws_cluster=True, **settings) as other,
    ):
        cluster = one.app.parts.cluster
        assert cluster is not None

        async def both_are_alive() -> bool:
            return len(await cluster.registry.read()) == 2

        await until(both_are_alive)
        yield [one, other]


async def refusal(url: str, seconds: float = 5) -> tuple[int, str]:
    async with connect(url) as client:
        return await closed(client, seconds)


@pytest.mark.parametrize("limit", ["user", "session"])
async def test_limit_counts_connections_to_all_processes(redis_url: str, limit: str) -> None:
    async with service(redis_url) as processes, AsyncExitStack() as stack:
        urls = [
            each.staff_url("waiter") if limit == "user" else each.diner_url() for each in processes
        ]
        clients = [await stack.enter_async_context(admitted(url)) for url in (*urls, urls[0])]
        for url in urls:
            assert await refusal(url) == (1013, f"too many connections of this {limit}")
        for client in clients:
            assert await received(client) == []  # they answered, and nobody was closed
        await clients[0].aclose()
        async with admitted(urls[1]):
            pass


async def test_tenant_limit_counts_connections_to_all_processes(redis_url: str) -> None:
    async with (
        service(redis_url, ws_max_connections_per_tenant=2) as (one, other),
        admitted(one.staff_url("waiter")),
        admitted(other.diner_url()),
    ):
        for each in (one, other):
            found = await refusal(each.staff_url("kitchen", sub="22"))
            assert found == (1013, "too many connections of this tenant")
        async with admitted(one.staff_url("waiter", tenant_id=2)):
            pass


async def test_dead_connections_on_another_process_are_closed_the_longest_silent_first(
    redis_url: str,
) -> None:
    async with (
        service(redis_url) as (one, other),
        open_relay(one.port) as to_one,
        AsyncExitStack() as stack,
    ):
        url = one.staff_url("waiter")
        through = url.replace(f":{one.port}", f":{to_one.port}")
        silent = [await stack.enter_async_context(admitted(through)) for _ in range(2)]
        alive = await stack.enter_async_context(admitted(other.staff_url("kitchen")))
        await trio.sleep(0.05)
        assert await received(silent[0]) == []  # so that the second is silent for longest
        connections = list(one.app.parts.hub.connections)
        to_one.vanish()
        started = trio.current_time()
        async with admitted(other.staff_url("waiter")):
            assert 2 <= trio.current_time() - started < 3.5
            assert connections[1].code == Close.HEARTBEAT_TIMEOUT
            assert not connections[0].ending
            assert await received(alive) == []
        to_one.reset()


async def test_newcomers_on_all_processes_close_as_many_as_are_needed(redis_url: str) -> None:
    async with (
        service(redis_url) as (one, other),
        open_relay(one.port) as to_one,
        AsyncExitStack() as stack,
    ):
        through = one.diner_url().replace(f":{one.port}", f":{to_one.port}")
        for _ in range(3):
            await stack.enter_async_context(admitted(through))
        to_one.vanish()
        codes: list[int] = []

        async def come(url: str) -> None:
            async with connect(url) as client:
                codes.append((await closed(client, 60))[0])

        async with trio.open_nursery() as nursery:
            for each in (one, other, one, other):  # four for three places
                nursery.start_soon(come, each.diner_url())
            hubs = [each.app.parts.hub for each in (one, other)]
            await until(lambda: codes, 8)
            await until(lambda: sum(len(hub) for hub in hubs) == 3)
            evicted = sum(hub.closed[Close.HEARTBEAT_TIMEOUT] + len(hub.leaving) for hub in hubs)
            assert (codes, evicted) == ([Close.SERVER_OVERLOADED], 3)
            nursery.cancel_scope.cancel()
        to_one.reset()
