"""The publisher on real Sentinel sets and Clusters that fail over."""

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
import trustme

from tests.support.ports import free_port
from tests.support.redis_server import valkey
from tests.support.redis_tls import tls_in_front_of
from trio_gateway.core.shards import shard_of, stream_name
from trio_gateway.publisher import AsyncPublisher, InDoubt, Publisher, PublishFailed, asking
from trio_gateway.redis_sets import Cluster, Node, SentinelSet, cluster_set, sentinel_set

EVENT = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
CART = {"type": "CART_CLEARED", "tenant_id": 1, "branch_id": 1, "session_id": 456}
STREAM = "events:critical"


PASSWORD = "a /password@1"


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelSet]:
    with sentinel_set(password=PASSWORD) as found:  # the Sentinels have none
        yield found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    with cluster_set(password=PASSWORD) as found:
        yield found


def ids(node: Node, stream: str = STREAM) -> list[str]:
    """The ids of the events in a stream, in its order."""
    with node.client() as client:
        found: Any = client.xrange(stream)
    return [json.loads(fields["data"])["id"] for _, fields in found]


def publish_until(publisher: Publisher, key: str, seconds: float = 15) -> list[PublishFailed]:
    """Publish it again as long as that fails; return the failures."""
    failures: list[PublishFailed] = []
    end = time.monotonic() + seconds
    while True:
        try:
            publisher.publish(EVENT, id=key)
        except PublishFailed as failed:
            if time.monotonic() > end:
                raise
            failures.append(failed)
            time.sleep(0.01)
        else:
            return failures


def test_event_goes_to_the_primary_that_the_sentinels_name(sentinels: SentinelSet) -> None:
    with Publisher(sentinels.url, confirm=2) as publisher:
        publisher.publish(EVENT, id="two")
        assert publisher.publish(CART) == 0
    with Publisher(sentinels.url, confirm="all") as publisher:
        publisher.publish(EVENT, id="all")
    for node in sentinels.nodes:
        assert ids(node)[-2:] == ["two", "all"]


@pytest.mark.parametrize("library", ["asyncio", "trio"])
@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
def test_asynchronous_publisher_takes_the_same_urls(
    request: pytest.FixtureRequest, library: str, kind: str
) -> None:
    found: SentinelSet | Cluster = request.getfixturevalue(kind)

    async def publish() -> str | int:
        async with AsyncPublisher(found.url, confirm=1) as publisher:
            return await publisher.publish(EVENT, id=f"{library}-{kind}")

    assert isinstance(asyncio.run(publish()) if library == "asyncio" else trio.run(publish), str)
    assert ids(found.primary(STREAM))[-1] == f"{library}-{kind}"


def test_unknown_master_name_is_a_failure_that_says_so(sentinels: SentinelSet) -> None:
    with (
        Publisher(sentinels.url.replace("/mymaster", "/other")) as publisher,
        pytest.raises(PublishFailed, match="knows no primary with the name other") as failed,
    ):
        publisher.publish(EVENT)
    assert not failed.value.in_doubt


def test_confirmed_events_survive_a_primary_that_fails_while_its_replicas_are_behind(
    sentinels: SentinelSet,
) -> None:
    """Of those that nobody confirms, only what had left the primary survives."""
    sentinels.wait_healthy()
    before = sentinels.primary()
    replicas = [node for node in sentinels.nodes if node is not before]
    confirmed = [f"confirmed-{n}" for n in range(50)]
    acknowledged = [f"acknowledged-{n}" for n in range(400)]
    with Publisher(sentinels.url, confirm=1) as careful, Publisher(sentinels.url) as careless:
        for key in confirmed:
            careful.publish(EVENT, id=key)
        for node in replicas:
            node.freeze()
        with pytest.raises(InDoubt, match="0 of 1"):
            careful.publish(EVENT, id="in doubt")
        for key in acknowledged:
            careless.publish(EVENT | {"data": 60_000 * "x"}, id=key)
        before.kill()
        for node in replicas:
            node.thaw()
        publish_until(careful, "in doubt")
    end = time.monotonic() + 15
    while (after := sentinels.primary()) is before:  # the publisher believes the first that knows
        assert time.monotonic() < end
        time.sleep(0.01)
    found = ids(after)
    assert [key for key in found if key.startswith("confirmed")] == confirmed
    assert "in doubt" in found
    assert len(set(found) & set(acknowledged)) < len(acknowledged)


