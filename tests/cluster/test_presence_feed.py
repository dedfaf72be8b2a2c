"""What admins that watch presence are told, over several processes; time is virtual."""

from collections.abc import Sequence
from typing import Any, cast

import pytest
import redis
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from trio_gateway.core.audiences import BranchId, Endpoint
from trio_gateway.runtime.connection import Connection
from trio_gateway.testing import make_principal

from .presence_world import FakeConnection, Process, World
from .test_presence import client as client
from .test_presence import service


def watch(process: Process, branch: int = 1, **keys: Any) -> FakeConnection:
    """An admin that watches a branch, and is in no hub."""
    admin = FakeConnection(make_principal(Endpoint.ADMIN, user=9, branches=[branch], **keys))
    process.presence.feed.watch(cast(Connection, admin), BranchId(branch))
    return admin


async def test_slow_client_gets_no_changes_but_the_state_when_it_has_caught_up(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (_, (one,)):
        admin, quick = watch(one), watch(one)
        await trio.sleep(0.1)
        assert len(admin.messages) == 1
        admin.waiting_bytes = 10
        for user in range(50):
            one.join(user)
            await trio.sleep(0.1)
        assert len(admin.messages) == 1
        assert len(quick.messages) == 51
        admin.waiting_bytes = 0
        await trio.sleep(1.1)
        assert len(admin.messages) == 2
        assert admin.known(1) == quick.known(1)
        one.join(99)
        await trio.sleep(0.1)
        assert [len(each.messages) for each in (admin, quick)] == [3, 52]


async def test_state_has_the_clients_of_a_process_that_has_just_started(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 0) as (world, _), trio.open_nursery() as nursery:
        one = Process(world, "one")
        one.resumed = trio.Event()  # its first beat is under way
        nursery.start_soon(one.run)
        one.join(21)
        admin = watch(one)
        await trio.sleep(0.3)
        one.resumed.set()
        await trio.sleep(0.3)
        assert len(admin.messages) == 1
        assert [each["user_id"] for each in admin.messages[0]["users"]] == ["21"]
        nursery.cancel_scope.cancel()


async def test_state_is_read_once_for_all_watchers_of_a_tenant_and_not_without_them(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (_, (one,)):
        reads: list[str] = []
        run = one.presence.feed._run

        async def counting(script: str, arguments: Sequence[str | int]) -> Any:
            reads.append(script)
            return await run(script, arguments)

        one.presence.feed._run = counting
        admins = [watch(one) for _ in range(20)]
        await trio.sleep(5)
        admins += [watch(one) for _ in range(20)]
        assert all(len(each.messages) == 1 for each in admins)
        assert len(reads) == 1
        for each in admins:
            one.presence.feed.unwatch(cast(Connection, each))
        assert not one.presence.feed._tenants
        assert not one.presence.feed._branches
        one.join()
        await trio.sleep(1)
        assert all(len(each.messages) == 1 for each in admins)


async def test_messages_that_are_none_are_ignored(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (_, (one,)):
        admin = watch(one)
        await trio.sleep(0.1)
        for text in (b"", b"[]", b"[1,[[]]]", b'[1,[["x"]]]', b'[2,[["1:waiter:1","s","x"]]]'):
            one.presence.feed.receive(text)
        one.join()
        await trio.sleep(0.1)
        assert list(admin.known(1)) == [("waiter", "21")]


async def test_branches_of_a_user_are_those_of_all_its_connections(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 2) as (_, (one, other)):
        admin = watch(other, 2)
        one.join(branches=[1])
        await trio.sleep(0.1)
        assert admin.known(2) == {}
        device = other.join(branches=[2], sectors=[5])  # the first that this process writes
        await trio.sleep(0.1)
        assert admin.known(2)["waiter", "21"]["connections"] == 2
        other.leave(device)
        await trio.sleep(0.1)
        assert admin.known(2) == {}


async def test_sectors_of_a_user_are_those_of_all_its_connections(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    """Two processes may hold the same of it, after each held something else."""
    async with service(client, 2) as (_, (one, other)):
        admin = watch(one)
        devices = [(each, each.join(sectors=[5])) for each in (one, other)]
        await trio.sleep(0.2)
        for sector in (6, 7):
            for process, device in devices:
                process.move(device, user=21, sectors=[sector])
                await trio.sleep(0.2)
            assert admin.known(1)["waiter", "21"]["sector_ids"] == [sector]
        one.move(devices[0][1], user=21, sectors=[8])
        await trio.sleep(0.2)
        assert admin.known(1)["waiter", "21"]["sector_ids"] == [7, 8]
        other.leave(devices[1][1])
        await trio.sleep(0.2)
        assert admin.known(1)["waiter", "21"]["sector_ids"] == [8]


async def test_visit_between_two_writes_is_no_leave_for_those_who_watch(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1, grace=15) as (_, (one,)):
        admin = watch(one)
        one.leave(one.join(sectors=[5]))
        await trio.sleep(1)
        one.leave(one.join(sectors=[6]))
        await trio.sleep(1)
        assert ("waiter", "21") in admin.known(1)


async def test_changes_that_the_state_contains_are_not_told_again(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1, grace=0) as (_, (one,)):
        ana = one.join()
        await trio.sleep(0.1)
        run = one.presence.feed._run

        async def after_changes(script: str, arguments: Sequence[str | int]) -> Any:
            one.leave(ana)
            await trio.sleep(0.1)
            one.join()
            await trio.sleep(0.1)
            return await run(script, arguments)

        one.presence.feed._run = after_changes
        admin = watch(one)
        await trio.sleep(1)
        assert len(admin.messages) == 1
        assert admin.known(1).keys() == {("waiter", "21")}


async def test_state_that_was_read_while_messages_were_lost_is_read_again(
    client: "redis.Redis", autojump_clock: MockClock
) -> None:
    async with service(client, 1) as (world, (one,)):
        run = one.presence.feed._run
        losses = 0

        async def before_a_loss(script: str, arguments: Sequence[str | int]) -> Any:
            nonlocal losses
            reply = await run(script, arguments)
            if not losses:
                losses += 1
                world.loses_messages = True
                one.join()
                await trio.sleep(0.1)
                world.loses_messages = False
                one.presence.feed.on_subscribed()
            return reply

        one.presence.feed._run = before_a_loss
        admin = watch(one)
        await trio.sleep(2)
        assert admin.known(1).keys() == {("waiter", "21")}


_steps = st.one_of(
    st.tuples(
        st.just("join"),
        st.integers(0, 1),
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.sampled_from([(1,), (2,), (1, 2)])),
    ),
    st.tuples(st.just("leave"), st.integers(0, 1), st.integers(0, 3)),
    st.tuples(
        st.just("move"),
        st.integers(0, 1),
        st.tuples(st.integers(0, 3), st.sampled_from([(1,), (2,), (1, 2)]), st.integers(0, 2)),
    ),
    st.tuples(  # of all connections of a user, whichever process has them
        st.just("refresh"),
        st.just(0),
        st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(0, 2)),
    ),
    st.tuples(st.just("wait"), st.just(0), st.sampled_from([0.3, 3.0])),
    st.tuples(st.just("lose messages"), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("subscribe again"), st.just(0), st.just(0)),
)


async def play(world: World, processes: list[Process], steps: list[tuple[str, int, Any]]) -> None:
    for kind, which, value in steps:
        process = processes[which]
        match kind:
            case "join":
                tenant, user, branches = value
                process.join(user, tenant=tenant, branches=branches, sectors=[user])
            case "leave" if value < len(process.connections):
                process.leave(process.connections[value])
            case "move" if value[0] < len(process.connections):
                number, branches, sector = value
                connection = process.connections[number]
                principal = connection.principal
                process.move(
                    connection,
                    tenant=int(principal.tenant),
                    user=int(principal.user or 0),
                    branches=branches,
                    sectors=[sector] if sector else [],
                )
            case "refresh":
                tenant, user, sector = value
                for each in processes:
                    for connection in each.connections:
                        who = connection.principal
                        if (who.tenant, who.user) == (tenant, str(user)):
                            each.move(
                                connection,
                                tenant=tenant,
                                user=user,
                                branches=sorted(who.branches),
                                sectors=[sector] if sector else [],
                            )
            case "wait":
                await trio.sleep(value)
            case "lose messages":
                world.loses_messages = True
            case "subscribe again" if world.loses_messages:
                world.loses_messages = False
                for each in processes:
                    each.presence.feed.on_subscribed()
        await trio.sleep(0.05)
    if world.loses_messages:
        world.loses_messages = False
        for each in processes:
            each.presence.feed.on_subscribed()
    await trio.sleep(10)


@settings(max_examples=settings().max_examples // 3)
@given(steps=st.lists(_steps, max_size=20))
def test_each_admin_ends_with_the_truth_of_its_branch_and_never_sees_another_tenant(
    client: "redis.Redis", steps: list[tuple[str, int, Any]]
) -> None:
    async def main() -> None:
        async with service(client, 2, grace=1) as (world, processes):
            places = [(tenant, branch) for tenant in (1, 2) for branch in (1, 2)]
            admins = {
                (place, process.name): watch(process, place[1], tenant=place[0])
                for place in places
                for process in processes
            }
            await play(world, processes, steps)
            connections = [each for process in processes for each in process.connections]
            for ((tenant, branch), _), admin in admins.items():
                expected: dict[str, set[int]] = {}
                for principal in (each.principal for each in connections):
                    if principal.tenant == tenant and branch in principal.branches:
                        sectors = expected.setdefault(str(principal.user), set())
                        sectors |= principal.sectors.get(BranchId(branch), frozenset())
                known = admin.known(branch)
                assert {n: set(i["sector_ids"]) for (_, n), i in known.items()} == expected
                # Each message is of the branch, and about users that were in the tenant.
                assert {m["branch_id"] for m in admin.messages} == {branch}

    trio.run(main, clock=MockClock(autojump_threshold=0))


@pytest.mark.parametrize("tenant", [1, 2])
async def test_admin_is_never_told_of_another_tenant(
    client: "redis.Redis", autojump_clock: MockClock, tenant: int
) -> None:
    async with service(client, 2, grace=0) as (_, (one, other)):
        admin = watch(one, tenant=tenant)
        for process in (one, other):
            for user in range(100):
                mine = process.join(user, tenant=1)
                theirs = process.join(user + 1000, tenant=2)
                await trio.sleep(0.05)
                process.leave(mine)
                process.leave(theirs)
        await trio.sleep(2)
        seen = {int(each["user_id"]) for m in admin.messages for each in m.get("joined", [])}
        assert seen == set(range(100) if tenant == 1 else range(1000, 1100))
