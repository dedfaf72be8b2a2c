"""``trio-gateway rebalance``, with the sample for HAProxy: clients follow their tenant."""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.gateways import JWT_SECRET, http, until
from trio_gateway.client import Gap, connect
from trio_gateway.testing import make_jwt

from .proxies import Behind, behind, require

pytestmark = pytest.mark.deploy
TENANTS, USERS = range(1, 41), 2


@dataclass
class Listening:
    """A client, and the events that it has received."""

    tenant: int
    numbers: list[int] = field(default_factory=list)
    gaps: int = 0


@asynccontextmanager
async def listening(at: Behind) -> AsyncIterator[list[Listening]]:
    """Some clients of each tenant; our own client reconnects and resumes by itself."""
    found = [Listening(tenant) for tenant in TENANTS for _ in range(USERS)]

    async def listen(one: Listening, user: int, task_status: trio.TaskStatus[None]) -> None:
        token = make_jwt(JWT_SECRET, sub=str(user), tenant_id=one.tenant)

        def count(_gap: Gap) -> None:
            one.gaps += 1

        url = f"ws://127.0.0.1:{at.port}/ws/waiter"
        async with connect(url, token, on_gap=count) as client:
            await client.wait_open()
            task_status.started()
            async for event in client:
                one.numbers.append(event.data["n"])

    async with trio.open_nursery() as nursery:
        for user, one in enumerate(found, 1):
            await nursery.start(listen, one, user)
        yield found
        nursery.cancel_scope.cancel()


async def publish(at: Behind, numbers: range) -> None:
    """An event for each tenant, again and again."""
    for number in numbers:
        for tenant in TENANTS:
            event = {"type": "ROUND_READY", "tenant_id": tenant, "branch_id": 1, "n": number}
            at.backend.xadd("events:critical", {"data": json.dumps(event)})
        await trio.sleep(0.05)


async def rebalance(at: Behind, *options: str, url: str | None = None) -> Any:
    """The command's report; its error as a text."""
    url = url or f"http://127.0.0.1:{at.port}"
    command = [sys.executable, "-m", "trio_gateway", "rebalance", "--url", url, "--json", *options]
    done = await trio.run_process(
        command, env=at.env, capture_stdout=True, capture_stderr=True, check=False
    )
    return json.loads(done.stdout) if done.returncode == 0 else done.stderr.decode()


async def up(at: Behind, number: int) -> None:
    """Wait until the proxy sends clients there."""
    own = (await http(at.ports[number], "/ws/placement")).json["process"]

    async def reached() -> bool:
        targets = [f"/ws/placement?ticket={tenant}." for tenant in range(1, 40)]
        return any([(await http(at.port, target)).json["process"] == own for target in targets])

    await until(reached, 15)


async def test_clients_move_to_a_gateway_that_was_added_and_lose_nothing(
    redis_url: str, tmp_path: Path
) -> None:
    require("haproxy")
    async with behind("haproxy", redis_url, tmp_path, count=3) as at:
        at.gateways[2].terminate()
        at.gateways[2].wait(10)
        async with listening(at) as clients:
            before = await at.connections()
            assert before[2] == -1
            assert sum(before) + 1 == len(clients)
            await at.start(2)
            await up(at, 2)
            assert (await at.connections())[2] == 0

            async with trio.open_nursery() as nursery:
                nursery.start_soon(publish, at, range(100))
                await trio.sleep(0.5)
                planned = await rebalance(at, "--dry-run")
                assert planned["dry_run"]
                assert planned["clients_moving"] > 0
                assert (await at.connections())[2] == 0
                done = await rebalance(at)
                moving = done["clients_moving"]
                assert moving >= USERS
                # Not all of them, because no gateway gets more than 1.5 times the average.
                coming = max(each["coming"] for each in done["processes"])
                await until(lambda: has(at, 2, coming // 2), 10)

            await until(lambda: all(len(each.numbers) >= 100 for each in clients), 10)
            assert all(each.numbers == list(range(100)) for each in clients)
            assert not any(each.gaps for each in clients)
            await until(lambda: all_connected(at, len(clients)), 10)
            closed = [await at.closed(number, 1001) for number in range(3)]
            assert sum(closed) == moving  # and nobody else
            assert (await rebalance(at))["clients_moving"] <= moving // 2


async def all_connected(at: Behind, clients: int) -> bool:
    return sum(await at.connections()) == clients


async def has(at: Behind, number: int, clients: int) -> bool:
    return (await at.connections())[number] >= clients


async def test_a_proxy_that_does_not_place_is_refused_and_nobody_is_sent_away(
    redis_url: str, tmp_path: Path
) -> None:
    require("nginx")
    async with behind("nginx", redis_url, tmp_path) as at, listening(at) as clients:
        said = await rebalance(at)
        assert "does not choose the process by the tenant" in said
        for url, problem in [
            ("http://127.0.0.1:1", "can't ask 127.0.0.1:1: Connection refused"),
            (f"http://127.0.0.1:{at.port}/elsewhere", "with HTTP 40"),
        ]:
            assert problem in await rebalance(at, url=url)
        assert sum(await at.connections()) == len(clients)
        assert [await at.closed(number, 1001) for number in range(2)] == [0, 0]
