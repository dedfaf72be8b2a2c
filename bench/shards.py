"""How much of all events each process reads, with shards, and clients placed by shard, by tenant,
or by HAProxy with ``deploy/``. ``python -m bench.shards [processes] [shards] [tenants]``.
"""

import math
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from zlib import crc32

import redis
import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from e2e.deploy.proxies import end, haproxy_with_shards
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

from .report import line_of
from .runs import Figures

EVENTS = 40_000
CLIENTS_OF_A_TENANT = 2
HAPROXY = "HAProxy"
_PATH = "/usr/sbin:/usr/bin:/bin:/usr/local/sbin"
_READ = "events_received_total{stream}"


async def main(processes: int, shards: int, tenants: int) -> Figures:
    """The events that the process reads that reads the most, in shares of one process."""
    placements: dict[str, Callable[[int], int] | None] = {
        "shard": lambda tenant: shard_of(tenant, shards) % processes,
        "tenant": lambda tenant: crc32(b"%d" % tenant) % processes,
        HAPROXY: None,
    }
    figures: Figures = {}
    for name, place in placements.items():
        if place is None and shutil.which("haproxy", path=_PATH) is None:
            print("HAProxy is not installed")
            figures[f"most, placed by {name}"] = math.nan
            continue
        with valkey() as server:
            found = await measure(server.port, processes, shards, tenants, place)
        most = figures[f"most, placed by {name}"] = max(found) / EVENTS * processes
        print(
            f"{processes} processes, {shards} shards, {tenants} tenants, placed by {name}: the most"
            f" that one reads is {most:.2f}/{processes} of all, together they read"
            f" {sum(found) / EVENTS:.2f} times all",
            flush=True,
        )
    return figures


async def measure(
    redis_port: int,
    processes: int,
    shards: int,
    tenants: int,
    place: Callable[[int], int] | None,
) -> list[float]:
    """The events that each process has read; without ``place``, HAProxy places the clients."""
    sharding = Sharding(("events:critical",), shards=shards, previous=shards)
    env = environment(
        f"redis://127.0.0.1:{redis_port}", LOG_LEVEL="error", REDIS_STREAM_SHARDS=str(shards),
        REDIS_STREAM_SHARDS_PREVIOUS=str(shards), WS_MAX_TOTAL_CONNECTIONS="10000",
        WS_PROXY_HOPS="1",
    )  # fmt: skip
    ports = [free_port() for _ in range(processes)]
    async with AsyncExitStack() as stack:
        for port in ports:
            command = ("trio_gateway", "serve", "-b", f"127.0.0.1:{port}")
            await stack.enter_async_context(process(*command, env=env, port=port))
        for port in ports:
            await ready(port)
        proxy = free_port()
        if place is None:
            await run_haproxy(stack, proxy, ports, shards)
        for tenant in range(1, tenants + 1):
            for client in range(CLIENTS_OF_A_TENANT):
                user = str(client + 1)
                token = make_jwt(JWT_SECRET, roles=["WAITER"], tenant_id=tenant, sub=user)
                port = proxy if place is None else ports[place(tenant)]
                url = f"ws://127.0.0.1:{port}/ws/waiter?token={token}"
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


async def run_haproxy(stack: AsyncExitStack, port: int, ports: list[int], shards: int) -> None:
    """Start HAProxy with the sample of ``deploy/``, until the stack is closed."""
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
    command = haproxy_with_shards(folder, port, ports)
    config = folder / "haproxy.cfg"
    text = config.read_text().replace("maxconn 500", "maxconn 5000").replace("(64", f"({shards}")
    config.write_text(text)
    running = subprocess.Popen(  # noqa: ASYNC220 - it waits for nothing
        command, stdout=subprocess.DEVNULL, env={"PATH": _PATH}
    )
    stack.callback(end, running)
    await trio.sleep(2)
    await ready(port)


async def ready(port: int) -> None:
    while True:
        try:
            if (await http(port, "/ws/health/ready")).status == 200:
                return
        except OSError:
            pass
        await trio.sleep(0.1)


if __name__ == "__main__":
    numbers = [int(argument) for argument in sys.argv[1:]]
    processes, shards, tenants = numbers + [8, 64, 512][len(numbers) :]
    print(line_of(trio.run(main, processes, shards, tenants)))
