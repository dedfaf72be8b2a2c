"""Sentinel: the primary since the last failover is found, whichever Sentinels answer."""

from typing import Any

import pytest
import trio

from tests.support.failovers import fails_over
from tests.support.gateways import open_commands
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.asking import ANSWER_TIMEOUT, GRACE
from trio_gateway.broker.commands import TIMEOUT, Unavailable
from trio_gateway.broker.sentinel import sentinel_topology
from trio_gateway.core.resilience import Breaker
from trio_gateway.redis_sets import Node, SentinelSet, sentinel_set
from trio_gateway.redis_url import RedisUrl
from trio_gateway.runtime.supervision import ConnectionLost


@pytest.mark.chaos
async def test_primary_is_found_after_a_failover(sentinels: SentinelSet) -> None:
    url = RedisUrl.from_url(sentinels.url)
    topology = sentinel_topology(url)
    before = await topology.primary()
    assert before == url.node("127.0.0.1", sentinels.primary().port)
    sentinels.failover()
    with trio.fail_after(20):
        while (after := await topology.primary()) == before:
            topology.suspect(before)
    old = sentinels.node_at(before.port)
    new = await trio.to_thread.run_sync(lambda: sentinels.wait_writable(other_than=old))
    assert after == url.node("127.0.0.1", new.port)


async def test_frozen_sentinel_delays_the_answer_little(sentinels: SentinelSet) -> None:
    topology = sentinel_topology(RedisUrl.from_url(sentinels.url))
    frozen, primary = sentinels.sentinels[0], sentinels.primary()
    frozen.freeze()
    try:
        watch = Stopwatch()
        assert (await topology.primary()).port == primary.port
        assert watch.net < GRACE + 0.5
    finally:
        frozen.thaw()


async def test_problem_of_the_sentinels_is_told(sentinels: SentinelSet) -> None:
    wrong_name = sentinels.url.replace("/mymaster", "/other")
    with pytest.raises(ConnectionLost, match="no primary with the name other"):
        await sentinel_topology(RedisUrl.from_url(wrong_name)).primary()
    no_sentinels = f"redis+sentinel://127.0.0.1:{sentinels.primary().port}/m"
    with pytest.raises(ConnectionLost, match="SENTINEL failed: ERR"):
        await sentinel_topology(RedisUrl.from_url(no_sentinels)).primary()
    watch = Stopwatch()
    nobody = RedisUrl.from_url("redis+sentinel://127.0.0.1:1,127.0.0.1:2/m")
    with pytest.raises(ConnectionLost, match="Connection refused"):
        await sentinel_topology(nobody).primary()
    assert watch.net < ANSWER_TIMEOUT


@pytest.mark.parametrize("own", [None, "s"])
async def test_credentials_of_the_nodes_are_tried_with_the_sentinels(own: str | None) -> None:
    with sentinel_set(replicas=0, sentinels=1, password="p", sentinel_password=own) as found:
        topology = sentinel_topology(RedisUrl.from_url(found.url))
        assert (await topology.primary()).password == "p"


@pytest.mark.parametrize(
    "url", ["redis+sentinel://127.0.0.1:1,127.0.0.1:2/m", "redis+cluster://127.0.0.1:1"]
)
async def test_commands_without_a_primary_say_so_without_an_address(url: str) -> None:
    async with open_commands(url, Breaker(5, 30), Breaker(5, 30), max_connections=5) as commands:
        watch = Stopwatch()
        for run in (commands.check(2), commands.mget(["k"]), commands.publish("c", b"")):
            with pytest.raises(Unavailable, match=r"^primary unknown$"):
                await run
        assert watch.net < 3 * TIMEOUT


@pytest.mark.chaos
@pytest.mark.parametrize("lose", [Node.freeze, Node.kill])
async def test_commands_work_again_soon_after_the_primary_was_lost(lose: Any) -> None:
    with sentinel_set() as found:
        await fails_over(found, "k", lose)


@pytest.mark.chaos
async def test_commands_work_again_soon_after_a_planned_failover() -> None:
    with sentinel_set() as found:
        await fails_over(found, "k", lambda old: found.failover())
