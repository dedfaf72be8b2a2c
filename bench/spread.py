"""How evenly clients spread over workers. ``python bench/spread.py [clients] [workers…]``."""

import sys
from pathlib import Path
from statistics import median

import psutil
import trio
import trio.testing

sys.path.insert(0, str(Path(__file__).parent.parent))

from tests.support.gateways import JWT_SECRET, environment, free_port, process, valkey
from tests.support.sockets import dialled
from trio_gateway.testing import make_jwt


async def main(clients: int, workers: list[int]) -> None:
    with valkey() as redis:
        env = environment(redis.connection_url, LOG_LEVEL="error")
        for count in workers:
            for rate in (0, 200):
                port = free_port()
                command = ("trio_gateway", "serve", "-b", f"127.0.0.1:{port}", "-w", str(count))
                async with process(*command, env=env, port=port) as supervisor:
                    await _measure(psutil.Process(supervisor.pid), clients, count, port, rate)


async def _measure(
    supervisor: psutil.Process, clients: int, workers: int, port: int, rate: int
) -> None:
    def held() -> list[int]:
        """The clients of each worker."""
        found = [each.net_connections() for each in supervisor.children()]
        return sorted(
            sum(each.status == "ESTABLISHED" and each.laddr.port == port for each in connections)
            for connections in found
        )

    while len(held()) < workers:  # noqa: ASYNC110
        await trio.sleep(0.1)
    await trio.sleep(2)  # until they serve
    took: list[float] = []
    start = trio.Event()

    async def one(number: int) -> None:
        token = make_jwt(JWT_SECRET, sub=str(number))
        await start.wait()
        await trio.sleep(number / rate if rate else 0)
        began = trio.current_time()
        async with dialled(port) as client:
            await client.upgrade(f"/ws/waiter?token={token}")
            took.append(trio.current_time() - began)
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for number in range(clients):
            nursery.start_soon(one, number)
        await trio.testing.wait_all_tasks_blocked()
        start.set()
        while len(took) < clients:  # noqa: ASYNC110
            await trio.sleep(0.05)
        how = f"{rate}/s" if rate else "at once"
        print(
            f"{clients} clients {how}, {workers} workers: {held()},"
            f" upgrade {median(took) * 1000:.0f} ms, at most {max(took) * 1000:.0f} ms"
        )
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    numbers = [int(each) for each in sys.argv[1:]]
    trio.run(main, numbers[0] if numbers else 400, numbers[1:] or [2, 4])
