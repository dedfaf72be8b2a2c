"""Many processes, one service: what is true while they, and their Redis, are killed."""

import pytest
import trio

from tests.real.test_control import alive, cluster_of
from tests.real.test_control_faults import works
from tests.support.gateways import serving, until
from trio_gateway.redis_sets import Cluster, RedisSet, SentinelSet

pytestmark = pytest.mark.chaos


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
async def test_orders_survive_a_failover(kind: str, request: pytest.FixtureRequest) -> None:
    servers: SentinelSet | Cluster = request.getfixturevalue(kind)
    await survives_a_failover(servers)


async def survives_a_failover(servers: RedisSet) -> None:
    await trio.to_thread.run_sync(servers.wait_healthy)
    async with (
        serving(servers.url, "direct", ws_cluster=True) as one,
        serving(servers.url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        assert await works(one, other)
        key = cluster_of(one).keys.nodes
        old = servers.primary(key)
        old.kill()
        await trio.to_thread.run_sync(lambda: servers.wait_writable(key, other_than=old))
        await until(lambda: works(one, other), 10)
        await trio.to_thread.run_sync(servers.rejoin, old)
