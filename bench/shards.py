"""How much of all events each process reads, with shards and clients placed by shard, by tenant, or
anywhere. ``python bench/shards.py [processes] [shards] [tenants]``.
"""

import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from zlib import crc32

import redis
import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.gateways import (
    JWT_SECRET,
    connect,
    environment,
    free_port,
    http,
    metrics,
    process,
    valkey,
)
from trio_gateway.core.shards import Sharding, shard_of
from trio_gateway.testing import make_jwt

EVENTS = 40_000
CLIENTS_OF_A_TENANT = 2


async def main(processes: int, shards: int, tenants: int) -> None:
    placements: dict[str, Callable[[int], int]] = {
        "by shard": lambda tenant: shard_of(tenant, shards) % processes,
        "by tenant": lambda tenant: crc32(b"%d" % tenant) % processes,
    }
    for name, place in placements.items():
        with valkey() as server:
            found = await measure(server.port, processes, shards, tenants, place)
        most, all_events = max(found), EVENTS
        print(
            f"{processes} processes, {shards} shards, {tenants} tenants, placed {name}: the most"
            f" that one reads is {most / all_events * processes:.2f}/{processes} of all,"
            f" together they read {sum(found) / all_events:.2f} times all"
        )


async def measure(
    redis_port: int, processes: int, shards: int, tenants: int, place: Callable[[int], int]
) -> list[float]:
    """The events that each process has read."""
    sharding = Sharding(("events:critical",), shards=shards, previous=shards)
    env = environment(
        f"redis://127.0.0.1:{redis_port}", LOG_LEVEL="error", REDIS_STREAM_SHARDS=str(shards),
        REDIS_STREAM_SHARDS_PREVIOUS=str(shards), WS_MAX_TOTAL_CONNECTIONS="10000",
    )  # fmt: skip
    ports = [free_port() for _ in range(processes)]
    async with AsyncExitStack() as stack:
        for port in ports:
            command = ("trio_gateway", "serve", "-b", f"127.0.0.1:{port}")
            await stack.enter_async_context(process(*command, env=env, port=port))
        for port in ports:
            while (await http(port, "/ws/health/ready")).status != 200:  # noqa: ASYNC110
                await trio.sleep(0.1)
        for tenant in range(1, tenants + 1):
            for client in range(CLIENTS_OF_A_TENANT):
                claims = {"roles": ["WAITER"], "tenant_id": tenant, "sub": str(client + 1)}
                token = make_jwt(JWT_SECRET, **claims)
                url = f"ws://127.0.0.1:{ports[place(tenant)]}/ws/waiter?token={token}"
                await stack.enter_async_context(connect(url))
        await trio.sleep(1)
        with redis.Redis(port=redis_port) as backend:
            pipeline = backend.pipeline(transaction=False)
            for n in range(EVENTS):
                tenant = n % tenants + 1
                event = b'{"type":"ROUND_READY","tenant_id":%d,"branch_id":1,"n":%d}' % (tenant, n)
                pipeline.xadd(sharding.name_for_new(tenant), {"data": event})
                if n % 1000 == 999:
                    pipeline.execute()
                    await trio.sleep(0.01)
        found: list[float] = []
        while True:
            await trio.sleep(1)
            before, found = found, [(await metrics(port))[_READ] for port in ports]
            if found == before and sum(found) >= EVENTS:
                return found


_READ = "events_received_total{stream}"

if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    trio.run(main, *(numbers + [8, 64, 512][len(numbers) :]))
