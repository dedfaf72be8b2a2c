"""Presence while processes and their Redis are killed, paused and restarted."""

import json
import random
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import trio
from trio_websocket import ConnectionClosed, HandshakeError

from bench.crowd import Crowd, Expected, Kind, staff
from tests.support.gateways import (
    JWT_SECRET,
    Reachable,
    admitted,
    connect,
    http,
    received,
    serving,
    until,
    valkey,
)
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer
from tests.support.stopwatch import Stopwatch
from trio_gateway.redis_sets import Cluster, NotRunning, RedisSet, SentinelSet
from trio_gateway.testing import make_jwt

from .serving import SERVE, crowded
from .serving import serving as serving_workers

pytestmark = pytest.mark.chaos

STREAM: Final = "presence"
LIVE: Final = 7.0  # seconds
MANAGER: Final = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, sub='9', roles=['MANAGER'])}"}


class Service:
    """Several gateway processes on one Redis."""

    def __init__(self, server: RedisServer, folder: Path, **settings: str) -> None:
        self.server = server
        self.backend = redis.Redis.from_url(server.connection_url, decode_responses=True)
        self._folder = folder
        self._settings = {"WS_CLUSTER": "true", "WS_PRESENCE_STREAM": STREAM, **settings}
        self.processes: list[GatewayProcess] = []

    async def start(self, count: int) -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                self.processes.append(self.make())
                nursery.start_soon(self.processes[-1].start)
        await until(lambda: self.backend.zcard("{gateway}:nodes") >= count, 10)

    def make(self) -> GatewayProcess:
        return GatewayProcess(
            self.server.connection_url,
            self._folder,
            WS_MAX_CONNECTIONS_PER_USER="1000",
            **self._settings,
        )

    @property
    def events(self) -> list[dict[str, Any]]:
        entries: Any = self.backend.xrange(STREAM)
        return [json.loads(fields["data"]) for _, fields in entries]

    def told(self, kind: str) -> list[str]:
        return [event["user_id"] for event in self.events if event["type"] == kind]

    def check_turns(self) -> None:
        """ONLINE and OFFLINE of each user take turns."""
        kinds: dict[tuple[str, str], list[str]] = {}
        for event in self.events:
            kinds.setdefault((event["user_id"], event["endpoint"]), []).append(event["type"])
        for found in kinds.values():
            assert found == [("USER_ONLINE", "USER_OFFLINE")[n % 2] for n in range(len(found))]

    async def ask(self, process: GatewayProcess) -> Any:
        reply = await http(process.port, "/ws/presence?branch_id=1", headers=MANAGER)
        assert reply.status == 200, reply.text
        return reply.json


@asynccontextmanager
async def service(folder: Path, count: int, **settings: str) -> AsyncIterator[Service]:
    with valkey() as server:
        found = Service(server, folder, **settings)
        try:
            await found.start(count)
            yield found
        finally:
            for process in found.processes:
                process.kill()


async def stay(service: Service, user: int, process: GatewayProcess) -> None:
    """A client that connects again, to any process, whenever its connection ends."""
    while True:
        with suppress(ConnectionClosed, HandshakeError, OSError):
            async with connect(
                Reachable(process.port).staff_url("waiter", sub=str(user))
            ) as client:
                while True:
                    await client.get_message()
        await trio.sleep(random.uniform(0.1, 1.0))
        process = random.choice(service.processes)


async def test_of_a_killed_process_only_those_leave_who_do_not_come_back(tmp_path: Path) -> None:
    grace = 4
    async with service(tmp_path, 4, WS_PRESENCE_GRACE=str(grace)) as found:
        victim, *others = found.processes
        async with AsyncExitStack() as stack:
            for user in range(200):
                process = found.processes[user % 4]
                url = Reachable(process.port).staff_url("waiter", sub=str(user))
                await stack.enter_async_context(admitted(url))
            await until(lambda: len(found.events) == 200)
            lost = {str(user) for user in range(0, 200, 4)}
            watch = Stopwatch()
            victim.kill()
            back = set(random.sample(sorted(lost), 25))
            for returning in sorted(back):
                url = Reachable(random.choice(others).port).staff_url("waiter", sub=returning)
                await stack.enter_async_context(admitted(url))
            assert watch.elapsed < grace
            await until(lambda: set(found.told("USER_OFFLINE")) == lost - back, 30)
            assert grace - 0.1 < watch.elapsed
            assert watch.net < max(grace, LIVE) + 4

            async def is_complete() -> bool:  # others may know of its end with their next beat
                return bool((await found.ask(others[0]))["complete"])

            await until(is_complete, 4)
            assert len((await found.ask(others[0]))["users"]) == 200 - 25
            await trio.sleep(grace + LIVE + 3)
            assert Counter(found.told("USER_OFFLINE")) == Counter(lost - back)
            assert len(found.told("USER_ONLINE")) == 200
        await until(lambda: len(found.told("USER_OFFLINE")) == 200, grace + 5)
        found.check_turns()
        assert found.backend.keys("{gateway}:online:*") == []


