"""Faults in a random order, one after the other, while people come and go: what is told is true."""

import os
import random
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import redis
import trio

from tests.support.gateways import until, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer
from trio_gateway.cluster.registry import EVERY

from .crowd import Person, Service, Stay, people, service
from .test_cluster import GRACE, LIVE, SLACK, is_right

pytestmark = [
    pytest.mark.chaos,
    # Of clients whose connecting took too long: trio-websocket does not close their sockets.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

SECONDS = 240  # in which faults happen
LONGEST = 12.0  # seconds of a fault: less than the grace of presence


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey() as found:
        yield found


class Mayhem:
    """The faults. The processes in ``up`` can be reached.

    A seed gives the same faults again. What people do between them depends on their timing, too.
    """

    def __init__(self, found: Service, server: RedisServer, seed: int) -> None:
        self._random = random.Random(seed)
        self.processes = list(found.processes)
        self.up = list(found.processes)
        self._server = server
        self._kills: list[tuple[GatewayProcess, float]] = []  # unix times, as the others
        self._restarts: list[tuple[GatewayProcess, float]] = []
        self._stops: list[tuple[GatewayProcess, float, float]] = []
        self._troubles: list[tuple[float, float]] = []  # of Redis, or of the links to it

    def known(self, stay: Stay) -> Stay | None:
        """What the service can know of a connection; None if it may know nothing of it.

        Nobody knows what a process could not tell Redis before it ended, or before it was stopped,
        until it goes on. A process that is stopped for long counts as gone, and its connections,
        too, unless they are there when it goes on.
        """
        for process, at in (*self._kills, *self._restarts):
            if process is stay.host and stay.came <= at <= stay.went + SLACK:
                is_late = (process, at) in self._kills and at - stay.came < SLACK
                if is_late or self._was_kept_back(stay, at):
                    return None
        for process, began, ended in self._stops:
            if process is not stay.host or not stay.came <= began < stay.went:
                continue
            if began - stay.came < SLACK or self._was_kept_back(stay, began):
                if stay.went < ended + SLACK:
                    return None
                stay = replace(stay, came=ended)
            elif ended - began > LIVE - EVERY and stay.went < ended + SLACK:
                return replace(stay, went=began)
        return stay

    def _was_kept_back(self, stay: Stay, at: float) -> bool:
        """Whether, by this time, a process may not have told Redis of a connection: it could not
        when the connection came.
        """
        return any(
            began - SLACK < stay.came and ended <= at < ended + SLACK
            for began, ended in self._troubles
        )

    async def kill(self, process: GatewayProcess) -> None:
        self.up.remove(process)
        self._kills.append((process, time.time()))
        process.kill()
        await trio.sleep(self._random.uniform(1, LONGEST))
        await process.start()
        self.up.append(process)

    async def freeze(self, process: GatewayProcess) -> None:
        assert process.process is not None
        self.up.remove(process)
        process.process.send_signal(signal.SIGSTOP)
        began = time.time()
        await trio.sleep(self._random.uniform(1, LONGEST))
        process.process.send_signal(signal.SIGCONT)
        self._stops.append((process, began, time.time()))
        self.up.append(process)

    async def restart(self, process: GatewayProcess) -> None:
        self.up.remove(process)
        self._restarts.append((process, time.time()))
        await process.stop()
        await process.start()
        self.up.append(process)

    async def freeze_redis(self, _process: GatewayProcess) -> None:
        began = time.time()
        with self._server.frozen():
            await trio.sleep(self._random.uniform(1, LONGEST))
        self._troubles.append((began, time.time()))

    async def cut_all_links(self, _process: GatewayProcess) -> None:
        began = time.time()
        with redis.Redis(port=self._server.port) as admin:
            for kind in ("normal", "pubsub"):
                admin.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")
        self._troubles.append((began, time.time()))
        await trio.lowlevel.checkpoint()

    async def run(self, seconds: float) -> None:
        """Cause faults until the time is over."""
        faults: list[Callable[[GatewayProcess], Awaitable[None]]] = [
            self.kill, self.freeze, self.restart, self.freeze_redis, self.cut_all_links
        ]  # fmt: skip
        end = trio.current_time() + seconds
        while trio.current_time() < end:
            fault = self._random.choice(faults)
            began, process = time.time(), self._random.choice(self.processes)
            await fault(process)
            print(f"{fault.__name__} {process.port} {began:.2f}-{time.time():.2f}", flush=True)
            await trio.sleep(self._random.uniform(1, 6))


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
    everybody = people(600)
    async with service(server.connection_url, tmp_path, CIRCUIT_RECOVERY_TIMEOUT="1") as found:
        mayhem = Mayhem(found, server, seed)
        async with trio.open_nursery() as nursery:
            for person in everybody:
                nursery.start_soon(live, person, found, mayhem)
            await trio.sleep(15)
            await mayhem.run(SECONDS)
            nursery.cancel_scope.cancel()
        await until(lambda: is_right(found, everybody, mayhem.processes), 30)
        await trio.sleep(GRACE + LIVE + SLACK)
        assert await is_right(found, everybody, mayhem.processes)
        check(found, everybody, mayhem)


def gaps(stays: list[Stay], now: float) -> list[float]:
    """For how many seconds there was no connection, each time after the first."""
    comes = [*(stay.came for stay in stays[1:]), now]
    return [came - stay.went for stay, came in zip(stays, comes, strict=False)]


def check(found: Service, everybody: list[Person], mayhem: Mayhem) -> None:
    """Compare what the stream says with what people know of themselves."""
    now, told = time.time(), found.told()
    changes = found.joins_and_leaves()
    assert found.present_by_stream() == {person.key for person in everybody if person.here}
    wrong = []
    unknown = 0
    for person in everybody:
        known = [each for stay in person.stays if (each := mayhem.known(stay))]
        unknown += len(person.stays) - len(known)
        leaves = [at for joined, key, at in told if key == person.key and not joined]
        for at in leaves:  # whoever has left was away for the whole grace
            since, until_ = at + SLACK, at + GRACE - SLACK
            if any(stay.came < until_ and stay.went > since for stay in known):
                wrong.append((person, f"was there after {at:.2f}"))
        ways = [gaps(known, now), gaps(person.stays, now)]
        least = min(sum(gap > GRACE + LIVE + LONGEST + SLACK for gap in way) for way in ways)
        most = max(sum(gap > GRACE - SLACK for gap in way) for way in ways) + person.doubts
        if not least <= changes[person.key].count(False) <= most:
            wrong.append((person, f"{least} to {most} leaves expected"))
    for person, what in wrong:
        print(person.key, what, person.stays, person.doubts)
        print([(joined, f"{at:.2f}") for joined, key, at in told if key == person.key])
    assert not wrong
    stays = sum(len(person.stays) for person in everybody)
    leaves_told = sum(not joined for joined, _, _ in told)
    refused = dict(found.crowd.refused)
    print(f"{stays} stays, {unknown} unknown, {leaves_told} leaves; refused: {refused}")
