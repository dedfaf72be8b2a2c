"""Cluster: the newest map of the slots is found, whichever nodes answer."""

from typing import Any

import pytest
import trio

from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.asking import GRACE
from trio_gateway.broker.cluster import cluster_topology, read_answer
from trio_gateway.core.slots import SLOTS, SlotMap, slot_of
from trio_gateway.redis_sets import Cluster
from trio_gateway.redis_url import RedisUrl
from trio_gateway.runtime.supervision import ConnectionLost

WHOLE: list[Any] = [[0, SLOTS - 1, [b"10.0.0.1", 6379, b"id"]]]


def info(state: str, epoch: int) -> bytes:
    return f"cluster_state:{state}\r\ncluster_current_epoch:{epoch}\r\n".encode()


def test_intact_cluster_with_the_newest_epoch_is_believed() -> None:
    best = read_answer(info("ok", 7), WHOLE, "h")
    worse = [
        read_answer(info("ok", 6), WHOLE, "h"),  # has not heard of the failover
        read_answer(info("fail", 8), WHOLE, "h"),  # cut off
        read_answer(info("ok", 7), [], "h"),
        read_answer(PermissionError(), WHOLE, "h"),
    ]
    assert all(best.rank > each.rank for each in worse)


@pytest.mark.parametrize("reply", [b"OK", [[1]], None])
def test_other_servers_are_no_nodes(reply: Any) -> None:
    with pytest.raises(ConnectionLost, match="no node of a Cluster"):
        read_answer(info("ok", 1), reply, "h")


async def test_each_slot_leads_to_its_primary(cluster: Cluster) -> None:
    url = RedisUrl.from_url(cluster.url)
    topology = cluster_topology(url)
    for key in ("a", "b", "{c}"):
        server = await topology.primary(slot_of(key))
        assert server == url.node("127.0.0.1", cluster.primary(key).port)
    assert {each.port for each in await topology.primaries()} == {
        each.port for each in cluster.primaries()
    }


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


def test_map_of_nothing_has_no_primary() -> None:
    assert read_answer(info("fail", 0), [], "h").slots == SlotMap()
