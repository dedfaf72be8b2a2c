"""Faults in a random order, one after the other, while people come and go: what is told is true."""

import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import redis
import trio

from tests.support.gateways import until, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

from .crowd import Person, Service, people, service
from .test_cluster import GRACE, LIVE, SLACK, is_right

pytestmark = pytest.mark.chaos

SECONDS = 240  # in which faults happen
LONGEST = 12.0  # seconds of a fault: less than the grace of presence


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey() as found:
        yield found


class Mayhem:
    """The faults. The processes in ``up`` can be reached."""

    def __init__(self, found: Service, server: RedisServer) -> None:
        self.processes = list(found.processes)
        self.up = list(found.processes)
        self._server = server

    async def kill(self, process: GatewayProcess) -> None:
        self.up.remove(process)
        process.kill()
        await trio.sleep(random.uniform(1, LONGEST))
        await process.start()
        self.up.append(process)

    async def freeze(self, process: GatewayProcess) -> None:
        assert process.process is not None
        self.up.remove(process)
        process.process.send_signal(signal.SIGSTOP)
        await trio.sleep(random.uniform(1, LONGEST))
        process.process.send_signal(signal.SIGCONT)
        self.up.append(process)

    async def replace(self, process: GatewayProcess) -> None:
        self.up.remove(process)
        await process.stop()
        await process.start()
        self.up.append(process)

    async def freeze_redis(self, _process: GatewayProcess) -> None:
        with self._server.frozen():
            await trio.sleep(random.uniform(1, LONGEST))

    async def cut_all_links(self, _process: GatewayProcess) -> None:
        with redis.Redis(port=self._server.port) as admin:
            for kind in ("normal", "pubsub"):
                admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        await trio.lowlevel.checkpoint()

    async def run(self, seconds: float) -> None:
        """Cause faults until the time is over."""
        faults: list[Callable[[GatewayProcess], Awaitable[None]]] = [
            self.kill, self.freeze, self.replace, self.freeze_redis, self.cut_all_links
        ]  # fmt: skip
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            fault = random.choice(faults)
            began = trio.current_time()
            await fault(random.choice(self.processes))
            print(f"{fault.__name__} {trio.current_time() - began:.1f} s")
            await trio.sleep(random.uniform(1, 6))


async def live(person: Person, found: Service, mayhem: Mayhem) -> None:
    """Come and go, and come back soon when a connection is lost; most stay away for short."""
    while True:
        if not await found.crowd.try_to_come(person, random.choice(mayhem.up)):
            await trio.sleep(0.5 + random.random())
            continue
        with trio.move_on_after(random.expovariate(1 / 60)):
            await person.left.wait()
        await found.crowd.go(person)
        await trio.sleep(random.choice((*[random.random() * 6] * 4, 45)))


async def test_what_is_told_is_true_whatever_fails(server: RedisServer, tmp_path: Path) -> None:
    seed = int(os.environ.get("MAYHEM_SEED", random.randrange(10_000)))
    print(f"MAYHEM_SEED={seed}")
    random.seed(seed)
    everybody = people(600)
    async with service(server.connection_url, tmp_path, CIRCUIT_RECOVERY_TIMEOUT="1") as found:
        mayhem = Mayhem(found, server)
        async with trio.open_nursery() as nursery:
            for person in everybody:
                nursery.start_soon(live, person, found, mayhem)
            await trio.sleep(15)
            await mayhem.run(SECONDS)
            nursery.cancel_scope.cancel()
        await until(lambda: is_right(found, everybody, mayhem.processes), 30)
        await trio.sleep(GRACE + LIVE + SLACK)
        assert await is_right(found, everybody, mayhem.processes)
        check(found, everybody)


def check(found: Service, everybody: list[Person]) -> None:
    """Compare what the stream says with what people know of themselves."""
    now, by_key = time.time(), {person.key: person for person in everybody}
    changes = found.joins_and_leaves()
    assert found.present_by_stream() == {person.key for person in everybody if person.here}
    leaves = [(key, at) for joined, key, at in found.told() if not joined]
    wrong = [
        (key, at, by_key[key].stays)
        for key, at in leaves
        if by_key[key].was_here(at + SLACK, at + GRACE - SLACK)
    ]
    assert wrong == []
    for key, person in by_key.items():
        told, gaps = changes.get(key, []).count(False), person.gaps(now)
        least = sum(gap > GRACE + LIVE + LONGEST + SLACK for gap in gaps)
        assert least <= told <= sum(gap > GRACE - SLACK for gap in gaps), (key, person.stays)
    stays = sum(len(person.stays) for person in everybody)
    print(f"{stays} stays, {len(leaves)} leaves; refused: {dict(found.crowd.refused)}")
