"""Placement: reports of tenants, and clients that are sent to another process."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import structlog
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.access.placement import CLOSES_PER_SECOND, Placement
from trio_gateway.broker.commands import Unavailable
from trio_gateway.core.close_codes import Close, parse_retry_hint
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_principal

FOR_EVER = ConnectionLimits(stale_after=float("inf"), receive_timeout=float("inf"))
REPORT = "channel:gateway:placement:0a1b"


class Commands:
    def __init__(self) -> None:
        self.published: list[tuple[str, bytes]] = []
        self.up = True

    async def publish(self, channel: str, payload: bytes) -> None:
        await trio.lowlevel.checkpoint()
        if not self.up:
            raise Unavailable("down")
        self.published.append((channel, payload))


class Process:
    """A hub with clients, and its placement."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.hub = Hub()
        self.commands = Commands()
        self.placement = Placement(self.hub, self.commands)  # type: ignore[arg-type]
        self._nursery = nursery

    async def join(self, tenant: int, count: int = 1) -> list[FakeSocket]:
        sockets = [FakeSocket() for _ in range(count)]
        for user, socket in enumerate(sockets, 1 + self.hub.last_number):
            client = Connection(make_principal(tenant=tenant, user=user), FOR_EVER)
            self._nursery.start_soon(client.run, socket, self.hub)
        await wait_all_tasks_blocked()
        return sockets

    def ask(self, **request: object) -> None:
        self.placement.receive(json.dumps(request).encode())


@asynccontextmanager
async def opened() -> AsyncIterator[Process]:
    async with trio.open_nursery() as nursery:
        process = Process(nursery)
        nursery.start_soon(process.placement.run)
        yield process
        nursery.cancel_scope.cancel()


async def test_it_reports_how_many_clients_each_tenant_has_here(autojump_clock: MockClock) -> None:
    async with opened() as process:
        await process.join(1, 3)
        await process.join(7)
        process.ask(report_to=REPORT)
        await wait_all_tasks_blocked()
        ((channel, payload),) = process.commands.published
        assert channel == REPORT
        report = {"process": process.placement.process, "tenants": {"1": 3, "7": 1}}
        assert json.loads(payload) == report


async def test_clients_of_tenants_that_belong_elsewhere_are_sent_away_at_a_bounded_rate(
    autojump_clock: MockClock,
) -> None:
    async with opened() as process:
        moving, mine = await process.join(1, 250), await process.join(2, 5)
        others = await process.join(3, 5)
        began = trio.current_time()
        process.ask(places={"1": "another", "2": process.placement.process})
        closed_at = []
        while len(process.hub) > 10:
            await trio.sleep(0.01)
            closed_at.append(sum(socket.closed is not None for socket in moving))
        took = trio.current_time() - began
        assert took >= 250 / CLOSES_PER_SECOND - 0.2
        steps = [b - a for a, b in zip([0, *closed_at], closed_at, strict=False)]
        assert max(steps) <= 10
        assert all(socket.closed is Close.GOING_AWAY for socket in moving)
        assert all((parse_retry_hint(socket.reason) or 0) <= 1 for socket in moving)
        assert len({socket.reason for socket in moving}) > 5
        assert all(socket.closed is None for socket in [*mine, *others])


async def test_a_client_that_comes_after_the_request_stays(autojump_clock: MockClock) -> None:
    async with opened() as process:
        await process.join(1, 30)
        process.ask(places={"1": "another"})
        (late,) = await process.join(1)
        await trio.sleep(10)
        assert len(process.hub) == 1
        assert late.closed is None


@pytest.mark.parametrize(
    "payload",
    [
        b"nonsense",
        b"[]",
        b"\xff",
        b'{"report_to":"channel:branch:1:waiters"}',
        b'{"report_to":"channel:gateway:placement:1\\n"}',
        b'{"places":{"one":"x"}}',
        b'{"places":[1]}',
        b'{"x":' + b"[" * 100_000,
    ],
)
async def test_an_invalid_request_is_logged_and_changes_nothing(
    autojump_clock: MockClock, payload: bytes
) -> None:
    async with opened() as process:
        await process.join(1, 3)
        with structlog.testing.capture_logs() as logs:
            process.placement.receive(payload)
        await trio.sleep(1)
        assert [line["event"] for line in logs] == ["placement request is invalid"]
        assert not process.commands.published
        assert len(process.hub) == 3


async def test_requests_for_reports_are_bounded_and_survive_redis(
    autojump_clock: MockClock,
) -> None:
    async with opened() as process:
        process.commands.up = False
        for _ in range(1000):
            process.ask(report_to=REPORT)
        await trio.sleep(1)
        process.commands.up = True
        process.ask(report_to=REPORT)
        await trio.sleep(1)
        assert len(process.commands.published) == 1