def test_known_primary_is_used_while_no_sentinel_answers(
    sentinels: SentinelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asking, "_FRESH", 0.0)  # they are asked each time
    with Publisher(sentinels.url) as publisher, Publisher(sentinels.url) as other:
        publisher.publish(EVENT, id="before")
        for sentinel in sentinels.sentinels:
            sentinel.kill()
        publisher.publish(EVENT, id="after")
        with pytest.raises(PublishFailed, match=r"no Sentinel tells .*Connection refused"):
            other.publish(EVENT)
        for sentinel in sentinels.sentinels:
            sentinel.start()
            sentinel.wait_started()
        other.publish(EVENT, id="again")
    assert ids(sentinels.primary())[-3:] == ["before", "after", "again"]


def test_events_of_each_shard_go_to_the_node_that_has_it(cluster: Cluster) -> None:
    with Publisher(cluster.url, shards=16, confirm="all") as publisher:
        for tenant in range(1, 60):
            publisher.publish(EVENT | {"tenant_id": tenant}, id=f"tenant-{tenant}")
        assert publisher.publish(CART) == 0
    owners = set()
    for tenant in range(1, 60):
        stream = stream_name(STREAM, 16, shard_of(tenant, 16))
        owner = cluster.primary(stream)
        assert f"tenant-{tenant}" in ids(owner, stream)
        owners.add(owner)
    assert len(owners) == 3


def test_moved_stream_is_followed_before_during_and_after_its_move(cluster: Cluster) -> None:
    stream = "moving"
    source = cluster.primary(stream)
    target = next(node for node in cluster.primaries() if node is not source)
    slot, here, there = cluster.slot(stream), *(n.ask("CLUSTER", "MYID") for n in (source, target))
    with Publisher(cluster.url, stream=stream) as publisher:
        publisher.publish(EVENT, id="before")
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", here)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there)
        publisher.publish(EVENT, id="begun")  # the key still is where it was
        source.ask(
            "MIGRATE", "127.0.0.1", target.port, stream, 0, 5000, "AUTH", PASSWORD, timeout=6
        )
        publisher.publish(EVENT, id="moved")  # the slot is not: ASK
        for node in (target, source):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", there, timeout=6)
        publisher.publish(EVENT, id="done")  # MOVED
    assert ids(target, stream) == ["before", "begun", "moved", "done"]


def test_new_primary_of_a_slot_is_found(cluster: Cluster) -> None:
    before = cluster.primary(STREAM)
    with Publisher(cluster.url, confirm=1) as publisher:
        publisher.publish(EVENT, id="before")
        cluster.failover(STREAM)
        after = cluster.wait_writable(STREAM, other_than=before)
        publish_until(publisher, "after")
    assert ids(after)[-2:] == ["before", "after"]


async def test_nodes_of_a_cluster_are_reached_over_tls(tmp_path: Path) -> None:
    authority = trustme.CA()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    node = valkey(**{"cluster-enabled": "yes", "cluster-port": free_port()})
    with node as server, redis.Redis(port=server.port) as admin:
        async with tls_in_front_of(server.port, authority.issue_cert("127.0.0.1")) as port:
            admin.config_set("cluster-announce-port", port)
            admin.execute_command("CLUSTER", "ADDSLOTSRANGE", 0, 16383)
            url = f"rediss+cluster://127.0.0.1:{port}?ssl_ca_certs={tmp_path}/ca.pem"
            async with AsyncPublisher(url) as publisher:
                assert await publisher.publish(CART) == 0
            async with AsyncPublisher(url.partition("?")[0]) as publisher:
                with pytest.raises(PublishFailed, match="certificate"):
                    await publisher.publish(CART)