async def test_without_a_grace_a_killed_process_is_found_out_in_time(tmp_path: Path) -> None:
    async with service(tmp_path, 2, WS_PRESENCE_GRACE="0") as found:
        one, other = found.processes
        async with (
            admitted(Reachable(one.port).staff_url("waiter", sub="1")),
            admitted(Reachable(other.port).staff_url("waiter", sub="2")) as second,
        ):
            await trio.sleep(LIVE + 1)  # so that the service has begun
            watch = Stopwatch()
            await second.aclose()
            await until(lambda: found.told("USER_OFFLINE") == ["2"], 1)
            one.kill()
            await until(lambda: found.told("USER_OFFLINE") == ["2", "1"], 20)
            assert watch.net < LIVE + 4


async def test_rolling_restart_tells_nothing(tmp_path: Path) -> None:
    async with (
        service(tmp_path, 3, WS_PRESENCE_GRACE="10") as found,
        trio.open_nursery() as nursery,
    ):
        for user in range(60):
            nursery.start_soon(stay, found, user, found.processes[user % 3])
        await until(lambda: len(found.events) == 60)
        for old in list(found.processes):
            new = found.make()
            await new.start()
            found.processes = [new if each is old else each for each in found.processes]
            assert await old.stop() == 0
            await trio.sleep(4)
        await trio.sleep(15)
        assert found.told("USER_OFFLINE") == []
        assert len(found.told("USER_ONLINE")) == 60
        assert len((await found.ask(found.processes[0]))["users"]) == 60
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("grace", ["0", "15"])
async def test_redis_that_was_frozen_tells_nothing_wrong(tmp_path: Path, grace: str) -> None:
    async with service(tmp_path, 3, WS_PRESENCE_GRACE=grace) as found, AsyncExitStack() as stack:
        clients = []
        for user in range(30):
            url = Reachable(found.processes[user % 3].port).staff_url("waiter", sub=str(user))
            clients.append(await stack.enter_async_context(admitted(url)))
        await until(lambda: len(found.events) == 30)
        found.server.freeze()
        await trio.sleep(5)
        await clients[0].aclose()
        await trio.sleep(5)
        found.server.thaw()
        await until(lambda: found.told("USER_OFFLINE") == ["0"], 15 + 7 + 5)
        await trio.sleep(10)
        assert found.told("USER_OFFLINE") == ["0"]
        assert len(found.told("USER_ONLINE")) == 30
        for process in found.processes:
            answer = await found.ask(process)
            assert answer["complete"]
            assert len(answer["users"]) == 29


