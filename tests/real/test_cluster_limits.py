"""Limits over several processes, and making room in all of them, over real sockets."""

from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import pytest
import redis
import trio

from e2e.chaos.hammer import Hammer
from e2e.chaos.relay import open_relay
from tests.support.gateways import Running, admitted, closed, connect, received, serving, until
from tests.support.redis_server import RedisServer, valkey
from tests.support.stopwatch import Stopwatch
from trio_gateway.cluster.limits import ClusterLimits
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


@pytest.fixture
def own_redis() -> Iterator[RedisServer]:
    """One that a test may freeze and kill."""
    with valkey() as server:
        yield server


def limits_of(gateway: Running) -> ClusterLimits:
    cluster = gateway.app.parts.cluster
    assert cluster is not None
    assert cluster.limits is not None
    return cluster.limits


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


def in_redis(backend: "redis.Redis") -> dict[str, int]:
    """The places of all users, sessions and tenants, according to Redis."""
    found: Counter[str] = Counter()
    for key in backend.scan_iter("{gateway}:places:*"):
        hashes: Any = backend.hgetall(key)
        found.update({field.decode(): int(n) for field, n in hashes.items() if field != b"#"})
    return dict(found)


async def test_no_limit_is_exceeded_by_users_that_come_and_go_and_no_place_is_lost(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with service(redis_url, ws_max_connections_per_tenant=40) as processes:
        hammer = Hammer([each.port for each in processes], users=20)
        # They stay for so long that the limits are reached also where accepts are slow.
        await hammer.run(60, lambda: hammer.visits >= 200 and bool(hammer.codes), stay=0.5)
        assert hammer.most == 3
        assert hammer.most_in_all <= 40
        assert hammer.codes.keys() == {Close.SERVER_OVERLOADED}
        await until(lambda: not any(len(each.app.parts.hub) for each in processes))
        await until(lambda: in_redis(backend) == {})


async def test_without_redis_each_process_counts_its_own_at_once(
    own_redis: RedisServer,
) -> None:
    """Diners: their tokens have no id, so there is nothing to look up."""
    async with (
        service(own_redis.connection_url, ws_max_connections_per_session=2) as (one, other),
        AsyncExitStack() as stack,
    ):
        for _ in range(2):
            await stack.enter_async_context(admitted(one.diner_url()))
        with own_redis.frozen():
            took = []
            for each in (other, other, one):
                stopwatch = Stopwatch()
                url = each.diner_url(session_id=456 if each is other else 457)
                await stack.enter_async_context(admitted(url))
                took.append(stopwatch.net)
            assert took[0] < 1.5
            assert took[1] < 0.5
            assert took[2] < 1.5
            assert (await refusal(other.staff_url("waiter")))[0] == Close.SERVER_OVERLOADED
        limits = [limits_of(each) for each in (one, other)]
        await until(lambda: not any(each.alone for each in limits))
        with redis.Redis(port=own_redis.port) as client:
            await until(lambda: in_redis(client) == {"s:1:456": 4, "s:1:457": 1})
        assert (await refusal(one.diner_url()))[0] == Close.SERVER_OVERLOADED


async def test_redis_that_comes_back_empty_knows_all_places_again(own_redis: RedisServer) -> None:
    async with (
        service(own_redis.connection_url) as (one, other),
        admitted(one.staff_url("waiter")),
        admitted(one.diner_url()),
        admitted(other.staff_url("waiter")),
        admitted(other.staff_url("kitchen")),
    ):
        own_redis.kill()
        own_redis.start_again()
        with redis.Redis(port=own_redis.port) as client:

            def knows() -> bool:
                with suppress(redis.ConnectionError, redis.BusyLoadingError):
                    return in_redis(client) == {"u:1:21": 3, "s:1:456": 1}
                return False

            await until(knows)
        assert (await refusal(one.staff_url("admin")))[0] == Close.SERVER_OVERLOADED


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
        watch = Stopwatch()
        async with admitted(other.staff_url("waiter")):
            assert watch.elapsed >= 2
            assert watch.net < 3.5
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
