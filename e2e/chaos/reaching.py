"""Gateway processes whose events must reach somebody, and what they report."""

import json
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
import trio

from tests.support.gateways import Reachable, http, until, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

STREAM: Final = "events:critical"
EVENT: Final = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1, "sector_id": 5}
WITHIN: Final = 2.0  # seconds of each step
STEPS: Final = ["waiters", "floor", "admins"]
LATE: Final = 1.0  # seconds that a report may be late: the contract
ROUTES: Final = f"""
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = {WITHIN:g}
then = [{{to = "floor", within = {WITHIN:g}}}, {{to = "admins", within = {WITHIN:g}}}]
"""


class Report(dict[str, Any]):
    """The entity of an EVENT_UNHEARD, with the entry of its event and its own time (unix ms)."""


class Service:
    """Gateway processes on one Redis. ``ask`` sends a command to the primary of a key."""

    def __init__(self, processes: list[GatewayProcess], ask: Callable[..., Any]) -> None:
        self.processes = processes
        self.server: RedisServer | None = None  # if there is only one
        self.ask = ask

    def url(self, number: int, **claims: Any) -> str:
        return Reachable(self.processes[number].port).staff_url("waiter", **claims)

    def publish(self, stream: str = STREAM, **keys: Any) -> str:
        """Publish a service call; returns its entry."""
        found: str = self.ask("XADD", stream, "*", "data", json.dumps(EVENT | keys))
        return found

    def clock(self) -> float:
        """The time of Redis."""
        seconds, microseconds = self.ask("TIME")
        return int(seconds) + int(microseconds) / 1e6

    def reports(self, stream: str = STREAM) -> list[Report]:
        """All reports in a stream."""
        found = []
        for entry, fields in self.ask("XRANGE", stream, "-", "+"):
            event = json.loads(fields["data"])
            if event["type"] == "EVENT_UNHEARD":
                original = event["entity"]["event_id"].rpartition("-")[0]
                own = {"of": original, "at": float(entry.split("-")[0])}
                found.append(Report(event["entity"] | own))
        return found

    def reports_of(self, entry: str, stream: str = STREAM) -> list[Report]:
        return [report for report in self.reports(stream) if report["of"] == entry]

    async def wait_reports(self, number: int, seconds: float = 30, stream: str = STREAM) -> None:
        """Wait for so many reports, and then for any that should not be there."""
        await until(lambda: len(self.reports(stream)) >= number, seconds)
        await trio.sleep(WITHIN)
        found = Counter((report["of"], report["to"]) for report in self.reports(stream))
        assert found.total() == number, found

    def check_in_time(self, entries: list[str], stream: str = STREAM) -> float:
        """Check that each step of each event was reported once and in time; return the latest."""
        latest = 0.0
        for entry in entries:
            reports = self.reports_of(entry, stream)
            assert [report["to"] for report in reports] == STEPS
            begun = float(entry.split("-")[0])
            for report in reports:
                late = (report["at"] - begun) / 1000 - WITHIN
                assert 0 <= late <= LATE, f"{late} s late"
                latest = max(latest, late)
                begun = report["at"]
        return latest


@asynccontextmanager
async def serving_on(
    url: str, ask: Callable[..., Any], folder: Path, count: int, text: str = ROUTES, **settings: str
) -> AsyncIterator[Service]:
    """So many gateway processes on the Redis at this URL; ``text`` is the routes file."""
    routes = folder / "routes.toml"
    routes.write_text(text)
    processes = [
        GatewayProcess(url, folder, WS_ROUTES_FILE=str(routes), **settings) for _ in range(count)
    ]
    try:
        async with trio.open_nursery() as nursery:
            for each in processes:
                nursery.start_soon(each.start)
        for each in processes:
            await until(partial(_is_ready, each), 30)
        yield Service(processes, ask)
    finally:
        for each in processes:
            each.kill()


async def _is_ready(process: GatewayProcess) -> bool:
    return (await http(process.port, "/ws/health/ready")).status == 200


@asynccontextmanager
async def service(
    folder: Path, count: int, text: str = ROUTES, **settings: str
) -> AsyncIterator[Service]:
    """So many gateway processes on a Redis of their own, which keeps its data when it is killed."""
    with (
        valkey(appendonly="yes") as server,
        redis.Redis.from_url(server.connection_url, decode_responses=True) as client,
    ):
        async with serving_on(
            server.connection_url, client.execute_command, folder, count, text, **settings
        ) as found:
            found.server = server
            yield found
