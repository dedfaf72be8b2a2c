"""Clients, a publisher and a gateway process for the tests that kill things under load."""

import json
import math
import re
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

import redis
import trio
from redis.backoff import NoBackoff
from redis.retry import Retry

from tests.support.gateways import JWT_SECRET, TABLE_SECRET, until, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer
from tests.support.sockets import client_frame, make_head, take_frames
from trio_gateway.core.frames import CLOSE, TEXT
from trio_gateway.testing import make_jwt, make_table_token

STREAM = "events:critical"
FOR_CROWDS = {  # settings with which many clients of one user reconnect at once
    "WS_MAX_CONNECTIONS_PER_USER": "100000",
    "WS_MAX_CONNECTIONS_PER_SESSION": "100000",
    "WS_MAX_TOTAL_CONNECTIONS": "100000",
    "CIRCUIT_RECOVERY_TIMEOUT": "0.2",
    "LOG_LEVEL": "warning",
}
_EVENT = re.compile(rb'"seq":(\d+),.*"event_id":"([^"]+)"}$')
_PING = client_frame(TEXT, "ping")


class Client:
    """A client that stays: when it is closed it comes again, with the last id it saw."""

    lull = 0.02  # seconds between reads: many clients in one process read seldom, and much

    def __init__(
        self, port: int, path: str, patience: float = math.inf, others: Sequence[int] = ()
    ) -> None:
        self.ports = [port, *others]  # in turn, whenever it comes again
        self.patience = patience  # seconds after which it hangs up by itself
        self.path = path
        self.last_event_id = ""
        self.seen: list[int] = []
        self.connects = 0
        self.closes: list[bytes] = []  # by the gateway: codes and reasons
        self.losses = 0  # messages that say that events are missing
        self.replayed = 0
        self.ready = trio.Event()
        self.outage = 0.0  # the longest time without an event
        self._received_at: float | None = None

    async def run(self) -> None:
        while True:
            try:
                await self._live()
            except* (OSError, trio.BrokenResourceError, EOFError):
                pass
            await trio.sleep(0.05)

    async def _live(self) -> None:
        self.ports.append(self.ports.pop(0))
        stream = await trio.open_tcp_stream("127.0.0.1", self.ports[-1])
        async with stream:
            where = f"{self.path}&last_event_id={quote(self.last_event_id)}"
            await stream.send_all(make_head(request=f"GET {where} HTTP/1.1"))
            data = bytearray()
            while (end := data.find(b"\r\n\r\n")) < 0:
                data += await _some(stream)
            if not data.startswith(b"HTTP/1.1 101"):
                raise EOFError
            del data[: end + 4]
            self.connects += 1
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._beat, stream)
                nursery.cancel_scope.deadline = trio.current_time() + self.patience
                while self._take(data):
                    await trio.sleep(self.lull)
                    data += await _some(stream)
                nursery.cancel_scope.cancel()

    async def _beat(self, stream: trio.SocketStream) -> None:
        while True:
            await trio.sleep(20)
            await stream.send_all(_PING)

    def _take(self, data: bytearray) -> bool:
        """Record the complete messages; False if the gateway has closed."""
        for opcode, payload in take_frames(data):
            if opcode == CLOSE:
                self.closes.append(payload)
                return False
            if opcode == TEXT:
                self._receive(payload)
        return True

    def _receive(self, message: bytes) -> None:
        if (event := _EVENT.search(message)) is not None:
            now = time.monotonic()
            if self._received_at is not None:
                self.outage = max(self.outage, now - self._received_at)
            self._received_at = now
            self.seen.append(int(event[1]))
            self.last_event_id = event[2].decode()
            return
        said = json.loads(message)
        if said["type"] == "resumed":
            self.last_event_id = said["last_event_id"]
            self.replayed += said["count"]
            self.losses += not said["recovered"]
            self.ready.set()
        elif said["type"] == "gap":
            self.losses += 1


async def _some(stream: trio.SocketStream) -> bytes:
    data = await stream.receive_some(65_536)
    if not data:
        raise EOFError
    return bytes(data)


class Backend:
    """Publishes numbers at a rate, each again and again until Redis has acknowledged it."""

    def __init__(self, port: int, rate: float) -> None:
        self.port = port
        self.rate = rate
        self.published = 0
        self.again = 0
        self._stop = threading.Event()

    async def run(self) -> None:
        await trio.to_thread.run_sync(self._run)

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        options = {"socket_timeout": 1, "retry": Retry(NoBackoff(), 0)}
        client = redis.Redis(port=self.port, **options)  # type: ignore[arg-type]
        due = time.monotonic()
        while not self._stop.is_set():
            n = self.published + 1
            event = {
                "seq": n, "type": "ROUND_READY", "tenant_id": 1, "branch_id": 1,
                "session_id": 456, "id": f"event-{n}",
            }  # fmt: skip
            payload = json.dumps(event, separators=(",", ":"))
            while not self._stop.is_set():
                try:
                    client.xadd(STREAM, {"data": payload})
                    self.published = n
                    break
                except redis.RedisError:
                    self.again += 1
                    time.sleep(0.02)
            due = max(due + 1 / self.rate, time.monotonic() - 0.1)
            time.sleep(max(0.0, due - time.monotonic()))
        client.close()


