"""Cluster: the newest map of the slots is found, whichever nodes answer."""

from typing import Any

import pytest
import trio

from tests.support.failovers import commands_of, fails_over
from tests.support.gateways import until
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.asking import GRACE
from trio_gateway.broker.cluster import cluster_topology
from trio_gateway.broker.command_link import CommandLink
from trio_gateway.broker.dead_letters import DeadLetters
from trio_gateway.core.slots import hash_tag, slot_of
from trio_gateway.redis_sets import Cluster, Node, cluster_set
from trio_gateway.redis_url import RedisUrl
from trio_gateway.runtime.supervision import ConnectionLost


async def test_each_slot_leads_to_its_primary(cluster: Cluster) -> None:
    url = RedisUrl.from_url(cluster.url)
    topology = cluster_topology(url)
    for key in ("a", "b", "{c}"):
        server = await topology.primary(slot_of(key))
        assert server == url.node("127.0.0.1", cluster.primary(key).port)
    assert {each.port for each in await topology.primaries()} == {
        each.port for each in cluster.primaries()
    }


async def test_every_command_works_whatever_the_slots(cluster: Cluster) -> None:
    async with commands_of(cluster) as commands:
        await commands.check(2)
        keys = [f"key:{n}" for n in range(50)]
        for key in keys[:25]:
            await commands.set_for(key, key, 60)
        expected = [key.encode() if key in keys[:25] else None for key in keys]
        assert await commands.mget([*keys, keys[0]]) == [*expected, expected[0]]
        assert await commands.mget([]) == []
        assert await commands.get(keys[0]) == await commands.getdel(keys[0]) == b"key:0"
        assert await commands.get(keys[0]) is None
        for stream in ("s", "events:critical:{3}"):
            await commands.add(stream, {"data": b"1"})
            ((first, _),) = await commands.read_on(stream, "0-0", 9)
            assert await commands.read_back(stream, "+", 9) == [(first, {b"data": b"1"})]
            once = f"gateway:dlq:{{{hash_tag(stream)}}}:x"
            added = [await commands.add_once(once, 60, stream, {"data": b""}, 9) for _ in range(2)]
            assert added == [True, False]
        for n in range(20):  # whatever the node
            await commands.publish(f"channel:{n}", b"x")


async def test_dead_letters_are_copied_once(cluster: Cluster) -> None:
    async with commands_of(cluster) as commands, trio.open_nursery() as nursery:
        processes = [DeadLetters(commands, "dlq") for _ in range(2)]
        for letters in processes:
            nursery.start_soon(letters.run)
            letters.offer("events:critical:{3}", "1-1", "json", "no JSON", b"")
        processes[1].offer("events:critical:{3}", "1-2", "json", "no JSON", b"")
        await until(lambda: sum(each.outcomes["copied"] for each in processes) == 2)
        nursery.cancel_scope.cancel()
    assert cluster.primary("dlq").ask("XLEN", "dlq") == 2


async def test_link_to_a_slot_follows_it_to_another_node(cluster: Cluster) -> None:
    link = CommandLink(cluster_topology(RedisUrl.from_url(cluster.url)), cluster.slot("{link}"))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        for value in ("a", "b"):
            await link.ask("SET", "{link}", value, seconds=5)
            assert cluster.primary("{link}").ask("GET", "{link}") == value
            source = cluster.primary("{link}")
            target = next(node for node in cluster.primaries() if node is not source)
            await trio.to_thread.run_sync(cluster.move_slot, "{link}", target)
        nursery.cancel_scope.cancel()


async def test_slot_that_is_being_moved_is_served_by_both_nodes(cluster: Cluster) -> None:
    source = cluster.primary("{t}")
    target = next(node for node in cluster.primaries() if node is not source)
    ids = {node: node.ask("CLUSTER", "MYID") for node in (source, target)}
    slot = cluster.slot("{t}")
    async with commands_of(cluster) as commands:
        for key in ("{t}1", "{t}2"):
            await commands.set_for(key, key, 60)
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source])
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[target])
        source.ask("MIGRATE", "127.0.0.1", target.port, "{t}1", 0, 5000)
        assert await commands.mget(["{t}1", "{t}2", "{t}3"]) == [b"{t}1", b"{t}2", None]
        assert await commands.getdel("{t}1") == b"{t}1"
        await commands.set_for("{t}3", "new", 60)  # on the new node
        source.ask("MIGRATE", "127.0.0.1", target.port, "{t}2", 0, 5000)
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", ids[target])
        assert await commands.mget(["{t}1", "{t}2", "{t}3"]) == [None, b"{t}2", b"new"]
        assert await commands.getdel("{t}2") == b"{t}2"


@pytest.mark.chaos
async def test_failover_and_moved_slots_are_found_without_the_seeds(cluster: Cluster) -> None:
    """All nodes of the URL may be gone: the nodes that they named are asked."""
    before = cluster.primary("a")
    topology = cluster_topology(RedisUrl.from_url(f"redis+cluster://127.0.0.1:{before.port}"))
    old = await topology.primary(slot_of("a"))
    before.freeze()
    try:
        watch = Stopwatch()
        await topology.look_again()
        assert watch.net < GRACE + 0.5
        new = await trio.to_thread.run_sync(lambda: cluster.wait_writable("a", other_than=before))
        topology.suspect(old)
        with trio.fail_after(10):
            while (await topology.primary(slot_of("a"))).port != new.port:
                await topology.look_again()
    finally:
        before.thaw()


async def test_server_without_cluster_mode_is_told(redis_url: str) -> None:
    url = redis_url.replace("redis://", "redis+cluster://")
    with pytest.raises(ConnectionLost, match="CLUSTER failed: ERR"):
        await cluster_topology(RedisUrl.from_url(url)).primary()


async def test_one_primary_that_works_is_enough_to_be_ready(cluster: Cluster) -> None:
    async with commands_of(cluster) as commands:
        await commands.check(2)
        frozen = cluster.primary("gateway:ticket:check:0")
        frozen.freeze()
        try:
            await commands.check(1)
        finally:
            frozen.thaw()


@pytest.mark.chaos
@pytest.mark.parametrize("lose", [Node.freeze, Node.kill])
async def test_commands_work_again_soon_after_a_primary_was_lost(lose: Any) -> None:
    with cluster_set() as found:
        await fails_over(found, "k", lose)


@pytest.mark.chaos
async def test_commands_work_again_soon_after_a_planned_failover() -> None:
    with cluster_set() as found:
        await fails_over(found, "k", lambda old: found.failover("k"))
