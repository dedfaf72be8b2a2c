"""The costs of a client on each transport. ``python -m bench.transports [clients]``; Linux.

The direct transport; ASGI (an upgrade on a connection that had another request before, which
Hypercorn serves); Server-Sent Events. CPU and memory are those of the gateway process.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import redis
import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.gateways import JWT_SECRET, environment, free_port, process, valkey
from tests.support.sockets import Client, client_frame, dialled
from trio_gateway.core.frames import TEXT
from trio_gateway.testing import make_jwt, make_payload

from .refusals import cpu, memory
from .report import line_of
from .runs import Figures

EVENTS = 50
PINGS = 10
TRANSPORTS = ("direct", "asgi", "event stream")


async def _open(client: Client, transport: str) -> None:
    target = f"/ws/waiter?token={make_jwt(JWT_SECRET)}"
    if transport == "event stream":
        path = target.replace("?", "/events?")
        await client.send(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        await client.stream.receive_some(65_536)
        return
    if transport == "asgi":
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        await client.response()
    await client.upgrade(target)


async def main(number: int) -> Figures:
    """Costs by transport, in µs of CPU and in KB."""
    found: Figures = {}
    port = free_port()
    quiet = {"stdout": -3, "stderr": -3}  # subprocess.DEVNULL
    settings = {"WS_MAX_CONNECTIONS_PER_USER": str(number), "WS_MAX_TOTAL_CONNECTIONS": "100000"}
    print(f"{number} clients: CPU of an accept, memory, CPU of a ping and of a delivery")
    for transport in TRANSPORTS:
        with valkey() as server, redis.Redis.from_url(server.connection_url) as backend:
            env = environment(server.connection_url, **settings)
            command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
            async with process(*command, env=env, port=port, **quiet) as gateway:
                costs = await _measure(transport, number, port, gateway.pid, backend)
                found |= {f"{transport}: {what}": cost for what, cost in costs.items()}
    return found


async def _measure(
    transport: str, number: int, port: int, pid: int, backend: "redis.Redis"
) -> Figures:
    clients: list[Client] = []
    received = 0

    async def client(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal received
        async with dialled(port) as one:
            await _open(one, transport)
            clients.append(one)
            task_status.started()
            while data := await one.stream.receive_some(65_536):
                received += len(data)

    async def quiet() -> None:
        seen = -1
        while received != seen:
            seen = received
            await trio.sleep(0.05)

    async def cost(do: Callable[[], object], times: int) -> float:
        """Return the CPU of each, in µs."""
        before = cpu(pid)
        await do()  # type: ignore[misc]
        await quiet()
        return (cpu(pid) - before) / times * 1e6

    async with trio.open_nursery() as nursery:

        async def accept() -> None:
            for _ in range(number):
                await nursery.start(client)

        async def ping() -> None:
            for _ in range(PINGS):
                for each in clients:
                    await each.send(client_frame(TEXT, b"ping"))
                await quiet()

        async def publish() -> None:
            for n in range(EVENTS):
                backend.publish("channel:branch:1:waiters", make_payload(n=n, data="x" * 200))
                await trio.sleep(0.02)
                await quiet()

        before = memory(pid)
        accepted = await cost(accept, number)
        await trio.sleep(1)
        held = (memory(pid) - before) / number / 1024
        pinged = 0.0 if transport == "event stream" else await cost(ping, number * PINGS)
        delivered = await cost(publish, number * EVENTS)
        nursery.cancel_scope.cancel()
    costs = {"accept µs": accepted, "KB": held, "ping µs": pinged, "delivery µs": delivered}
    if transport == "event stream":
        del costs["ping µs"]
    print(
        f"{transport:12}",
        ", ".join(f"{what} {cost:.1f}" for what, cost in costs.items()),
        flush=True,
    )
    return costs


if __name__ == "__main__":
    print(line_of(trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 400)))
