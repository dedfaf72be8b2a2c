"""Limits over all processes, with a real Valkey: never exceeded, and nothing leaks."""

import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import redis
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.gateways import until, valkey
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.commands import Unavailable
from trio_gateway.cluster.keys import Keys
from trio_gateway.cluster.limits import ClusterLimits
from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.capacity import CapacityLimits
from trio_gateway.core.close_codes import Rejected
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import make_principal

LIMITS = CapacityLimits(total=10_000, per_user=3, per_session=4, per_tenant=8)
KEYS = Keys()


@pytest.fixture(scope="module")
def server() -> Iterator["redis.Redis"]:
    with valkey() as started, redis.Redis.from_url(started.connection_url) as client:
        yield client


@pytest.fixture
def backend(server: "redis.Redis") -> "redis.Redis":
    server.flushall()
    return server


class Process:
    """One of the processes: a hub, and what it has in Redis."""

    def __init__(self, name: str, backend: "redis.Redis", limits: CapacityLimits) -> None:
        self.name = name
        self.hub = Hub(limits)
        self.counts_tenants = limits.per_tenant > 0
        self.backend = backend
        self.scripts = 0
        self.fails = False
        self.loses_answers = False
        self.late: list[Callable[[], Any]] = []  # what a frozen Redis will run
        self.holds: trio.Event | None = None
        self.limits = ClusterLimits(self.hub, limits, KEYS, name, self.evaluate, self.beat)

    async def evaluate(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, seconds: float
    ) -> Any:
        def run() -> Any:
            return self.backend.eval(script, len(keys), *keys, *arguments)

        await trio.lowlevel.checkpoint()
        self.scripts += 1
        if self.holds is not None:
            await self.holds.wait()
        if self.fails:
            self.late.append(run)
            raise Unavailable("no answer in time")
        reply = run()
        await trio.lowlevel.checkpoint()
        if self.loses_answers:
            raise Unavailable("answer lost")
        return reply

    async def beat(self) -> None:
        await trio.lowlevel.checkpoint()
        seconds, micros = self.backend.time()
        self.backend.zadd(KEYS.nodes, {self.name: seconds * 1000 + micros // 1000})

    async def join(self, principal: Principal | None = None) -> Connection:
        found = principal or make_principal()
        with await self.limits.reserve(found):
            pass
        connection = Connection(found, ConnectionLimits())
        self.hub.join(connection)
        return connection

    async def outcome(self, principal: Principal | None = None) -> str:
        try:
            await self.join(principal)
        except Rejected as rejected:
            return f"{int(rejected.close)} {rejected.label}"
        return "in"

    def leave(self, connection: Connection) -> None:
        self.hub.leave(connection)

    def in_redis(self) -> dict[str, int]:
        found: Any = self.backend.hgetall(KEYS.places(self.name))
        return {field.decode(): int(n) for field, n in found.items() if field != b"#"}

    def in_hub(self) -> dict[str, int]:
        counts: Counter[str] = Counter()
        for connection in self.hub.connections:
            kind, tenant, who = connection.principal.owner
            counts[f"{kind[0]}:{tenant}:{who}"] += 1
            if self.counts_tenants:
                counts[f"t:{tenant}"] += 1
        return dict(counts)

    def agrees(self) -> bool:
        return self.in_redis() == self.in_hub()


class Service:
    """Processes on the same Redis."""

    def __init__(self, nursery: trio.Nursery, backend: "redis.Redis") -> None:
        self._nursery = nursery
        self._backend = backend

    def start(self, name: str, limits: CapacityLimits = LIMITS) -> Process:
        process = Process(name, self._backend, limits)
        self._nursery.start_soon(process.limits.run)
        return process


@pytest.fixture
def service(nursery: trio.Nursery, backend: "redis.Redis") -> Service:
    return Service(nursery, backend)


DINER = make_principal(Endpoint.DINER)


async def test_user_has_one_limit_over_all_processes(service: Service) -> None:
    one, other = service.start("one"), service.start("other")
    assert [await each.outcome() for each in (one, other, one)] == ["in"] * 3
    assert await one.outcome() == await other.outcome() == "1013 user_limit"
    assert await other.outcome(make_principal(user=22)) == "in"
    assert await other.outcome(make_principal(tenant=2)) == "in"


async def test_session_and_tenant_have_one_limit_over_all_processes(service: Service) -> None:
    one, other = service.start("one"), service.start("other")
    found = [await each.outcome(DINER) for each in (one, other, one, other, one)]
    assert found == ["in"] * 4 + ["1013 session_limit"]
    found = [await one.outcome(make_principal(user=n)) for n in range(100, 105)]
    assert found == ["in"] * 4 + ["1013 tenant_limit"]
    # Room can be made there, which makes room in the tenant.
    assert await other.outcome(DINER) == "1013 session_limit"


async def test_without_a_limit_of_tenants_none_is_counted(service: Service) -> None:
    limits = CapacityLimits(total=10_000, per_user=3, per_session=4)
    process = service.start("one", limits)
    for user in range(100, 120):
        await process.join(make_principal(user=user))
    assert not any(field.startswith("t:") for field in process.in_redis())


async def test_newcomers_at_the_same_time_get_what_is_left(
    service: Service, nursery: trio.Nursery
) -> None:
    processes = [service.start(name) for name in "abcd"]
    found: list[str] = []

    async def come(process: Process) -> None:
        found.append(await process.outcome())

    async with trio.open_nursery() as newcomers:
        for process in processes * 5:
            newcomers.start_soon(come, process)
    assert sorted(found) == ["1013 user_limit"] * 17 + ["in"] * 3


async def test_place_that_becomes_free_is_free_everywhere(service: Service) -> None:
    one, other = service.start("one"), service.start("other")
    first, *_ = [await one.join() for _ in range(3)]
    assert await other.outcome() == "1013 user_limit"
    one.leave(first)
    await one.limits.settle()
    assert await other.outcome() == "in"
    assert one.agrees()
    assert other.agrees()


async def test_refused_and_cancelled_newcomers_leave_nothing_behind(service: Service) -> None:
    one, other = service.start("one"), service.start("other")
    for _ in range(3):
        await one.join()
    assert await other.outcome() == "1013 user_limit"
    assert await other.outcome(DINER) == "in"
    other.holds = trio.Event()
    with trio.move_on_after(0.02):  # while its script is on its way
        await other.outcome(make_principal(user=22))
    other.holds.set()
    await other.limits.settle()
    await wait_all_tasks_blocked()
    assert other.agrees()
    assert not other.limits._batches


async def test_those_who_come_meanwhile_share_a_script(
    service: Service, nursery: trio.Nursery
) -> None:
    process = service.start("one", CapacityLimits(total=10_000, per_user=1, per_session=1))
    await process.join()
    process.holds, before = trio.Event(), process.scripts
    async with trio.open_nursery() as newcomers:
        for user in range(100, 300):
            newcomers.start_soon(process.join, make_principal(user=user))
        await wait_all_tasks_blocked()
        process.holds.set()
    assert process.scripts - before <= 4  # that of the first, and at most 100 in each
    assert process.agrees()


async def test_places_for_many_are_asked_for_at_once_and_who_is_over_a_limit_gets_none(
    service: Service,
) -> None:
    one, other = service.start("one"), service.start("other")
    for process in (one, other):
        await process.join()
    before = one.scripts
    wanted = [make_principal(), make_principal(), make_principal(user=22), DINER]
    places = await one.limits.reserve_all(wanted)
    assert [place is not None for place in places] == [True, False, True, True]
    assert one.scripts == before + 1
    for place in places:
        if place is not None:
            place.give_up()
    await one.limits.settle()
    await one.limits.settle()
    assert one.agrees()
    assert not one.hub._reserved


async def test_who_stops_waiting_for_many_places_leaves_none_behind(service: Service) -> None:
    process = service.start("one")
    await process.join()
    process.holds = trio.Event()
    with trio.move_on_after(0.02):
        await process.limits.reserve_all([make_principal(user=22), DINER])
    process.holds.set()
    await process.limits.settle()
    await process.limits.settle()
    assert process.agrees()
    assert not process.hub._reserved


async def test_nothing_is_written_for_a_place_that_changes_hands(service: Service) -> None:
    process = service.start("one")
    await process.join()
    await wait_all_tasks_blocked()
    assert process.scripts == 2  # one found that the process is not live


async def test_places_of_a_process_that_is_not_live_are_free(
    service: Service, backend: "redis.Redis"
) -> None:
    one, other = service.start("one"), service.start("other")
    for _ in range(3):
        await one.join()
    backend.zadd(KEYS.nodes, {"one": 0})
    assert await other.outcome() == "in"


async def test_process_that_was_forgotten_writes_all_again(
    service: Service, backend: "redis.Redis"
) -> None:
    one, other = service.start("one"), service.start("other")
    kept = [await one.join(make_principal(user=user)) for user in range(100, 105)]
    assert kept
    backend.flushall()
    await one.join(DINER)
    await wait_all_tasks_blocked()
    assert one.agrees()
    await other.join()
    assert [await other.outcome(make_principal(user=100)) for _ in range(2)] == [
        "in",
        "1013 tenant_limit",
    ]


async def test_counts_that_a_new_primary_lacks_are_written_again(
    service: Service, backend: "redis.Redis"
) -> None:
    one = service.start("one")
    await one.join()
    key = KEYS.places("one")
    older = backend.dump(key)
    for user in range(100, 103):
        await one.join(make_principal(user=user))
    backend.restore(key, 0, older, replace=True)  # type: ignore[arg-type]
    assert not one.agrees()
    await one.join(DINER)
    await wait_all_tasks_blocked()
    assert one.agrees()


async def test_without_redis_a_process_counts_its_own_at_once(service: Service) -> None:
    one, other = service.start("one"), service.start("other")
    await one.join()
    other.fails = True
    watch = Stopwatch()
    assert [await other.outcome() for _ in range(4)] == ["in"] * 3 + ["1013 user_limit"]
    assert watch.net < 0.4
    assert other.limits.alone
    other.fails = False
    await until(lambda: not other.limits.alone)
    await until(other.agrees)
    assert await one.outcome() == "1013 user_limit"


async def test_all_who_wait_when_redis_fails_are_answered_together(
    service: Service, nursery: trio.Nursery
) -> None:
    process = service.start("one", CapacityLimits(total=10_000, per_user=1, per_session=1))
    await process.join()
    process.holds, process.fails = trio.Event(), True
    async with trio.open_nursery() as newcomers:
        for user in range(100, 400):
            newcomers.start_soon(process.join, make_principal(user=user))
        await wait_all_tasks_blocked()
        before = process.scripts
        process.holds.set()
    assert process.scripts == before
    process.fails = False
    await until(process.agrees)


async def test_script_that_redis_runs_late_changes_nothing(service: Service) -> None:
    process = service.start("one")
    first = await process.join()
    process.fails = True
    await process.join()
    process.leave(first)
    await wait_all_tasks_blocked()
    process.fails = False
    await until(lambda: not process.limits.alone)
    assert process.in_redis()["u:1:21"] == 1
    for run in process.late:
        run()
    assert process.agrees()


async def test_lost_answer_is_corrected(service: Service) -> None:
    process = service.start("one")
    connection = await process.join()
    process.loses_answers = True
    process.leave(connection)
    await process.outcome(make_principal(user=22))
    process.loses_answers = False
    await until(lambda: not process.limits.alone)
    await until(process.agrees)


async def test_many_counts_are_written_in_several_scripts(
    service: Service, backend: "redis.Redis"
) -> None:
    limits = CapacityLimits(total=10_000, per_user=3, per_session=4)
    process = service.start("one", limits)
    process.limits.alone = True
    for user in range(2_000):
        await process.join(make_principal(user=user))
    await until(lambda: len(process.in_redis()) == 2_000)
    before = process.scripts
    process.limits.write_all()
    await wait_all_tasks_blocked()
    assert process.scripts - before == 4
    for connection in list(process.hub.connections):
        process.leave(connection)
    await wait_all_tasks_blocked()
    assert process.in_redis() == {}


@pytest.mark.parametrize("seed", range(25))
async def test_limits_are_never_exceeded_and_all_counts_agree_at_the_end(
    service: Service, seed: int
) -> None:
    """Clients of three processes come and go, and some give up while they wait."""
    choose = random.Random(seed)
    principals = [make_principal(user=user) for user in (1, 2, 3)] + [DINER]

    processes = [service.start(name) for name in "abc"]

    def check() -> None:
        everybody = [c for each in processes for c in each.hub.connections]
        owners = Counter(c.principal.owner for c in everybody)
        for owner, places in owners.items():
            assert places <= LIMITS.of(owner)
        assert len(everybody) <= LIMITS.per_tenant

    async def client(process: Process) -> None:
        for _ in range(choose.randrange(1, 4)):
            with trio.move_on_after(choose.choice([0.001, 1])):
                try:
                    connection = await process.join(choose.choice(principals))
                except Rejected:
                    continue
                check()
                for _ in range(choose.randrange(5)):
                    with trio.CancelScope(shield=True):
                        await trio.lowlevel.checkpoint()
                    check()
                process.leave(connection)

    async with trio.open_nursery() as clients:
        for _ in range(15):
            clients.start_soon(client, choose.choice(processes))
    for each in processes:
        await each.limits.settle()
        await each.limits.settle()
        assert each.agrees()
        assert not each.limits._batches


async def test_process_that_ends_leaves_nobody_waiting(
    service: Service, nursery: trio.Nursery
) -> None:
    process = Process("one", service._backend, LIMITS)
    process.holds = trio.Event()
    found: list[str] = []

    async def come() -> None:
        found.append(await process.outcome())

    async with trio.open_nursery() as running:
        running.start_soon(process.limits.run)
        nursery.start_soon(come)
        await wait_all_tasks_blocked()
        running.cancel_scope.cancel()
    await wait_all_tasks_blocked()
    assert found == ["in"]
