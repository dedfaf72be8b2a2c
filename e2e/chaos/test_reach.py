"""Events that nobody confirms, on several processes, while those, their clients and Redis fail."""

import json
import os
import random
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import redis
import trio

from tests.support.gateways import admitted, http, receive_event, until
from tests.support.processes import GatewayProcess
from tests.support.sockets import Client, dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.shards import shard_of, stream_name
from trio_gateway.redis_sets import NotRunning, RedisSet, cluster_set, sentinel_set
from trio_gateway.runtime.reach import GRACE

from .reaching import LATE, ROUTES, STEPS, STREAM, WITHIN, Service, service, serving_on

pytestmark = pytest.mark.chaos


@asynccontextmanager
async def tablet(found: Service, number: int, branch: int) -> AsyncIterator[Client]:
    """A waiter of a branch, on a bare socket: it reads only when it is told to."""
    url = found.url(number, sub=str(branch), branch_ids=[branch], sector_ids=[5])
    async with dialled(found.processes[number].port, receive_buffer=4096) as client:
        await client.upgrade("/" + url.split("/", 3)[3])
        await client.say("ping")
        assert await client.text() == '{"type":"pong"}'
        yield client


async def dies_at_its_first_event(client: Client) -> None:
    await client.text()
    await client.reset()


