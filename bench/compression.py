"""Costs and savings of compressing big events. ``python -m bench.compression [clients]``; Linux.

One gateway, one branch. The clients offer permessage-deflate or not, and receive events of one
size, one at a time. CPU is that of the gateway, bytes are those that the clients received.
"""

import sys
from pathlib import Path

import redis
import trio

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.gateways import JWT_SECRET, environment, free_port, process, valkey
from tests.support.sockets import dialled, make_head
from trio_gateway.testing import make_jwt, make_payload

from .refusals import cpu
from .report import line_of
from .runs import Figures

EVENTS = 100
_OFFER = "Sec-WebSocket-Extensions: permessage-deflate"


def _event(size: int) -> bytes:
    """Make an order of about ``size`` bytes, as for a kitchen."""
    items, n = [], 0
    while len(event := make_payload(entity={"items": items})) < size:
        n += 1
        items.append(
            {"id": 7919 * n, "name": f"Plato del día {n % 23}", "qty": n % 4 + 1, "price": 7.5 * n}
        )
    return event


async def main(number: int) -> Figures:
    """Costs by the size of the event: bytes on the wire, and µs of CPU per delivery."""
    found: Figures = {}
    port = free_port()
    quiet = {"stdout": -3, "stderr": -3}  # subprocess.DEVNULL
    settings = {"WS_COMPRESSION": "true", "WS_MAX_CONNECTIONS_PER_USER": str(number)}
    print(f"{number} clients, {EVENTS} events, one at a time")
    with valkey() as server, redis.Redis.from_url(server.connection_url) as backend:
        env = environment(server.connection_url, **settings)
        command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
        async with process(*command, env=env, port=port, **quiet) as gateway:
            for size in (300, 2_000, 8_000, 32_000):
                for offers in (False, True):
                    found |= await _measure(
                        backend, _event(size), offers, number, port, gateway.pid
                    )
    return found


async def _measure(
    backend: "redis.Redis", event: bytes, offers: bool, number: int, port: int, pid: int
) -> Figures:
    received = 0

    async def client(*, task_status: trio.TaskStatus[None]) -> None:
        nonlocal received
        async with dialled(port) as one:
            target = f"/ws/waiter?token={make_jwt(JWT_SECRET)}"
            more = (_OFFER,) if offers else ()
            await one.send(make_head(*more, request=f"GET {target} HTTP/1.1"))
            while not bytes(await one.stream.receive_some(4096)).endswith(b"\r\n\r\n"):
                pass
            task_status.started()
            while data := await one.stream.receive_some(65_536):
                received += len(data)

    async with trio.open_nursery() as nursery:
        for _ in range(number):
            await nursery.start(client)
        await trio.sleep(1)
        before = cpu(pid)
        for n in range(EVENTS):
            backend.publish("channel:branch:1:waiters", event + b" " * n)
            start, seen = received, -1
            while received == start or received != seen:  # until nothing more comes
                seen = received
                await trio.sleep(0.02)
        spent = cpu(pid) - before
        nursery.cancel_scope.cancel()
    how = "compressed" if offers else "plain"
    costs = {
        "bytes": received / (number * EVENTS),
        "µs": spent / number / EVENTS * 1e6,
    }
    about = f"{len(event)} bytes, {how}"
    print(f"{about}: {costs['bytes']:.0f} bytes, {costs['µs']:.1f} µs a delivery", flush=True)
    return {f"{about}: {what}": cost for what, cost in costs.items()}


if __name__ == "__main__":
    print(line_of(trio.run(main, int(sys.argv[1]) if sys.argv[1:] else 200)))
