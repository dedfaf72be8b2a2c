"""Events that nobody confirms, on several processes, while those and Redis fail."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from tests.support.gateways import Reachable, admitted, http, receive_event, until, valkey
from tests.support.processes import GatewayProcess

pytestmark = pytest.mark.chaos

EVENT = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1, "sector_id": 5}
ROUTES = """
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = 4
then = [{to = "floor", within = 4}, {to = "admins", within = 4}]
"""
STEPS = ["waiters", "floor", "admins"]


class Service:
    """Gateway processes on one Redis."""

    def __init__(self, processes: list[GatewayProcess], client: "redis.Redis", server: Any) -> None:
        self.processes = processes
        self.redis = client
        self.server = server

    def url(self, number: int, **claims: Any) -> str:
        return Reachable(self.processes[number].port).staff_url("waiter", **claims)

    def publish(self, **keys: Any) -> str:
        entry: Any = self.redis.xadd("events:critical", {"data": json.dumps(EVENT | keys)})
        return str(entry.decode())

    def reports(self) -> list[tuple[str, str, float]]:
        """The reports in the stream: of which entry and audience, and when (unix ms)."""
        found = []
        entries: Any = self.redis.xrange("events:critical")
        for entry_id, fields in entries:
            event = json.loads(fields[b"data"])
            if event["type"] == "EVENT_UNHEARD":
                entity = event["entity"]
                original = entity["event_id"].rpartition("-")[0]
                found.append((original, entity["to"], float(entry_id.split(b"-")[0])))
        return found


@asynccontextmanager
async def service(folder: Path, count: int) -> AsyncIterator[Service]:
    routes = folder / "routes.toml"
    routes.write_text(ROUTES)
    with valkey() as server, redis.Redis.from_url(server.connection_url) as client:
        processes = [
            GatewayProcess(server.connection_url, folder, WS_ROUTES_FILE=str(routes))
            for _ in range(count)
        ]
        try:
            for each in processes:
                await each.start()

            async def ready() -> bool:
                found = [await http(each.port, "/ws/health/ready") for each in processes]
                return all(reply.status == 200 for reply in found)

            await until(ready, 30)
            yield Service(processes, client, server)
        finally:
            for each in processes:
                each.kill()


def check_in_time(service: Service, entries: list[str], most: float = 1.0) -> None:
    """Each step of each event was reported once, within a second of its time."""
    reports = service.reports()
    for entry in entries:
        mine = [(to, at) for original, to, at in reports if original == entry]
        assert [to for to, _ in mine] == STEPS
        begun = float(entry.split("-")[0])
        for _, at in mine:
            late = (at - begun) / 1000 - 4
            assert 0 <= late <= most, f"{late} s late"
            begun = at


@pytest.mark.parametrize("count", [1, 4])
async def test_each_step_of_an_event_is_reported_once_and_in_time(
    tmp_path: Path, count: int
) -> None:
    async with service(tmp_path, count) as found:
        entries = []
        async with admitted(found.url(count - 1, sector_ids=[5])):  # reads, and confirms nothing
            for _ in range(20):
                entries.append(found.publish())
                await trio.sleep(0.1)
            await until(lambda: len(found.reports()) >= 60, 30)
            await trio.sleep(2)
        assert len(found.reports()) == 60
        check_in_time(found, entries)


async def test_steps_are_taken_once_while_the_processes_that_watch_are_killed(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, 4) as found:
        entries = [found.publish() for _ in range(20)]
        for each in found.processes[:3]:  # one before each step is over
            await trio.sleep(3.5)
            each.kill()
        await until(lambda: len(found.reports()) >= 60, 30)
        await trio.sleep(2)
        assert len(found.reports()) == 60
        check_in_time(found, entries)


async def test_processes_that_were_all_away_report_when_they_are_back(tmp_path: Path) -> None:
    async with service(tmp_path, 2) as found:
        entry = found.publish()
        for each in found.processes:
            each.kill()
        await trio.sleep(5)
        for each in found.processes:
            await each.start()
        await until(lambda: len(found.reports()) >= 3, 40)
        await trio.sleep(2)
        assert [(original, to) for original, to, _ in found.reports()] == [
            (entry, to) for to in STEPS
        ]


async def test_confirmation_in_the_last_moment_on_another_process_counts(tmp_path: Path) -> None:
    races = 100
    async with service(tmp_path, 4) as found:
        async with admitted(found.url(3, sector_ids=[5], sub="77")) as waiter:
            begun: dict[str, float] = {}

            async def confirm(event_id: str) -> None:
                at = int(event_id.split("-")[0]) / 1000 + 4 - 0.01
                seconds, microseconds = found.redis.time()
                await trio.sleep(max(0.0, at - seconds - microseconds / 1e6))
                await waiter.send_message(json.dumps({"type": "ack", "last_event_id": event_id}))

            async with trio.open_nursery() as nursery:
                for n in range(races):
                    entry = found.publish(n=n)
                    begun[entry] = trio.current_time()
                    event = await receive_event(waiter, 5)
                    nursery.start_soon(confirm, event["event_id"])
                    await trio.sleep(0.06)
            await trio.sleep(3)
        assert found.reports() == []


async def test_deadlines_that_pass_while_redis_is_away_are_reported_afterwards(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, 2) as found:
        entry = found.publish()
        await trio.sleep(2)
        with found.server.frozen():
            await trio.sleep(6)
        await until(lambda: len(found.reports()) >= 3, 40)
        await trio.sleep(2)
        assert [(original, to) for original, to, _ in found.reports()] == [
            (entry, to) for to in STEPS
        ]