@pytest.mark.parametrize("count", [1, 4])
async def test_each_step_is_reported_once_and_in_time_whatever_clients_do(
    tmp_path: Path, count: int
) -> None:
    """In a branch each: nobody, one that is frozen, one that never confirms, one that dies."""
    nobody, frozen, silent, dying = range(1, 5)
    async with (
        service(tmp_path, count) as found,
        tablet(found, 0, frozen),
        tablet(found, count - 1, silent) as reads,
        tablet(found, count // 2, dying) as dies,
        trio.open_nursery() as nursery,
    ):
        nursery.start_soon(reads.rest)
        nursery.start_soon(dies_at_its_first_event, dies)
        entries: dict[int, list[str]] = {}
        for n in range(20):
            for branch in (nobody, frozen, silent, dying):
                padding = "x" * 3000 if branch == frozen else ""
                entry = found.publish(branch_id=branch, n=n, padding=padding)
                entries.setdefault(branch, []).append(entry)
            await trio.sleep(0.1)
        await found.wait_reports(80 * len(STEPS))
        latest = found.check_in_time([each for group in entries.values() for each in group])
        written = {
            branch: [found.reports_of(each)[0]["written"] for each in group]
            for branch, group in entries.items()
        }
        assert written[nobody] == [0] * 20
        assert written[silent] == [1] * 20
        assert written[dying][0] == 1
        assert sum(written[dying]) <= 2
        assert 0 < sum(written[frozen]) < 20  # its kernel took the first ones
        print(f"{count} processes: at most {latest:.2f} s late")
        nursery.cancel_scope.cancel()


async def test_steps_are_taken_once_while_the_processes_that_watch_are_killed(
    tmp_path: Path,
) -> None:
    async with service(tmp_path, 4) as found:
        entries = []
        for each in found.processes[:3]:  # at some moment of each step
            entries += [found.publish(n=n) for n in range(20)]
            await trio.sleep(random.uniform(0.5, 1.5) * WITHIN)
            each.kill()
        await found.wait_reports(60 * len(STEPS))
        found.check_in_time(entries)


class Sharded(NamedTuple):
    """Processes without clients, and the tenant of each shard's stream."""

    service: Service
    streams: dict[str, int]

    def publish(self) -> dict[str, str]:
        """Publish an event to each stream; returns their entries."""
        return {
            stream: self.service.publish(stream, tenant_id=tenant)
            for stream, tenant in self.streams.items()
        }

    async def wait_reports(self, entries: dict[str, str], number: int) -> None:
        """Wait for so many reports of each event."""

        def are_there() -> bool:
            found = (self.service.reports_of(each, stream) for stream, each in entries.items())
            return all(len(reports) >= number for reports in found)

        await until(are_there, 30)

    async def watchers(self) -> list[GatewayProcess]:
        """The processes that read a shard."""
        found = []
        for each in self.service.processes:
            reply = await http(each.port, "/ws/health/detailed")
            if json.loads(reply.text)["stream"]["cursor"]:
                found.append(each)
        return found


@asynccontextmanager
async def sharded(folder: Path, count: int, text: str = ROUTES) -> AsyncIterator[Sharded]:
    shards = 8
    settings = {"REDIS_STREAM_SHARDS": str(shards), "REDIS_STREAM_SHARDS_PREVIOUS": str(shards)}
    tenants = {shard_of(tenant, shards): tenant for tenant in range(1, 100)}
    streams = {stream_name(STREAM, shards, shard): tenant for shard, tenant in tenants.items()}
    assert len(streams) == shards
    async with service(folder, count, text, **settings) as found:
        yield Sharded(found, streams)


async def test_watchers_of_shards_without_clients_are_killed(tmp_path: Path) -> None:
    """One process reads each shard; another one takes over, at some moment of each step."""
    async with sharded(tmp_path, 4) as found:
        for each in found.service.processes[:3]:
            entries = found.publish()
            await trio.sleep(random.uniform(0.5, 1.5) * WITHIN)
            each.kill()
            await found.wait_reports(entries, len(STEPS))
            for stream, entry in entries.items():
                found.service.check_in_time([entry], stream)


@pytest.mark.parametrize("count", [2, 4])
async def test_watcher_of_shards_is_killed_right_before_it_would_report(
    tmp_path: Path, count: int
) -> None:
    """The worst moment: another process must notice it, and read the shards, before it can."""
    latest = 0.0
    async with sharded(tmp_path, count, ROUTES.partition("then")[0]) as found:
        for _ in range(20):
            entries = found.publish()
            over = max(int(entry.split("-")[0]) for entry in entries.values()) / 1000 + WITHIN
            killed = await found.watchers()
            assert len(killed) < count
            await trio.sleep(over + GRACE - 0.02 - found.service.clock())
            watch = Stopwatch()
            for each in killed:
                each.kill()
            await found.wait_reports(entries, 1)
            taken = watch.taken
            for each in killed:
                await each.start()
            for stream, entry in entries.items():
                [report] = found.service.reports_of(entry, stream)
                late = (report["at"] - float(entry.split("-")[0])) / 1000 - WITHIN
                assert late - taken <= LATE
                latest = max(latest, late)
    print(f"{count} processes: at most {latest:.2f} s late")


async def test_processes_that_were_all_away_report_when_they_are_back(tmp_path: Path) -> None:
    async with service(tmp_path, 2) as found:
        entry = found.publish()
        for each in found.processes:
            each.kill()
        await trio.sleep(1.5 * WITHIN)
        for each in found.processes:
            await each.start()
        await found.wait_reports(len(STEPS))
        assert [report["to"] for report in found.reports_of(entry)] == STEPS


async def test_confirmation_in_the_last_moment_on_another_process_counts(tmp_path: Path) -> None:
    races = 100
    async with service(tmp_path, 4) as found:
        async with admitted(found.url(3, sector_ids=[5], sub="77")) as waiter:

            async def confirm(event_id: str) -> None:
                at = int(event_id.split("-")[0]) / 1000 + WITHIN - 0.01
                await trio.sleep(max(0.0, at - found.clock()))
                await waiter.send_message(json.dumps({"type": "ack", "last_event_id": event_id}))

            async with trio.open_nursery() as nursery:
                for n in range(races):
                    found.publish(n=n)
                    event = await receive_event(waiter, 5)
                    nursery.start_soon(confirm, event["event_id"])
                    await trio.sleep(0.06)
            await trio.sleep(1.5 * WITHIN)
        assert found.reports() == []


@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_deadlines_that_pass_while_redis_is_away(tmp_path: Path, how: str) -> None:
    """They are reported when it is back, except for what was confirmed in time meanwhile."""
    async with (
        service(tmp_path, 2) as found,
        admitted(found.url(1, sector_ids=[5], sub="77", branch_ids=[2])) as waiter,
    ):
        unheard = [found.publish(n=n) for n in range(10)]
        ids = []
        for n in range(10):
            found.publish(branch_id=2, n=n)
            ids.append((await receive_event(waiter, 5))["event_id"])
        await trio.sleep(0.5)
        with away(found, how):
            await waiter.send_message(json.dumps({"type": "ack", "last_event_id": ids[-1]}))
            await trio.sleep(3 * WITHIN)
        await found.wait_reports(10 * len(STEPS), 60)
        for entry in unheard:
            assert [report["to"] for report in found.reports_of(entry)] == STEPS


@contextmanager
def away(found: Service, how: str) -> Iterator[None]:
    assert found.server is not None
    if how == "frozen":
        with found.server.frozen():
            yield
    else:
        found.server.kill()
        yield
        found.server.start_again()
        found.server.wait_until_ready()


SETS: dict[str, Callable[..., Any]] = {"Sentinel": sentinel_set, "Cluster": cluster_set}


@pytest.mark.parametrize("moment", [WITHIN / 2, WITHIN + 0.5], ids=["before", "at its end"])
@pytest.mark.parametrize("kind", SETS)
async def test_steps_are_taken_once_across_a_failover(
    tmp_path: Path, kind: str, moment: float
) -> None:
    """The primary is killed before the first steps are over, or when they are taken."""
    opened = SETS[kind](appendonly="yes")
    servers: RedisSet = await trio.to_thread.run_sync(opened.__enter__)
    try:

        def ask(*command: Any) -> Any:
            while True:
                with suppress(NotRunning, redis.RedisError):  # it fails over
                    return servers.primary(STREAM).ask(*command)

        async with (
            serving_on(servers.url, ask, tmp_path, 2) as found,
            admitted(found.url(0, sector_ids=[5], sub="77", branch_ids=[2])) as waiter,
        ):
            unheard = [found.publish(n=n) for n in range(10)]
            begun = trio.current_time()
            for n in range(10):
                found.publish(branch_id=2, n=n)
            ids = [(await receive_event(waiter, 5))["event_id"] for _ in range(10)]
            await waiter.send_message(json.dumps({"type": "ack", "last_event_id": ids[4]}))
            await trio.sleep_until(begun + WITHIN / 2)
            old = servers.primary(STREAM)
            if moment > WITHIN:
                await waiter.send_message(json.dumps({"type": "ack", "last_event_id": ids[-1]}))
                await trio.sleep_until(begun + moment)
            old.kill()
            if moment < WITHIN:  # in time, and while Redis is away
                await waiter.send_message(json.dumps({"type": "ack", "last_event_id": ids[-1]}))
            await trio.to_thread.run_sync(
                lambda: servers.wait_writable(STREAM, other_than=old, timeout=30)
            )
            unheard += [found.publish(n=n) for n in range(10, 20)]
            await found.wait_reports(20 * len(STEPS), 60)
            for entry in unheard:
                assert [report["to"] for report in found.reports_of(entry)] == STEPS
    finally:
        await trio.to_thread.run_sync(opened.__exit__, None, None, None)


async def test_a_lost_node_of_a_cluster_delays_the_events_of_its_own_shards_only(
    tmp_path: Path,
) -> None:
    """While it is away, what clients of other shards confirm counts, and the rest is reported."""
    shards = 8
    settings = {"REDIS_STREAM_SHARDS": str(shards)}
    opened = cluster_set(appendonly="yes", cluster_require_full_coverage="no")
    servers = await trio.to_thread.run_sync(opened.__enter__)

    def stream(tenant: int) -> str:
        return stream_name(STREAM, shards, shard_of(tenant, shards))

    def ask(command: str, *rest: Any) -> Any:
        return servers.primary(rest[0] if rest else STREAM).ask(command, *rest)

    lost, kept = 1, 2
    while servers.primary(stream(kept)) is servers.primary(stream(lost)):
        kept += 1
    try:
        async with (
            serving_on(servers.url, ask, tmp_path, 2, **settings) as found,
            admitted(found.url(0, tenant_id=lost, sector_ids=[5])) as victim,
            admitted(found.url(0, tenant_id=kept, sector_ids=[5])) as waiter,
        ):
            found.publish(stream(lost), tenant_id=lost)
            event = await receive_event(victim, 5)
            servers.primary(stream(lost)).kill()
            ack = {"type": "ack", "last_event_id": event["event_id"]}
            await victim.send_message(json.dumps(ack))  # is to be written to the lost node
            unheard = found.publish(stream(kept), tenant_id=kept, branch_id=2)
            for n in range(10):
                found.publish(stream(kept), tenant_id=kept, n=n)
                ack["last_event_id"] = (await receive_event(waiter, 5))["event_id"]
                await waiter.send_message(json.dumps(ack))
                await trio.sleep(0.1)
            await found.wait_reports(len(STEPS), stream=stream(kept))
            found.check_in_time([unheard], stream(kept))
            await trio.to_thread.run_sync(lambda: servers.wait_writable(stream(lost)))
            await trio.sleep(2 * WITHIN)
            assert found.reports(stream(lost)) == []
    finally:
        await trio.to_thread.run_sync(opened.__exit__, None, None, None)


class Cost(NamedTuple):
    """For each event: scripts in Redis, and its CPU time and that of all processes (µs)."""

    scripts: float
    redis: float
    gateways: float


async def cost(folder: Path, routes: str, count: int = 2500, rate: float = 10_000 / 60) -> Cost:
    """Publish to four processes with ten waiters, who confirm each event within 0.2 s."""
    async with service(folder, 4, routes) as found, trio.open_nursery() as nursery:
        for n in range(10):
            url = found.url(n % 4, sub=str(n + 1), branch_ids=[n + 1], sector_ids=[5])
            await nursery.start(confirm_all, url)
        before = used(found)
        begun = trio.current_time()
        for n in range(count):
            await trio.sleep_until(begun + n / rate)
            found.publish(branch_id=n % 10 + 1, n=n)
        await trio.sleep(2 * WITHIN)
        after = used(found)
        assert found.reports() == []
        nursery.cancel_scope.cancel()
    return Cost(*((now - then) / count for now, then in zip(after, before, strict=True)))


async def confirm_all(url: str, *, task_status: trio.TaskStatus[None]) -> None:
    """A waiter who confirms what came in a tenth of a second at once."""
    async with admitted(url) as waiter:
        task_status.started()
        while True:
            event = json.loads(await waiter.get_message())
            with trio.move_on_after(0.1):
                while True:
                    event = json.loads(await waiter.get_message())
            message = json.dumps({"type": "ack", "last_event_id": event["event_id"]})
            await waiter.send_message(message)


def used(found: Service) -> Cost:
    """The scripts so far, and the CPU times in µs."""
    stats = found.ask("INFO", "commandstats")
    scripts = stats.get("cmdstat_eval", {"calls": 0})["calls"]
    times = found.ask("INFO", "cpu")
    redis_ = times["used_cpu_user"] + times["used_cpu_sys"]
    gateways = 0.0
    for each in found.processes:
        assert each.process is not None
        fields = Path(f"/proc/{each.process.pid}/stat").read_text().rpartition(")")[2].split()
        gateways += (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    return Cost(scripts, 1e6 * redis_, 1e6 * gateways)


async def test_ten_thousand_watched_events_a_minute_cost_little(tmp_path: Path) -> None:
    watched = await cost(tmp_path, ROUTES)
    tracked = await cost(tmp_path, "[routes.SERVICE_CALL_CREATED]\nreceipt = true\n")
    plain = await cost(tmp_path, "")
    for name, each in (("watched", watched), ("receipts", tracked), ("neither", plain)):
        print(f"{name}: " + ", ".join(f"{k} {v:.2f}" for k, v in each._asdict().items()))
    assert watched.scripts - plain.scripts < 1
