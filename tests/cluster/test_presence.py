"""Presence over several processes that share a real Valkey; time is virtual."""

import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import redis
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.support.gateways import valkey
from trio_gateway.cluster import presence_scripts
from trio_gateway.core.audiences import BranchId, Endpoint, TenantId

from .presence_world import START, Process, World

SOON: Final = 2.5  # seconds: two sweeps


@pytest.fixture(scope="module")
def client() -> Iterator["redis.Redis"]:
    with valkey() as server, redis.Redis.from_url(server.connection_url) as found:
        yield found


@asynccontextmanager
async def service(
    client: "redis.Redis", count: int = 2, **settings: Any
) -> AsyncIterator[tuple[World, list[Process]]]:
    """A world with this many processes, which have beaten once."""
    client.flushall()
    world = World(client, **settings)
    async with trio.open_nursery() as nursery:
        processes = [Process(world, f"p{number}") for number in range(count)]
        for process in processes:
            nursery.start_soon(process.run)
        await trio.sleep(0.1)
        yield world, processes
        nursery.cancel_scope.cancel()


async def test_join_is_told_at_once_and_leave_after_the_grace(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, _)):
        ana = one.join(branches=[1, 2])
        await trio.sleep(0.1)
        assert world.events == [
            {
                "type": "USER_ONLINE",
                "tenant_id": 1,
                "branch_ids": [1, 2],
                "user_id": "21",
                "endpoint": "waiter",
                "at": pytest.approx(START + 0.1, abs=0.01),
            }
        ]
        one.leave(ana)
        await trio.sleep(14.9)
        assert len(world.events) == 1
        await trio.sleep(SOON)
        assert world.events[1:] == [
            world.events[0] | {"type": "USER_OFFLINE", "at": pytest.approx(START + 0.2, abs=0.01)}
        ]


async def test_session_is_told_with_its_table(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=0) as (world, (one, _)):
        diner = one.join(endpoint=Endpoint.DINER, table=10)
        await trio.sleep(0.1)
        one.leave(diner)
        await trio.sleep(0.1)
        keys = {"tenant_id": 1, "branch_ids": [1], "session_id": 456, "table_id": 10}
        for event, kind in zip(world.events, ("ONLINE", "OFFLINE"), strict=True):
            assert event.pop("at") == pytest.approx(START, abs=1)
            assert event == {"type": f"SESSION_{kind}", **keys, "endpoint": "diner"}


async def test_devices_on_several_processes_are_one_user(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        devices = [(one, one.join()), (one, one.join()), (other, other.join())]
        await trio.sleep(1)
        for process, device in devices[:2]:
            process.leave(device)
        await trio.sleep(30)
        assert world.told == [("USER_ONLINE", "21")]
        other.leave(devices[2][1])
        await trio.sleep(15 + SOON)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]