@dataclass
class Figures:
    """What a run was, and what became of its events."""

    what: str
    clients: int
    kills: int
    events: int = 0
    missing: int = 0
    doubled: int = 0
    out_of_order: int = 0
    losses: int = 0
    reconnects: int = 0
    replayed: int = 0
    published_again: int = 0
    longest_outage: float = 0.0
    seconds: float = field(default_factory=time.monotonic)

    def count(self, clients: Sequence[Client], backend: Backend) -> None:
        self.events, self.published_again = backend.published, backend.again
        for client in clients:
            distinct = set(client.seen)
            self.missing += len(set(range(1, self.events + 1)) - distinct)
            self.doubled += len(client.seen) - len(distinct)
            following = zip(client.seen, client.seen[1:], strict=False)
            self.out_of_order += sum(a > b for a, b in following)
            self.losses += client.losses
            self.reconnects += client.connects - 1
            self.replayed += client.replayed
            self.longest_outage = max(self.longest_outage, client.outage)
        self.longest_outage = round(self.longest_outage, 2)
        self.seconds = round(time.monotonic() - self.seconds, 1)

    def assert_nothing_lost(self) -> None:
        assert self.events
        assert (self.missing, self.doubled, self.out_of_order, self.losses) == (0, 0, 0, 0), self


def paths(number: int) -> list[str]:
    """Waiters, cooks and diners that all receive the same events."""
    waiter = make_jwt(JWT_SECRET, roles=["WAITER"], life=36_000)
    cook = make_jwt(JWT_SECRET, sub="22", roles=["KITCHEN"], life=36_000)
    diner = make_table_token(TABLE_SECRET, session_id=456, life=10_000)
    kinds = (
        f"/ws/waiter?token={waiter}", f"/ws/kitchen?token={cook}", f"/ws/diner?table_token={diner}"
    )  # fmt: skip
    return [kinds[n % 3] for n in range(number)]


Disturb = Callable[[RedisServer, GatewayProcess, Callable[[], Awaitable[None]]], Awaitable[None]]


async def run(
    what: str,
    disturb: Disturb,
    arguments: Sequence[str] = (),
    gateways: int = 1,
    /,
    *,
    clients: int,
    kills: int,
    rate: float = 200,
    **settings: str,
) -> Figures:
    """Disturb a gateway and its Redis under load; ``disturb`` gets a way to wait for progress.

    With several gateways it gets the first of them; clients come back to the next one.
    """
    figures = Figures(what, clients, kills)
    async with own_redis() as server, trio.open_nursery() as nursery:
        with tempfile.TemporaryDirectory() as folder:
            fleet = [
                GatewayProcess(
                    server.connection_url, Path(folder), *arguments, **FOR_CROWDS | settings
                )
                for _ in range(gateways)
            ]
            gateway, *gateway.siblings = fleet
            ports = [each.port for each in fleet]
            try:
                for each in fleet:
                    await each.start()
                # Some are restless: so they resume while the others stay.
                crowd = [
                    Client(
                        ports[n % gateways],
                        path,
                        math.inf if n % 4 else 1 + n / clients,
                        [*ports[n % gateways + 1 :], *ports[: n % gateways]],
                    )
                    for n, path in enumerate(paths(clients))
                ]
                for client in crowd:
                    nursery.start_soon(client.run)
                with trio.fail_after(30):
                    for client in crowd:
                        await client.ready.wait()
                backend = Backend(server.port, rate)
                nursery.start_soon(backend.run)

                async def progress() -> None:
                    """Every client has seen something that was published from now on."""
                    published = backend.published + 1

                    def all_have() -> bool:
                        return all(c.seen and c.seen[-1] >= published for c in crowd)

                    await until(all_have, 30)

                try:
                    await progress()
                    await disturb(server, gateway, progress)
                    await progress()
                finally:
                    backend.stop()
                await trio.sleep(1.5)
                published = backend.published
                with trio.move_on_after(20):
                    while not all(client.seen[-1] == published for client in crowd):
                        await trio.sleep(0.05)
                figures.count(crowd, backend)
            finally:
                for each in fleet:
                    each.kill()
                nursery.cancel_scope.cancel()
    return figures


@asynccontextmanager
async def own_redis() -> AsyncIterator[RedisServer]:
    """One that may be killed: what it has acknowledged is on the disk."""
    with valkey(appendonly="yes", appendfsync="always") as server:
        yield server


async def kill_redis(
    server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
) -> None:
    """``kill -9``, and a start on the same port with the same data."""
    server.kill()
    await trio.sleep(0.05)
    server.start_again()
    await progress()


async def freeze_redis(
    server: RedisServer,
    gateway: GatewayProcess,
    progress: Callable[[], Awaitable[None]],
    seconds: float,
) -> None:
    with server.frozen():
        await trio.sleep(seconds)
    await progress()


async def kill_gateway(
    server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
) -> None:
    gateway.kill()
    await gateway.start()
    await progress()


def again_and_again(
    disturb: Disturb, times: int, *, between: tuple[float, float] = (0.1, 0.6)
) -> Disturb:
    async def repeat(
        server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
    ) -> None:
        shortest, longest = between
        for n in range(times):
            await trio.sleep(shortest + (longest - shortest) * (n * 0.618 % 1))
            await disturb(server, gateway, progress)

    return repeat
