"""A process whose clients say nothing sleeps."""

import pytest
import trio
from websockets.trio.client import connect

from bench.processes import Server
from tests.support.gateways import JWT_SECRET, environment, free_port, http, process, until
from trio_gateway.testing import make_jwt

SECONDS = 1.5
# Wake-ups a second. Liveness of the two links to Redis and the reaper need three; a look ten times
# a second at what another process may have set would be ten more.
MOST = 10.0


@pytest.mark.parametrize(
    ("command", "processes"),
    [
        pytest.param(("trio_gateway", "serve"), 1, marks=pytest.mark.chaos),
        (("trio_gateway", "serve", "-w", "2"), 2),
        (("hypercorn", "-k", "trio", "-w", "1", "trio_gateway.app:app"), 1),
    ],
    ids=["serve", "two workers", "stock with a worker"],
)
async def test_an_idle_process_wakes_only_for_a_reason(
    redis_url: str, command: tuple[str, ...], processes: int
) -> None:
    port = free_port()
    words = (*command, "-b", f"127.0.0.1:{port}")
    async with process(*words, env=environment(redis_url)) as started:

        async def ready() -> bool:
            try:
                return (await http(port, "/ws/health/ready")).status == 200
            except (OSError, trio.BrokenResourceError, trio.TooSlowError):
                return False

        await until(ready, 30)
        server = Server(started, port, log=None)  # type: ignore[arg-type]
        token = make_jwt(JWT_SECRET, sub="1")
        async with connect(f"ws://127.0.0.1:{port}/ws/waiter?token={token}"):
            await trio.sleep(0.5)  # what a first client causes
            _, before = server.scheduled()
            await trio.sleep(SECONDS)
            _, after = server.scheduled()

    assert (after - before) / SECONDS <= MOST * processes
