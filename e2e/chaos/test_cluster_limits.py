"""Limits over processes that are killed, stopped and started again, under clients in a hurry."""

import os
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from trio_websocket import ConnectionClosed

from tests.support.gateways import (
    Reachable,
    admitted,
    closed,
    connect,
    http,
    received,
    serving,
    until,
    valkey,
)
from tests.support.processes import GatewayProcess
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.close_codes import Close
from trio_gateway.redis_sets import RedisSet

from .hammer import Hammer
from .relay import open_relay

pytestmark = pytest.mark.chaos


class Service:
    """Gateway processes on one Redis."""

    def __init__(self, processes: list[GatewayProcess], client: "redis.Redis") -> None:
        self.processes = processes
        self.redis = client

    @property
    def ports(self) -> list[int]:
        return [each.port for each in self.processes]

    def pid(self, number: int) -> int:
        process = self.processes[number].process
        assert process is not None
        return process.pid

    async def alive(self) -> None:
        """Wait until all are ready, and Redis knows them."""

        async def ready() -> bool:
            found = [await http(port, "/ws/health/ready") for port in self.ports]
            return all(reply.status == 200 for reply in found)

        await until(ready, 20)
        await until(lambda: len(self.live()) == len(self.processes), 20)

    def live(self) -> list[bytes]:
        """The processes that have written a beat within seven seconds."""
        seconds, _ = self.redis.time()
        found: Any = self.redis.zrangebyscore("{gateway}:nodes", (seconds - 7) * 1000, "+inf")
        return list(found)

    def check_machine(self) -> None:
        """Fail if Redis did not answer a process within a second: then a limit may be exceeded."""
        for each in self.processes:
            assert "limits apply to this process alone" not in each.log.read_text(), (
                "the machine is too slow for this test"
            )

    def places(self) -> dict[str, int]:
        """The places of all users in the live processes, according to Redis."""
        counts: Counter[str] = Counter()
        for name in self.live():
            found: Any = self.redis.hgetall(b"{gateway}:places:" + name)
            counts.update({field.decode(): int(n) for field, n in found.items() if field != b"#"})
        return dict(counts)


@asynccontextmanager
async def service(folder: Path, count: int, **settings: str) -> AsyncIterator[Service]:
    with valkey() as server, redis.Redis.from_url(server.connection_url) as client:
        values = {"WS_CLUSTER": "true", "WS_MAX_CONNECTIONS_PER_USER": "3"} | settings
        processes = [GatewayProcess(server.connection_url, folder, **values) for _ in range(count)]
        try:
            for each in processes:
                await each.start()
            found = Service(processes, client)
            await found.alive()
            yield found
        finally:
            for each in processes:
                each.kill()


def url(port: int) -> str:
    return Reachable(port).staff_url("waiter")


async def admits(port: int) -> bool:
    """Whether one more connection of the user is admitted."""
    async with connect(url(port)) as client:
        with suppress(ConnectionClosed):
            await received(client)
            return True
    return False


@pytest.mark.parametrize("count", [2, 4])
async def test_100_users_in_a_hurry_never_exceed_a_limit(tmp_path: Path, count: int) -> None:
    async with service(tmp_path, count, WS_MAX_CONNECTIONS_PER_TENANT="150") as found:
        hammer = Hammer(found.ports, users=100)
        end = trio.current_time() + 20
        await hammer.run(500, lambda: trio.current_time() > end, stay=0.5)
        print(f"\n{hammer.visits} visits, {hammer.codes}, most {hammer.most_in_all}")
        assert hammer.visits > 1000
        found.check_machine()
        assert hammer.most == 3
        assert hammer.most_in_all <= 150
        assert hammer.codes.keys() == {Close.SERVER_OVERLOADED}
        await until(lambda: found.places() == {})


