"""Shard claims: events of a tenant without clients are watched, by one process for each shard."""

import json
from pathlib import Path
from typing import Any

import redis
import trio

from tests.support.gateways import Running, admitted, until
from tests.support.processes import GatewayProcess
from tests.support.receipts import one, publish
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.shards import shard_of, stream_name

SHARDS = 8
TENANTS = range(1, 40)
WITHIN = 0.4  # seconds
ROUTES = f'[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = {WITHIN}\n'


def stream(tenant: int) -> str:
    return stream_name("events:critical", SHARDS, shard_of(tenant, SHARDS))


ALL = {stream(tenant) for tenant in TENANTS}
assert len(ALL) == SHARDS


def gateway(redis_url: str, folder: Path) -> Any:
    return one(
        redis_url, folder, ROUTES, redis_stream_shards=SHARDS, redis_stream_shards_previous=SHARDS
    )


def names(running: Running) -> set[str]:
    return running.app.parts.following.names


def reports(backend: "redis.Redis", tenant: int) -> int:
    entries: Any = backend.xrange(stream(tenant))
    events = [json.loads(fields[b"data"]) for _, fields in entries]
    return [(each["type"], each["tenant_id"]) for each in events].count(("EVENT_UNHEARD", tenant))


async def test_each_shard_is_read_by_a_process_and_by_those_that_have_clients(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with gateway(redis_url, tmp_path) as first:
        await until(lambda: names(first) == ALL)
        async with gateway(redis_url, tmp_path) as second:
            for tenant in TENANTS:
                publish(backend, stream(tenant), tenant_id=tenant)
            async with admitted(second.staff_url("waiter", tenant_id=2)):
                await until(lambda: all(reports(backend, tenant) for tenant in TENANTS))
                assert names(second) == {stream(2)}
            first.stop.set()
            await until(lambda: names(second) == ALL, 3)
            publish(backend, stream(3), tenant_id=3)
            await until(lambda: reports(backend, 3) == 2)
        assert all(reports(backend, tenant) == 1 for tenant in TENANTS if tenant != 3)


async def test_event_is_reported_in_time_though_its_watcher_is_killed_at_its_deadline(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text(ROUTES)
    settings = {
        "WS_ROUTES_FILE": str(tmp_path / "routes.toml"),
        "REDIS_STREAM_SHARDS": str(SHARDS),
        "REDIS_STREAM_SHARDS_PREVIOUS": str(SHARDS),
    }
    killed = GatewayProcess(redis_url, tmp_path, **settings)
    try:
        await killed.start()
        await until(lambda: backend.hlen("{gateway}:watchers") == SHARDS)
        async with gateway(redis_url, tmp_path) as other:
            await trio.sleep(0.5)
            assert names(other) == set()
            publish(backend, stream(3), tenant_id=3)
            await trio.sleep(WITHIN)
            late = Stopwatch()
            killed.kill()
            await until(lambda: reports(backend, 3) == 1)
            assert late.net < 1.0
            assert names(other) == ALL
    finally:
        killed.kill()