async def test_user_on_two_endpoints_is_present_twice(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        one.join()
        other.join(endpoint=Endpoint.KITCHEN)
        await trio.sleep(1)
        assert {event["endpoint"] for event in world.events} == {"waiter", "kitchen"}
        await trio.sleep(SOON)
        for process in (one, other):
            assert process.presence.present == {"waiter": 1, "kitchen": 1, "admin": 0, "diner": 0}


async def test_nothing_is_told_of_a_reconnect_to_another_process_within_the_grace(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        ana = one.join()
        await trio.sleep(5)
        one.leave(ana)
        await trio.sleep(14)
        other.join()
        await trio.sleep(60)
        assert world.told == [("USER_ONLINE", "21")]
        answer = await other.presence.here(TenantId(1), BranchId(1))
        assert answer.users[0].since == pytest.approx(START + 0.1, abs=0.01)


async def test_user_that_comes_and_goes_between_two_writes_is_told_of(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=0) as (world, (one, _)):
        one.leave(one.join())
        await trio.sleep(0.1)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]


async def test_those_who_come_soon_after_a_write_share_the_next(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (world, (one,)):
        await trio.sleep(2)
        before = world.calls
        for user in range(20):
            one.join(user)
            await trio.sleep(0.004)
        await trio.sleep(0.1)
        assert len(world.told) == 20
        assert world.calls - before <= 4  # the first, all others, and perhaps a sweep and a beat


async def test_flush_does_not_wait_for_others_to_come(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (world, (one,)):
        one.join(21)
        await trio.sleep(0.01)
        one.join(22)
        started = trio.current_time()
        await one.presence.flush()
        assert trio.current_time() - started < 0.02
        assert len(world.told) == 2


async def test_killed_process_is_cleared_up_by_others_and_each_leave_told_once(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 3) as (world, (one, other, _)):
        for user in range(250):  # several chunks
            one.join(user)
        await trio.sleep(5)
        one.kill()
        for user in range(100):
            other.join(user)
        await trio.sleep(14.9)
        assert len(world.told) == 250
        await trio.sleep(3 + SOON)
        left = [user for kind, user in world.told if kind == "USER_OFFLINE"]
        assert sorted(left, key=int) == [str(user) for user in range(100, 250)]
        await trio.sleep(60)
        assert len(world.told) == 400
        assert client.hlen("{gateway}:presence:processes") == 1  # the third has never written


async def test_paused_process_is_not_flapping(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=20) as (world, (one, other)):
        one.join()
        other.join(22)
        await trio.sleep(1)
        one.resumed = trio.Event()
        await trio.sleep(15)
        one.resumed.set()
        await trio.sleep(60)
        assert sorted(world.told) == [("USER_ONLINE", "21"), ("USER_ONLINE", "22")]
        assert world.online() == {"1:waiter:21", "1:waiter:22"}


async def test_redis_that_was_away_causes_no_flapping_even_without_a_grace(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 4, grace=0) as (world, processes):
        for number, process in enumerate(processes):
            process.join(number)
        await trio.sleep(1)
        before = world.told
        world.is_away = True
        gone = processes[0].connections[0]
        processes[0].leave(gone)
        processes[1].join(99)
        await trio.sleep(30)
        world.is_away = False
        await trio.sleep(60)
        assert sorted(world.told[4:]) == [("USER_OFFLINE", "0"), ("USER_ONLINE", "99")]
        assert world.told[:4] == before


async def test_redis_that_lost_its_data_is_told_again(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        ana = one.join()
        other.join(22)
        await trio.sleep(10)
        client.flushall()
        world.told_at.clear()
        await trio.sleep(5)
        assert world.online() == {"1:waiter:21", "1:waiter:22"}
        one.leave(ana)
        await trio.sleep(15 + SOON)
        assert world.online() == {"1:waiter:22"}
        assert sorted(world.told) == [
            ("USER_OFFLINE", "21"), ("USER_ONLINE", "21"), ("USER_ONLINE", "22"),
        ]  # fmt: skip


@pytest.mark.parametrize("writes_first", [False, True])
async def test_redis_that_lost_its_last_writes_is_told_again(
    client: "redis.Redis", autojump_clock: MockClock, writes_first: bool
) -> None:
    async with service(client, grace=5) as (world, (one, _)):
        leaves = one.join(1)
        one.join(2)
        await trio.sleep(1)
        keys: Any = [key for key in client.keys("*") if b"nodes" not in key]
        dump: Any = {key: client.dump(key) for key in keys}
        one.leave(leaves)
        one.join(3)
        await trio.sleep(0.5)
        for key in client.keys("*"):  # a new primary lacks what came since
            if b"nodes" not in key:
                client.delete(key)
        for key, value in dump.items():
            client.restore(key, 0, value)
        if writes_first:  # before a sweep could see it
            one.leave(one.join(2))
        await trio.sleep(5 + SOON)
        assert world.online() == {"1:waiter:2", "1:waiter:3"}
        assert client.hkeys("{gateway}:here:p0") == [b"1:waiter:2", b"1:waiter:3"]


async def test_nothing_is_told_of_a_reconnect_while_redis_was_away(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 3, grace=4) as (world, (one, other, _)):
        for round_ in range(8):  # a sweep may be the first to reach Redis, or a write
            ana = one.join()
            await trio.sleep(5)
            one.leave(ana)
            await trio.sleep(0.1)
            world.is_away = True
            await trio.sleep(2)
            back = other.join()
            await trio.sleep(8 + round_ / 8)
            world.is_away = False
            await trio.sleep(5)
            one.join(100 + round_)  # so that it is not idle
            other.leave(back)
            await trio.sleep(1)
        assert "USER_OFFLINE" not in [kind for kind, _ in world.told]


async def test_process_killed_after_redis_was_away_costs_nobody_the_grace(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        one.join(21)
        one.join(22)
        await trio.sleep(4)
        world.is_away = True
        await trio.sleep(12)
        one.resumed = trio.Event()  # its first beat after that is not written
        world.is_away = False
        await trio.sleep(1)
        one.kill()
        killed = trio.current_time()
        await trio.sleep(12)
        other.join(22)
        await trio.sleep(15)
        assert world.told[2:] == [("USER_OFFLINE", "21")]
        assert world.told_at[2] >= killed + 15
        assert world.events[2]["at"] >= START + killed


async def test_leave_from_a_second_process_has_the_whole_grace_though_the_first_was_killed(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        one.join()
        await trio.sleep(3.5)
        one.kill()
        await trio.sleep(4.5)
        ana = other.join()
        await trio.sleep(1)
        other.leave(ana)  # the other does not know yet that the first was killed
        left = trio.current_time()
        await trio.sleep(15 + SOON)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]
        assert world.told_at[1] >= left + 15
        assert world.events[1]["at"] == pytest.approx(START + left, abs=0.1)


async def test_leave_does_not_end_the_grace_of_a_later_connection_to_a_process_that_stops(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 3, grace=11.2) as (world, (one, other, third)):
        ana = one.join()
        await trio.sleep(1)
        one.is_cut_off = True
        one.leave(ana)
        other.join()
        await trio.sleep(1)
        one.is_cut_off = False  # its leave is written after the other's join
        await trio.sleep(3)
        await other.registry.beat()
        other.resumed = trio.Event()  # it counts as dead 7 s later: 11 s after the leave
        await trio.sleep(6.9)
        one.is_cut_off = third.is_cut_off = True
        await trio.sleep(0.4)  # no sweep, until the grace of the leave is over, too
        one.is_cut_off = third.is_cut_off = False
        await third.run_script(presence_scripts.SWEEP, [third.name, "0"])
        await trio.sleep(3)
        other.resumed.set()
        await trio.sleep(30)
        assert world.told == [("USER_ONLINE", "21")]


@pytest.mark.parametrize("grace", [0, 1])
async def test_leave_is_not_before_the_end_of_a_process_that_is_not_swept_yet(
    client: "redis.Redis", autojump_clock: MockClock, grace: float
) -> None:
    async with service(client, 3, grace=grace) as (world, (one, other, third)):
        one.join()
        other.join()
        await trio.sleep(1)
        await other.registry.beat()
        killed = trio.current_time()
        other.kill()
        await trio.sleep(6.8)
        one.is_cut_off = third.is_cut_off = True
        await trio.sleep(0.3)  # the other counts as dead, and no sweep has seen it
        one.is_cut_off = third.is_cut_off = False
        last = "0 - 6000\n"  # its last connection ended 6 s ago
        await one.run_script(presence_scripts.WRITE, [one.name, "9", "1:waiter:21", last])
        await trio.sleep(SOON + SOON)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]
        # Three seconds after its last beat, when the other may have ended.
        assert world.events[-1]["at"] == pytest.approx(START + killed + 3, abs=0.1)


async def test_each_leave_has_the_whole_grace(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client) as (world, (one, other)):
        ana = one.join()
        await trio.sleep(1)
        one.leave(ana)
        await trio.sleep(8)
        ana = other.join()
        await trio.sleep(1)
        other.leave(ana)
        await trio.sleep(14.5)
        assert world.told == [("USER_ONLINE", "21")]
        await trio.sleep(SOON)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]


async def test_grace_does_not_end_for_one_that_a_living_process_holds(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    # As if the process had been taken for dead, and has not written again yet.
    async with service(client) as (world, (one, _)):
        one.join()
        await trio.sleep(1)
        client.zadd("{gateway}:leaving", {"1:waiter:21": 0})
        await trio.sleep(10)
        assert world.told == [("USER_ONLINE", "21")]
        assert client.zcard("{gateway}:leaving") == 0


async def test_user_that_comes_and_goes_while_redis_is_away_is_told_of(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=0) as (world, (one, _)):
        world.is_away = True
        ana = one.join()
        await trio.sleep(1)
        one.leave(ana)
        await trio.sleep(3)
        world.is_away = False
        await trio.sleep(2)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]


async def test_times_are_those_of_the_events_also_if_redis_was_away(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=1) as (world, (one, other)):
        one_ana, other_ana = one.join(), other.join()
        await trio.sleep(1)
        start = trio.current_time()
        world.is_away = True
        await trio.sleep(1)
        eva = one.join(22)
        await trio.sleep(1)
        one.leave(eva)
        other.leave(other_ana)
        await trio.sleep(1)
        one.leave(one_ana)
        await trio.sleep(2)
        world.is_away = False
        await trio.sleep(10)
        happened = {
            (each["type"], each["user_id"]): each["at"] - START - start for each in world.events
        }
        assert happened == {
            ("USER_ONLINE", "21"): pytest.approx(-1, abs=0.01),
            ("USER_ONLINE", "22"): pytest.approx(1, abs=0.01),
            ("USER_OFFLINE", "22"): pytest.approx(2, abs=0.01),
            ("USER_OFFLINE", "21"): pytest.approx(3, abs=0.01),
        }
        assert len(world.events) == len(happened)
        assert not client.exists("{gateway}:leaving", "{gateway}:left")


@pytest.mark.parametrize("grace", [0, 1])
@pytest.mark.parametrize("is_first", [True, False])
async def test_leave_is_the_last_end_whichever_process_tells_it_first(
    client: "redis.Redis", autojump_clock: MockClock, grace: float, *, is_first: bool
) -> None:
    async with service(client, grace=grace) as (world, (one, other)):
        connections = {process: process.join() for process in (one, other)}
        await trio.sleep(1)
        late = one if is_first else other
        late.is_cut_off = True
        one.leave(connections[one])
        await trio.sleep(1)
        other.leave(connections[other])
        left = trio.current_time()
        await trio.sleep(1)
        late.is_cut_off = False
        await trio.sleep(1 + SOON)
        assert [kind for kind, _ in world.told] == ["USER_ONLINE", "USER_OFFLINE"]
        assert world.events[-1]["at"] == pytest.approx(START + left, abs=0.01)


async def test_write_that_arrives_after_a_newer_one_has_no_effect(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, grace=1) as (world, (one, _)):
        ana = one.join()
        await trio.sleep(0.5)
        one.leave(ana)
        await trio.sleep(3)
        record = '{"tenant_id":1,"branch_ids":[1],"user_id":"21","endpoint":"waiter"}\n{}'
        late = await one.run_script(
            presence_scripts.WRITE, ["p0", "1", "1:waiter:21", f"1 0 0\n{record}"]
        )
        assert late[0] == b"late"
        assert world.online() == set()


async def test_service_that_starts_again_ends_what_was_left(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (world, (one,)):
        one.join()
        one.join(22)
        await trio.sleep(2)
        one.kill()
        await trio.sleep(100)
        async with trio.open_nursery() as nursery:
            new = Process(world, "new")
            nursery.start_soon(new.run)
            await trio.sleep(1)
            new.join(22)
            await trio.sleep(15 + 7 + SOON)
            nursery.cancel_scope.cancel()
        assert world.told[2:] == [("USER_OFFLINE", "21")]


async def test_many_that_come_and_go_while_redis_is_away_cost_bounded_memory(
    client: "redis.Redis", autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_gateway.cluster.presence._MOST_GONE", 10)
    async with service(client, 1, grace=0) as (world, (one,)):
        stays = one.join(1)
        await trio.sleep(0.1)
        world.is_away = True
        one.leave(stays)
        for user in range(100, 200):
            one.leave(one.join(user))
            await trio.sleep(0.05)
        back = one.join(150)
        assert len(one.presence._here) < 20
        world.is_away = False
        await trio.sleep(SOON)
        assert world.online() == {"1:waiter:150"}
        one.leave(back)
        await trio.sleep(SOON)
        assert not one.presence._here
        assert not one.presence._tenants
        assert world.online() == set()


async def test_user_that_is_forgotten_while_it_is_written_is_cleared_up(
    client: "redis.Redis", autojump_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trio_gateway.cluster.presence._MOST_GONE", 0)
    async with service(client, 1, grace=0) as (world, (one,)):
        ana = one.join()
        await trio.sleep(0.0005)
        one.leave(ana)
        await trio.sleep(SOON)
        assert world.told == [("USER_ONLINE", "21"), ("USER_OFFLINE", "21")]
        assert not one.presence._here


async def test_idle_service_runs_one_short_script_a_second_and_process(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 2) as (world, (one, other)):
        for user in range(100):
            one.join(user)
            other.join(user)
        await trio.sleep(10)
        before = world.calls
        await trio.sleep(100)
        assert world.calls - before < 2 * (100 / 0.8 + 100 / 3 + 2)


USERS: Final = (1, 2, 3)
_steps = st.one_of(
    st.tuples(st.just("join"), st.integers(0, 2), st.sampled_from(USERS)),
    st.tuples(st.just("leave"), st.integers(0, 2), st.integers(0, 2)),
    st.tuples(st.just("wait"), st.just(0), st.sampled_from([0, 1, 3, 8, 12])),
    st.tuples(st.just("kill"), st.integers(0, 2), st.just(0)),
    st.tuples(st.just("pause"), st.integers(0, 2), st.sampled_from([2, 10])),
    st.tuples(st.just("away"), st.just(0), st.just(10)),
    st.tuples(st.just("lose answers"), st.just(0), st.sampled_from([1, 2])),
)


class Truth:
    """When each user had how many connections, whichever process they were on."""

    def __init__(self) -> None:
        self.changes: dict[int, list[tuple[float, int]]] = {user: [] for user in USERS}
        self.unsure: set[int] = set()  # were on a process that did not answer

    def add(self, user: int, count: int) -> None:
        self.changes[user].append((trio.current_time(), count))

    def is_connected(self, user: int) -> bool:
        return sum(count for _, count in self.changes[user]) > 0

    def longest_gap(self, user: int, begin: float, end: float) -> float:
        """The longest time without a connection, in seconds, of this time."""
        count, longest, since = 0, -1.0, begin
        for at, change in [*self.changes[user], (end, 0)]:
            if count == 0 and at > begin:
                longest = max(longest, min(at, end) - since)
            count += change
            since = max(begin, at)
            if at >= end:
                break
        return longest


async def play(
    world: World, processes: list[Process], steps: list[tuple[str, int, int]], truth: Truth
) -> None:
    """Take the steps, then let everything settle."""
    names = itertools.count(len(processes))
    async with trio.open_nursery() as nursery:

        async def resume(process: Process, seconds: float) -> None:
            await trio.sleep(seconds)
            process.resumed.set()

        for kind, which, value in steps:
            process = processes[which]
            match kind:
                case "join":
                    process.join(value)
                    truth.add(value, 1)
                    if not process.resumed.is_set():
                        truth.unsure.add(value)
                case "leave" if value < len(process.connections):
                    connection = process.connections[value]
                    process.leave(connection)
                    truth.add(int(connection.principal.user or 0), -1)
                case "wait":
                    await trio.sleep(value)
                case "kill":
                    for each in process.connections:
                        truth.add(int(each.principal.user or 0), -1)
                    process.kill()
                    process = processes[which] = Process(world, f"p{next(names)}")
                    nursery.start_soon(process.run)
                case "pause" if process.resumed.is_set():
                    truth.unsure |= {int(each.principal.user or 0) for each in process.connections}
                    process.resumed = trio.Event()
                    nursery.start_soon(resume, process, value)
                case "away":
                    world.is_away = True
                    await trio.sleep(value)
                    world.is_away = False
                case "lose answers":
                    world.answers_get_lost = True
                    await trio.sleep(value)
                    world.answers_get_lost = False
            await trio.sleep(0.1)
        await trio.sleep(40)
        nursery.cancel_scope.cancel()


@settings(max_examples=settings().max_examples // 5)  # 0.2 s each
@given(steps=st.lists(_steps, min_size=3, max_size=25), grace=st.sampled_from([0.0, 2.0, 10.0]))
def test_whatever_happens_each_change_is_told_once_and_the_truth_in_the_end(
    client: "redis.Redis", steps: list[tuple[str, int, int]], grace: float
) -> None:
    async def main() -> None:
        truth = Truth()
        async with service(client, 3, grace=grace) as (world, processes):
            await play(world, processes, steps, truth)
            for user in USERS:
                told = [
                    (kind, at)
                    for (kind, who), at in zip(world.told, world.told_at, strict=True)
                    if who == str(user)
                ]
                # In turn, beginning with ONLINE.
                kinds = itertools.cycle(["USER_ONLINE", "USER_OFFLINE"])
                assert [kind for kind, _ in told] == list(itertools.islice(kinds, len(told)))
                is_online = len(told) % 2 == 1
                assert is_online == truth.is_connected(user)
                assert is_online == (f"1:waiter:{user}" in world.online())
                if user not in truth.unsure:
                    moments = [at for _, at in told]
                    for online, offline in zip(moments[::2], moments[1::2], strict=False):
                        assert truth.longest_gap(user, online, offline) >= grace - 0.1
            left = [who for kind, who in world.told]
            present = sum(left.count(str(user)) % 2 for user in USERS)
            assert all(each.presence.present["waiter"] == present for each in processes)

    trio.run(main, clock=MockClock(autojump_threshold=0))