async def test_redis_that_was_restarted_empty_is_right_again(tmp_path: Path) -> None:
    async with service(tmp_path, 3, WS_PRESENCE_GRACE="3") as found, AsyncExitStack() as stack:
        clients = []
        for user in range(30):
            url = Reachable(found.processes[user % 3].port).staff_url("waiter", sub=str(user))
            clients.append(await stack.enter_async_context(admitted(url)))
        url = Reachable(found.processes[0].port).staff_url("admin", sub="9")
        admin = await stack.enter_async_context(admitted(url))
        await until(lambda: len(found.events) == 31)
        await admin.send_message('{"type":"watch_presence","branch_id":1}')
        await trio.sleep(0.5)
        await received(admin)
        found.server.kill()
        await trio.sleep(10)
        found.server.start_again()
        await trio.to_thread.run_sync(found.server.wait_until_ready)
        await until(lambda: len(found.told("USER_ONLINE")) == 31, 10)
        await clients[0].aclose()
        await until(lambda: found.told("USER_OFFLINE") == ["0"], 10)
        await trio.sleep(5)
        found.check_turns()
        assert len(found.events) == 32
        assert len((await found.ask(found.processes[1]))["users"]) == 30
        messages = await received(admin)
        last = max(n for n, each in enumerate(messages) if "users" in each)
        known = {each["user_id"] for each in messages[last]["users"]}
        for each in messages[last + 1 :]:
            known |= {item["user_id"] for item in each["joined"]}
            known -= {item["user_id"] for item in each["left"]}
        assert known == {*map(str, range(1, 30)), "9"}


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
@pytest.mark.parametrize("how", ["kill", "hand over"])
async def test_presence_after_a_failover(
    kind: str, how: str, request: pytest.FixtureRequest
) -> None:
    servers: SentinelSet | Cluster = request.getfixturevalue(kind)
    await trio.to_thread.run_sync(servers.wait_healthy)
    settings = {"ws_cluster": True, "ws_presence_stream": STREAM, "ws_presence_grace": 1.0}
    async with (
        serving(servers.url, "direct", **settings) as one,
        serving(servers.url, "direct", **settings) as other,
        AsyncExitStack() as stack,
    ):
        users = [
            await stack.enter_async_context(
                admitted((one, other)[user % 2].staff_url("waiter", sub=str(user)))
            )
            for user in range(20)
        ]
        old = servers.primary(STREAM)
        if how == "kill":
            old.kill()
        else:
            await trio.to_thread.run_sync(servers.failover, STREAM)
        for user in range(5):
            await users[user].aclose()
        for user in range(20, 25):
            url = (one, other)[user % 2].staff_url("waiter", sub=str(user))
            with suppress(ConnectionClosed, AssertionError):
                await stack.enter_async_context(connect(url))
        await trio.to_thread.run_sync(lambda: servers.wait_writable(STREAM, other_than=old))

        def is_right() -> bool:
            hubs = [gateway.app.parts.hub for gateway in (one, other)]
            connected = {str(each.principal.user) for hub in hubs for each in hub.connections}
            assert {str(user) for user in range(5, 20)} <= connected
            return _present(servers) == connected

        await until(is_right, 30)
        await trio.sleep(3)
        assert is_right()
    if how == "kill":
        await trio.to_thread.run_sync(servers.rejoin, old)


def _present(servers: RedisSet) -> set[str]:
    """Who is present, according to the stream."""
    try:
        entries = servers.primary(STREAM).ask("XRANGE", STREAM, "-", "+")
    except (NotRunning, redis.RedisError):
        return set()
    found: set[str] = set()
    for _, fields in entries:
        event = json.loads(fields["data"])
        (found.add if event["type"] == "USER_ONLINE" else found.discard)(event["user_id"])
    return found


@pytest.mark.parametrize("setting", ["true", "false"])
def test_ten_thousand_that_stay_cost_redis_almost_nothing(tmp_path: Path, setting: str) -> None:
    count = 10_000
    targets = [staff("waiter", n, n % 100 + 1, [1], "WAITER") for n in range(count)]
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
    kinds = [Kind("channel:branch:1:waiters", event)]
    crowd = Crowd(targets, [Expected([], 1) for _ in targets], kinds)
    with serving_workers(
        tmp_path,
        SERVE,
        4,
        LOG_LEVEL="warning",
        WS_CLUSTER=setting,
        JWT_REVALIDATION_INTERVAL="36000",
    ) as (server, valkey_server):
        client = redis.Redis.from_url(valkey_server.connection_url)

        def used() -> float:
            info: Any = client.info("cpu")
            return float(info["used_cpu_user"] + info["used_cpu_sys"])

        before = used()
        began = time.monotonic()
        load = crowded(server, crowd)
        connected = time.monotonic() - began
        for _ in range(50):
            load.pump(0.1)
        joined = used() - before
        before, began = used(), time.monotonic()
        while time.monotonic() < began + 30:
            load.pump(0.1)
        share = (used() - before) / (time.monotonic() - began)
        online: Any = sum(client.hlen(key) for key in client.keys("{gateway}:online:*"))
        print(
            f"\nWS_CLUSTER={setting}: {online} present; Redis used {joined:.2f} s of CPU while"
            f" {count} connected in {connected:.1f} s, and {share:.2%} of a core while they stay"
        )
        assert online == (count if setting == "true" else 0)
        assert share < 0.01
