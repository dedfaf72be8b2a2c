"""Sources follow a Sentinel set and a Cluster: nothing is lost silently, and nothing is doubled."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.gateways import until
from tests.support.source_engine import Engine
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.sharded_pubsub import ShardedPubSub
from trio_gateway.broker.topologies import make_topology
from trio_gateway.broker.topology_watch import watch
from trio_gateway.core.event_ids import entry_id, tag
from trio_gateway.core.resilience import Breaker
from trio_gateway.redis_sets import Cluster
from trio_gateway.redis_sets.node import Node
from trio_gateway.redis_sets.redis_set import RedisSet
from trio_gateway.redis_url import RedisUrl
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.supervision import keep_running

SETS = {"sentinel": "sentinels", "cluster": "cluster"}  # fixtures
LIVE_AGAIN = 2.0  # seconds after the new primary accepts writes


# A killed server of a Sentinel set is a replica again after 10 s.
@pytest.fixture(params=[pytest.param("sentinel", marks=pytest.mark.chaos), "cluster"])
def servers(request: pytest.FixtureRequest) -> Iterator[RedisSet]:
    found: RedisSet = request.getfixturevalue(SETS[request.param])
    try:
        yield found
    finally:
        for node in found.nodes:
            if node.runs:
                node.thaw()
            else:
                node.start()
        found.wait_healthy(40)


@contextmanager
def engine_of(servers: RedisSet) -> Iterator[Engine]:
    engine = Engine(servers)
    engine.empty()
    try:
        yield engine
    finally:
        engine.close()


async def wait_writable(engine: Engine, name: str, other_than: Node) -> None:
    servers = engine.servers
    assert isinstance(servers, RedisSet)
    node = await trio.to_thread.run_sync(lambda: servers.wait_writable(name, other_than=other_than))
    engine.move_to(name, node.port)


async def is_live_again(engine: Engine, name: str) -> None:
    watch = Stopwatch()
    engine.add(name, 5)
    last = engine.added[name][-1]
    await until(lambda: engine.sink.known(name)[-1:] == [last], 10)
    assert watch.net < LIVE_AGAIN


async def test_planned_failover_loses_and_doubles_nothing(servers: RedisSet) -> None:
    with engine_of(servers) as engine:
        async with engine.reading("a", "b"):
            engine.add("a", 10)
            engine.add("b", 10)
            old = servers.primary("a")
            await trio.to_thread.run_sync(servers.failover, "a")
            await wait_writable(engine, "a", old)
            await is_live_again(engine, "a")
            engine.failed_over()
            await until(lambda: engine.has_all("a", "b"))
        assert not engine.sink.gaps


@pytest.mark.chaos
@pytest.mark.parametrize("fault", ["kill", "freeze"])
@pytest.mark.parametrize("turn", range(3))
async def test_primary_that_is_gone_loses_and_doubles_nothing_that_was_replicated(
    servers: RedisSet, fault: str, turn: int
) -> None:
    with engine_of(servers) as engine:
        async with engine.reading("a", "b"):
            engine.add("a", 10)
            engine.at("a").wait(1, 1000)
            old = servers.primary("a")
            getattr(old, fault)()
            await wait_writable(engine, "a", old)
            await is_live_again(engine, "a")
            await until(lambda: engine.has_all("a"))
            if fault == "freeze":  # it goes on answering, and must not be believed
                old.thaw()
                await is_live_again(engine, "a")
                await until(lambda: engine.has_all("a"))
        assert not engine.sink.gaps


@pytest.mark.chaos
@pytest.mark.parametrize("has_past", [True, False], ids=["read live", "begun at the end"])
async def test_what_the_new_primary_lacks_is_one_gap_of_its_stream_alone(
    servers: RedisSet, has_past: bool
) -> None:
    with engine_of(servers) as engine:
        engine.sink.most_past = 0
        engine.add("a", 10)
        engine.at("a").wait(1, 1000)
        if not has_past:
            _lose(engine, servers, "a")
        async with engine.reading("a", "b"):
            if has_past:
                _lose(engine, servers, "a")
                await until(lambda: engine.sink.known("a")[-1:] == engine.added["a"][-1:])
            old = servers.node_at(engine.port_of("a"))
            old.kill()
            for node in servers.nodes:
                if node is not old:
                    node.thaw()
            await wait_writable(engine, "a", old)
            engine.add("a", 20)  # perhaps before it is read there
            await is_live_again(engine, "a")
            await trio.sleep(3)  # the next look at the counts
        assert [stream for stream, _, _ in engine.sink.gaps] == [tag("a")]
        live = engine.sink.live["a"]
        assert len(set(live)) == len(live)
        assert [entry_id(each) for each in live[-25:]] == engine.added["a"][-25:]


def _lose(engine: Engine, servers: RedisSet, name: str) -> None:
    """Add entries to a primary whose replicas are frozen."""
    primary = servers.node_at(engine.port_of(name))
    for node in servers.nodes:
        if node is not primary and node.info("replication").get("master_port") == primary.port:
            node.freeze()
    primary.ask("CLIENT", "KILL", "TYPE", "replica")  # else they read it from their sockets later
    engine.add(name, 7)


# A slot that moves


async def test_slot_that_is_moved_under_load_loses_and_doubles_nothing(cluster: Cluster) -> None:
    with engine_of(cluster) as engine:
        async with engine.reading("a", "b"):
            engine.add("a", 300)
            there = next(node for node in cluster.primaries() if node is not cluster.primary("a"))
            await trio.to_thread.run_sync(cluster.move_slot, "a", there)
            engine.failed_over()
            await is_live_again(engine, "a")
            await until(lambda: engine.has_all("a"))
        assert not engine.sink.gaps


async def test_stream_that_has_moved_before_its_slot_is_read_where_it_is(cluster: Cluster) -> None:
    with engine_of(cluster) as engine:
        here = cluster.primary("a")
        there = next(node for node in cluster.primaries() if node is not here)
        slot = cluster.slot("a")
        try:
            async with engine.reading("a"):
                engine.add("a", 10)
                await until(lambda: engine.has_all("a"))
                there.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", here.ask("CLUSTER", "MYID"))
                here.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there.ask("CLUSTER", "MYID"))
                here.ask("MIGRATE", "127.0.0.1", there.port, "a", 0, 5000)
                with there.client() as client:
                    pipeline = client.pipeline(transaction=False)
                    pipeline.execute_command("ASKING")  # type: ignore[no-untyped-call]
                    pipeline.xadd("a", {"data": "{}"})
                    engine.added["a"].append(pipeline.execute()[1])
                await until(lambda: engine.has_all("a"), 6)
                assert not engine.source.unreadable
        finally:
            for node in (there, *cluster.primaries()):
                node.ask("CLUSTER", "SETSLOT", slot, "NODE", there.ask("CLUSTER", "MYID"))
        assert not engine.sink.gaps


# Sharded Pub/Sub


class Heard:
    """Notes what it hears."""

    def __init__(self) -> None:
        self.messages: list[bytes] = []
        self.subscribed = 0

    def receive(self, payload: bytes, /) -> None:
        self.messages.append(payload)

    def on_subscribed(self) -> None:
        self.subscribed += 1


async def test_sharded_channel_is_heard_where_its_slot_is(cluster: Cluster) -> None:
    channel, heard = "a", Heard()
    topology = make_topology(RedisUrl.from_url(cluster.url))
    breaker = Breaker(1000, 30)
    sharded = ShardedPubSub(topology, channel, Ingest(), EventQueue(10), breaker, heard)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch, topology)
        nursery.start_soon(
            keep_running, "sharded", sharded.run, breaker, None, topology.wait_changed
        )
        await until(lambda: sharded.connected)
        old = cluster.primary(channel)
        old.ask("SPUBLISH", channel, "1")
        await until(lambda: heard.messages == [b"1"])
        there = next(node for node in cluster.primaries() if node is not old)
        await trio.to_thread.run_sync(cluster.move_slot, channel, there)

        async def hears_there() -> bool:  # not at once: a node may learn later that it moved
            there.ask("SPUBLISH", channel, "2")
            return b"2" in heard.messages

        await until(hears_there)
        assert heard.subscribed >= 2
        assert heard.messages[0] == b"1"
        nursery.cancel_scope.cancel()


async def test_cluster_that_allows_no_sharded_channel_is_warned_of_once(cluster: Cluster) -> None:
    for node in cluster.nodes:
        node.ask("ACL", "SETUSER", "few", "reset", "on", "nopass", "+@all", "-ssubscribe", "~*")
    topology = make_topology(RedisUrl.from_url(cluster.url.replace("//", "//few:x@")))
    sharded = ShardedPubSub(topology, "a", Ingest(), EventQueue(10), Breaker(5, 30), Heard())
    with capture_logs() as logs, trio.move_on_after(0.5):
        await sharded.run()
    (warning,) = (log for log in logs if log["log_level"] == "warning")
    assert "+ssubscribe" in warning["event"]
