"""The cost of refusing clients with a bad token. ``python bench/refusals.py [clients]``; Linux.

It measures the CPU of the gateway process per refused client, and the ping time of another client.
"""

import os
import sys
import time
from pathlib import Path

import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.gateways import JWT_SECRET, admitted, environment, free_port, process, valkey
from tests.support.sockets import client_frame, dialled
from trio_gateway.core.frames import CLOSE
from trio_gateway.testing import make_jwt

_AT_A_TIME = 100


def cpu(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> int:
    """Bytes."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def main(number: int) -> None:
    port, token = free_port(), make_jwt(JWT_SECRET)
    start, _, signature = token.rpartition(".")
    quiet = {"stdout": -3, "stderr": -3}  # subprocess.DEVNULL
    with valkey() as redis:
        env = environment(redis.connection_url)
        command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
        async with process(*command, env=env, port=port, **quiet) as gateway:
            for what, made in {
                "bad signature": lambda n: f"{start}.{signature[:-6]}{n:06}",
                "no token at all": lambda n: f"x{n}",
                "good token": lambda n: make_jwt(JWT_SECRET, sub=str(n)),
            }.items():
                await _measure(what, [made(n) for n in range(number)], port, gateway.pid)


async def _measure(what: str, tokens: list[str], port: int, pid: int) -> None:
    limit, slowest = trio.CapacityLimiter(_AT_A_TIME), 0.0

    async def one(token: str) -> None:
        async with limit, dialled(port) as client:
            await client.upgrade(f"/ws/waiter?token={token}")
            if what == "good token":
                await client.send(client_frame(CLOSE, b"\x03\xe8"))
            await client.closed()

    async def bystander() -> None:
        nonlocal slowest
        url = f"ws://127.0.0.1:{port}/ws/waiter?token={make_jwt(JWT_SECRET, sub='1000000')}"
        async with admitted(url) as client:
            while True:
                started = time.perf_counter()
                await client.send_message("ping")
                await client.get_message()
                slowest = max(slowest, time.perf_counter() - started)
                await trio.sleep(0.06)

    async with trio.open_nursery() as watching:
        watching.start_soon(bystander)
        await trio.sleep(0.3)
        before, started = cpu(pid), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for token in tokens:
                nursery.start_soon(one, token)
        seconds, spent = time.perf_counter() - started, cpu(pid) - before
        watching.cancel_scope.cancel()
    each = spent / len(tokens) * 1e6
    print(
        f"{what:16} {len(tokens) / seconds:6.0f} a second, {each:4.0f} µs of CPU each,"
        f" slowest ping of another client {slowest * 1000:.0f} ms"
    )


if __name__ == "__main__":
    trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 5000)
