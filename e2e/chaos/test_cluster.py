"""Many processes, one service: what is true while they, and their Redis, are killed."""

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import trio

from tests.real.test_control import alive, cluster_of
from tests.real.test_control_faults import works
from tests.support.commands import run_process
from tests.support.gateways import environment, serving, until, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer
from trio_gateway.redis_sets import Cluster, RedisSet, SentinelSet

from .crowd import Person, Service, people, service
from .relay import Relay

GRACE = 15  # seconds, the default
LIVE = 7  # seconds after its last beat in which a process counts as alive
SLACK = 3  # seconds, for a busy machine

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
async def test_orders_survive_a_failover(kind: str, request: pytest.FixtureRequest) -> None:
    servers: SentinelSet | Cluster = request.getfixturevalue(kind)
    await survives_a_failover(servers)


async def survives_a_failover(servers: RedisSet) -> None:
    await trio.to_thread.run_sync(servers.wait_healthy)
    async with (
        serving(servers.url, "direct", ws_cluster=True) as one,
        serving(servers.url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        assert await works(one, other)
        key = cluster_of(one).keys.nodes
        old = servers.primary(key)
        old.kill()
        await trio.to_thread.run_sync(lambda: servers.wait_writable(key, other_than=old))
        await until(lambda: works(one, other), 10)
        await trio.to_thread.run_sync(servers.rejoin, old)


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey() as found:
        yield found


def truth(everybody: list[Person]) -> dict[str, int]:
    """Who is present, by key, with the number of connections."""
    return {each.key: 1 for each in everybody if each.here}


async def is_right(found: Service, everybody: list[Person], of: list[GatewayProcess]) -> bool:
    """Whether all processes know who is present."""
    for process in of:
        answer = await found.ask(process)
        if answer.missing or answer.connections != truth(everybody):
            return False
    return True


def at(process: GatewayProcess, everybody: list[Person]) -> list[Person]:
    return [each for each in everybody if each.here and each.at is process]


async def noticed(whom: list[Person]) -> None:
    """Wait until they know that they have lost their connection."""
    await until(lambda: not any(each.here for each in whom), 10)


async def come_back(
    found: Service,
    whom: list[Person],
    to: list[GatewayProcess],
    seconds: float,
) -> None:
    """Connect again, each at some moment within so many seconds."""

    async def come(person: Person) -> None:
        await trio.sleep(random.random() * seconds)
        await found.crowd.come(person, random.choice(to))

    async with trio.open_nursery() as nursery:
        for person in whom:
            nursery.start_soon(come, person)


async def test_a_killed_process_under_load_costs_nobody_their_presence(
    server: RedisServer, tmp_path: Path
) -> None:
    """2,000 clients on four processes, each of which is killed: every leave is told once."""
    everybody = people(2000)
    async with service(server.connection_url, tmp_path) as found:
        processes = list(found.processes)
        await found.crowd.all_come((person, processes[n % 4]) for n, person in enumerate(everybody))
        await until(lambda: is_right(found, everybody, processes), 10)
        leaves = 0
        for killed in processes:
            others = [each for each in processes if each is not killed]
            watcher = await found.watch(others[0])
            victims = at(killed, everybody)
            random.shuffle(victims)
            staying, leaving = victims[: len(victims) // 2], victims[len(victims) // 2 :]
            killed.kill()
            began = trio.current_time()
            answer = await found.ask(others[0])
            assert answer.seconds < 2 + SLACK
            assert len(answer.missing) == 1
            await noticed(victims)
            await come_back(found, staying, others, 5)
            await trio.sleep_until(began + LIVE + SLACK)
            assert await is_right(found, everybody, others)
            await trio.sleep_until(began + LIVE + GRACE + SLACK)
            leaves += len(leaving)
            changes = found.joins_and_leaves()
            gone = [key for key, each in changes.items() if not each[-1]]
            assert sorted(gone) == sorted(each.key for each in everybody if not each.here)
            assert sum(each.count(False) for each in changes.values()) == leaves
            assert watcher.wrong == []
            assert watcher.states == 1
            assert watcher.keys == truth(everybody).keys()
            watcher.scope.cancel()
            await killed.start()
            await found.crowd.all_come((person, killed) for person in leaving)
            await until(lambda: is_right(found, everybody, processes), 10)
        print(f"{leaves} leaves, each told once; refused: {dict(found.crowd.refused)}")


async def test_nobody_leaves_while_all_processes_are_replaced(
    server: RedisServer, tmp_path: Path
) -> None:
    """A rolling restart: clients come back when they are told to, and presence does not flap."""
    everybody = people(1000)
    async with service(server.connection_url, tmp_path) as found:
        processes = list(found.processes)
        await found.crowd.all_come((person, processes[n % 4]) for n, person in enumerate(everybody))
        await until(lambda: is_right(found, everybody, processes), 10)
        for replaced in processes:
            others = [each for each in processes if each is not replaced]
            watcher = await found.watch(others[0])
            victims = at(replaced, everybody)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(replaced.stop)
                await noticed(victims)
                assert {each.code for each in victims} == {1001}
                await come_back(found, victims, others, 3)
            await replaced.start()
            assert watcher.wrong == []
            assert watcher.keys == truth(everybody).keys()
            watcher.scope.cancel()
        await until(lambda: is_right(found, everybody, processes), 10)
        await trio.sleep(GRACE + SLACK)
        changes = found.joins_and_leaves()
        assert list(changes.values()) == [[True]] * len(everybody)
        assert changes.keys() == truth(everybody).keys()


# Less than the grace of presence, and more: then nobody could come back in time.
@pytest.mark.parametrize(("seconds", "movers"), [(10, 100), (25, 0)])
async def test_presence_is_right_after_a_frozen_and_an_empty_redis(
    server: RedisServer, tmp_path: Path, seconds: int, movers: int
) -> None:
    everybody = people(1000)
    # Staff are refused while Redis is away, and not for the usual half minute after it.
    async with service(server.connection_url, tmp_path, CIRCUIT_RECOVERY_TIMEOUT="1") as found:
        processes = list(found.processes)
        await found.crowd.all_come((person, processes[n % 4]) for n, person in enumerate(everybody))
        await until(lambda: is_right(found, everybody, processes), 10)
        await trio.sleep(LIVE)
        random.shuffle(everybody)
        leaving, moving = everybody[:50], everybody[50 : 50 + movers]
        with server.frozen():
            frozen_at = trio.current_time()
            for each in [*leaving, *moving]:
                await found.crowd.go(each)
            found.nursery.start_soon(come_back, found, moving, processes, 3)
            await trio.sleep_until(frozen_at + seconds)
        thawed = trio.current_time()
        await until(lambda: all(each.here for each in moving), 20)
        await until(lambda: is_right(found, everybody, processes), 20)
        print(f"right {trio.current_time() - thawed:.1f} s after a pause of Redis of {seconds} s")
        await trio.sleep(GRACE + LIVE + SLACK)
        changes = found.joins_and_leaves()
        gone = [key for key, each in changes.items() if not each[-1]]
        assert sorted(gone) == sorted(each.key for each in leaving)
        assert sum(each.count(False) for each in changes.values()) == len(leaving)

        server.kill()
        await trio.sleep(2)
        server.start_again()
        await trio.to_thread.run_sync(server.wait_until_ready)
        again = trio.current_time()
        await until(lambda: is_right(found, everybody, processes), 20)
        print(f"right {trio.current_time() - again:.1f} s after Redis has lost its data")
        await until(lambda: found.present_by_stream() == truth(everybody).keys(), 20)
        await trio.sleep(GRACE + LIVE + SLACK)
        assert list(found.joins_and_leaves().values()) == [[True]] * len(truth(everybody))
        print(f"refused meanwhile: {dict(found.crowd.refused)}")


async def test_a_process_that_is_cut_off_from_redis_for_a_moment_costs_nobody_their_presence(
    server: RedisServer, tmp_path: Path
) -> None:
    """The others take it for dead, and it carries out an order when it reaches Redis again."""
    everybody = people(400)
    async with trio.open_nursery() as network:
        relay = Relay(server.port, network)
        first = f"redis://127.0.0.1:{relay.port}"
        async with service(server.connection_url, tmp_path, first_url=first) as found:
            cut_off, *others = found.processes
            await found.crowd.all_come(
                (person, found.processes[n % 4]) for n, person in enumerate(everybody)
            )
            await until(lambda: is_right(found, everybody, list(found.processes)), 10)
            victim = next(each for each in at(cut_off, everybody) if each.endpoint == "waiter")
            watcher = await found.watch(others[0])
            relay.vanish()
            began = trio.current_time()
            kick = ("kick", "--tenant", "1", "--user", str(victim.number), "--json")
            env = environment(server.connection_url, WS_CLUSTER="true")
            status, printed, _ = await run_process(*kick, env=env)
            answer = json.loads("".join(printed))
            assert (status, answer["closed"], answer["complete"]) == (1, 0, False)
            assert len(answer["missing"]) == 1
            await trio.sleep_until(began + LIVE + SLACK)
            for each in others:
                assert (await found.ask(each)).missing == []
            await trio.sleep_until(began + 12)
            relay.forward()
            await noticed([victim])
            assert victim.code == 4001
            await until(lambda: is_right(found, everybody, list(found.processes)), 20)
            await trio.sleep(GRACE + LIVE + SLACK)
            changes = found.joins_and_leaves()
            assert [key for key, each in changes.items() if not each[-1]] == [victim.key]
            assert sum(each.count(False) for each in changes.values()) == 1
            assert watcher.wrong == []
            assert watcher.keys == truth(everybody).keys()
        network.cancel_scope.cancel()