async def test_no_place_is_lost_or_exceeded_in_10000_visits_while_processes_are_killed(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, 4, WS_MAX_CONNECTIONS_PER_TENANT="150") as found:
        hammer = Hammer(found.ports, users=100)
        choose = random.Random(5)
        kills = 0

        async def kill_again_and_again() -> None:
            nonlocal kills
            while True:
                await trio.sleep(2)
                killed = choose.choice(found.processes)
                hammer.ports.remove(killed.port)
                await trio.to_thread.run_sync(killed.kill)
                await killed.start()
                hammer.ports.append(killed.port)
                kills += 1

        async with trio.open_nursery() as nursery:
            nursery.start_soon(kill_again_and_again)
            await hammer.run(300, lambda: hammer.visits >= 10_000, stay=0.7)
            nursery.cancel_scope.cancel()
        print(f"\n{hammer.visits} visits, {kills} kills, {hammer.lost} lost, {hammer.codes}")
        assert kills >= 3
        found.check_machine()
        assert hammer.most == 3
        assert hammer.most_in_all <= 150
        for each in found.processes:
            if each.process is None or each.process.poll() is not None:
                await each.start()
        await found.alive()  # one may have been started a moment ago
        await until(lambda: found.places() == {}, 20)
        async with AsyncExitStack() as stack:
            for port in found.ports[:3]:
                await stack.enter_async_context(admitted(url(port)))
            assert not await admits(found.ports[3])


async def test_places_of_a_killed_process_are_free_within_ten_seconds(tmp_path: Path) -> None:
    async with service(tmp_path, 2) as found:
        async with AsyncExitStack() as stack:
            for _ in range(3):
                await stack.enter_async_context(admitted(url(found.ports[0])))
            assert not await admits(found.ports[1])
            found.processes[0].kill()
        stopwatch = Stopwatch()
        while not await admits(found.ports[1]):
            assert stopwatch.net < 10
        print(f"\nfree after {stopwatch.elapsed:.1f} s")


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
async def test_limits_apply_over_all_processes_after_a_failover(
    kind: str, request: pytest.FixtureRequest
) -> None:
    servers: RedisSet = request.getfixturevalue(kind)
    await trio.to_thread.run_sync(servers.wait_healthy)
    settings = {"ws_cluster": True, "ws_max_connections_per_session": 2}
    async with (
        serving(servers.url, "direct", **settings) as one,
        serving(servers.url, "direct", **settings) as other,
        admitted(one.diner_url()),
    ):
        old = servers.primary("{gateway}:nodes")
        old.kill()
        async with admitted(other.diner_url()):  # at once, whether Redis is there or not
            await trio.to_thread.run_sync(
                lambda: servers.wait_writable("{gateway}:nodes", other_than=old)
            )

            async def refuses() -> bool:
                async with connect(one.diner_url()) as client:
                    return (await closed(client, 10))[0] == Close.SERVER_OVERLOADED

            async def is_shared() -> bool:
                clusters = [each.app.parts.cluster for each in (one, other)]
                return not any(each and each.limits and each.limits.alone for each in clusters)

            await until(is_shared, 10)
            assert await refuses()
        await trio.to_thread.run_sync(servers.rejoin, old)


async def test_places_of_a_stopped_process_are_kept_for_a_while_and_then_free(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, 4) as found, AsyncExitStack() as stack:
        stopped, *others = found.ports
        alive = [await stack.enter_async_context(admitted(url(port))) for port in others[:2]]
        await stack.enter_async_context(admitted(url(stopped)))
        os.kill(found.pid(0), signal.SIGSTOP)
        try:
            stopwatch = Stopwatch()
            async with connect(url(others[2])) as client:
                assert (await closed(client))[0] == Close.SERVER_OVERLOADED
            assert stopwatch.elapsed >= 2
            assert stopwatch.net < 4
            for client in alive:
                assert await received(client) == []
            await until(lambda: admits(others[2]), 10)  # it counts as gone
            await until(lambda: found.places() == {"u:1:21": 2})
        finally:
            os.kill(found.pid(0), signal.SIGCONT)
        # Its connection is still there, and counts again.
        await until(lambda: found.places() == {"u:1:21": 3})
        assert not await admits(others[2])


async def test_dead_connection_makes_room_beside_a_process_that_does_not_answer(
    tmp_path: Path,
) -> None:
    async with (
        service(tmp_path, 3) as found,
        open_relay(found.ports[1]) as relay,
        AsyncExitStack() as stack,
    ):
        stopped, other, third = found.ports
        await stack.enter_async_context(admitted(url(stopped)))
        through = url(other).replace(f":{other}", f":{relay.port}")
        for _ in range(2):
            await stack.enter_async_context(admitted(through))
        relay.vanish()
        os.kill(found.pid(0), signal.SIGSTOP)
        try:
            stopwatch = Stopwatch()
            assert await admits(third)
            assert stopwatch.elapsed >= 2
            assert stopwatch.net < 4
        finally:
            os.kill(found.pid(0), signal.SIGCONT)
        relay.reset()
