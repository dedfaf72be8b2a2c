"""Topology: who is the primary is asked when it is needed, once for all who want to know it."""

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from trio_gateway.broker.topology import PAUSE, Topology, single
from trio_gateway.broker.topology_watch import EVERY, HURRIED, HURRY, watch
from trio_gateway.core.slots import Node, SlotMap
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.supervision import ConnectionLost

A, B = ("a", 1), ("b", 2)


class Servers:
    """What the servers say: a primary, or None for no answer. An answer takes a second."""

    def __init__(self, primary: Node | None) -> None:
        self.primary = primary
        self.looks: list[float] = []
        self.topology = Topology(self.look, lambda node: RedisAddress(*node))

    async def look(self, before: SlotMap) -> SlotMap:
        self.looks.append(trio.current_time())
        await trio.sleep(1)
        if self.primary is None:
            raise ConnectionLost("nobody there")
        return SlotMap.of_one(self.primary)

    async def ask(self, outcomes: list[object]) -> None:
        try:
            outcomes.append(await self.topology.primary())
        except ConnectionLost as lost:
            outcomes.append(str(lost))


async def test_known_primary_is_not_asked_for_again(autojump_clock: MockClock) -> None:
    servers = Servers(A)
    for _ in range(2):
        assert await servers.topology.primary() == RedisAddress("a", 1)
    assert servers.looks == [0]


async def test_suspected_primary_is_asked_for_again(autojump_clock: MockClock) -> None:
    servers = Servers(A)
    old = await servers.topology.primary()
    servers.primary = B
    servers.topology.suspect(old)
    new = await servers.topology.primary()
    assert new == RedisAddress("b", 2)
    servers.topology.suspect(old)  # by one that has not heard of the change
    assert await servers.topology.primary() == new
    assert len(servers.looks) == 2


async def test_all_who_ask_at_the_same_time_share_one_answer(autojump_clock: MockClock) -> None:
    for primary in (A, None):
        servers, outcomes = Servers(primary), list[object]()
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(servers.ask, outcomes)
        assert outcomes == [RedisAddress("a", 1) if primary else "nobody there"] * 10
        assert len(servers.looks) == 1


async def test_one_that_gives_up_leaves_the_question_to_the_others(
    autojump_clock: MockClock,
) -> None:
    servers = Servers(A)
    async with trio.open_nursery() as nursery:
        with trio.move_on_after(0.5):
            nursery.start_soon(servers.topology.primary)
            await servers.topology.primary()
    assert await servers.topology.primary() == RedisAddress("a", 1)


async def test_failed_looks_have_a_pause_between_them(autojump_clock: MockClock) -> None:
    servers = Servers(None)
    for _ in range(3):
        with pytest.raises(ConnectionLost, match="nobody there"):
            await servers.topology.primary()
    assert servers.looks == pytest.approx([0, 1 + PAUSE, 2 + 2 * PAUSE])


async def test_last_known_primary_is_used_while_nobody_answers_who_the_primary_is(
    autojump_clock: MockClock,
) -> None:
    servers = Servers(A)
    topology = servers.topology
    first = await topology.primary()
    servers.primary = None
    with pytest.raises(ConnectionLost):
        await topology.look_again()
    assert not topology.is_known
    asked = len(servers.looks)
    assert await topology.primary() == first  # without another question
    assert len(servers.looks) == asked
    topology.suspect(first)
    assert await topology.primary() == first
    assert len(servers.looks) == asked + 1
    servers.primary = B
    topology.suspect(first)
    assert await topology.primary() == RedisAddress("b", 2)


async def test_log_names_a_primary_that_a_redirection_has_named_before() -> None:
    maps = [SlotMap.of_one(A), SlotMap.of_one(B)]

    async def look(before: SlotMap) -> SlotMap:
        return maps.pop(0)

    topology = Topology(look, lambda node: RedisAddress(*node), is_cluster=True)
    await topology.current()
    topology.moved(5, B)
    with capture_logs() as logs:
        await topology.look_again()
    assert [(each["was"], each["now"]) for each in logs] == [("a:1", "b:2")]


async def test_moved_slot_is_known_at_once_and_others_are_told(autojump_clock: MockClock) -> None:
    servers = Servers(A)
    topology = servers.topology
    await topology.current()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(topology.wait_changed)
        await trio.testing.wait_all_tasks_blocked()
        topology.moved(5, B)
        assert await topology.primary(5) == RedisAddress("b", 2)
        assert await topology.primary(6) == RedisAddress("a", 1)
        assert {each.host for each in await topology.primaries()} == {"a", "b"}
    assert len(servers.looks) == 1


async def test_slot_without_a_primary_is_asked_for_again(autojump_clock: MockClock) -> None:
    maps = [SlotMap(((0, 5, A),)), SlotMap.of_one(B)]

    async def look(before: SlotMap) -> SlotMap:
        return maps.pop(0)

    topology = Topology(look, lambda node: RedisAddress(*node))
    with pytest.raises(ConnectionLost, match="slot 6 has no primary"):
        await topology.primary(6)
    assert await topology.primary(6) == RedisAddress("b", 2)


async def test_single_server_is_always_the_primary() -> None:
    server = RedisAddress(path="/run/redis.sock", password="p")
    topology = single(server)
    topology.suspect(server)
    assert await topology.primary(99) is server
    assert await topology.primaries() == [server]


async def test_topology_is_looked_at_more_often_after_a_suspicion(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    servers = Servers(A)
    nursery.start_soon(watch, servers.topology)
    await trio.sleep(10)
    assert len(servers.looks) == 4  # an answer takes a second, too
    servers.topology.suspect(RedisAddress(*A))
    await trio.sleep(HURRY)
    assert len(servers.looks) - 4 == HURRY / (1 + HURRIED)
    before = len(servers.looks)
    await trio.sleep(12)
    assert len(servers.looks) - before <= 5


async def test_server_is_left_when_another_one_is_the_primary(autojump_clock: MockClock) -> None:
    servers = Servers(A)
    old = await servers.topology.primary()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, servers.topology)
        await trio.sleep(5)
        servers.primary = B
        with trio.fail_after(EVERY + 1.1):
            await servers.topology.wait_left(old, 0)
        nursery.cancel_scope.cancel()
    assert trio.current_time() > 5
