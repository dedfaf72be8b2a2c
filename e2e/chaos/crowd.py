"""A service of several gateway processes, the people who are connected to it, and what it says."""

import json
import math
import random
import time
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import redis
import trio
from trio_websocket import (
    ConnectionClosed,
    ConnectionTimeout,
    DisconnectionTimeout,
    HandshakeError,
    WebSocketConnection,
    connect_websocket_url,
)

from tests.support.gateways import JWT_SECRET, Reachable, http, until
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt

PRESENCE: Final = "presence"  # the stream of joins and leaves
_AT_ONCE: Final = 40  # connects
_PONG: Final = '{"type":"pong"}'


@dataclass
class Stay:
    """A connection to a process, from when to when in unix time."""

    host: GatewayProcess
    came: float
    went: float = math.inf

    def __repr__(self) -> str:
        return f"{self.host.port}: {self.came:.2f} to {self.went:.2f}"


@dataclass(eq=False)
class Person:
    """A user on an endpoint, or a diner of a session, with at most one connection."""

    endpoint: str
    number: int
    socket: WebSocketConnection | None = None
    at: GatewayProcess | None = None
    code: int | None = None  # with which the last connection was closed
    stays: list[Stay] = field(default_factory=list)
    doubts: int = 0  # tries that failed, and may have been connections to the service
    left: trio.Event = field(default_factory=trio.Event)

    @property
    def key(self) -> str:
        return f"{self.endpoint}:{self.number}"

    @property
    def here(self) -> bool:
        return self.socket is not None

    def came(self, socket: WebSocketConnection, at: GatewayProcess) -> None:
        self.socket, self.at, self.code = socket, at, None
        self.stays.append(Stay(at, time.time()))
        self.left = trio.Event()

    def went(self) -> None:
        self.socket = None
        self.stays[-1].went = time.time()
        self.left.set()

    def url(self, port: int) -> str:
        if self.endpoint == "diner":
            return Reachable(port).diner_url(session_id=self.number)
        return Reachable(port).staff_url(self.endpoint, sub=str(self.number))


def people(number: int) -> list[Person]:
    """So many, on all endpoints."""
    endpoints = ("waiter", "waiter", "waiter", "kitchen", "diner")
    return [Person(endpoints[n % len(endpoints)], 1000 + n) for n in range(number)]


class Crowd:
    """Connects people to processes, and notices when their connections are closed."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._slots = trio.CapacityLimiter(_AT_ONCE)
        self.refused: Counter[int] = Counter()  # by close code

    async def come(self, person: Person, process: GatewayProcess) -> None:
        """Connect, and try again while that is refused for the moment."""
        while not await self.try_to_come(person, process):
            await trio.sleep(0.5 + random.random())

    async def all_come(self, whom: Iterable[tuple[Person, GatewayProcess]]) -> None:
        async with trio.open_nursery() as nursery:
            for person, process in whom:
                nursery.start_soon(self.come, person, process)

    async def go(self, person: Person) -> None:
        """Leave without a word."""
        if (socket := person.socket) is not None:
            person.went()
            await trio.aclose_forcefully(socket._stream)

    async def try_to_come(self, person: Person, process: GatewayProcess) -> bool:
        """Connect once; returns whether that was possible."""
        async with self._slots:
            socket = None
            try:
                with trio.move_on_after(20):
                    socket = await connect_websocket_url(self._nursery, person.url(process.port))
                    await socket.send_message('{"type":"ping"}')
                    while await socket.get_message() != _PONG:
                        pass
                    person.came(socket, process)
                    self._nursery.start_soon(self._watch, person, socket)
                    return True
            except ConnectionClosed as closed:
                assert closed.reason is not None
                self.refused[closed.reason.code] += 1
            except OSError:
                return False
            except (HandshakeError, ConnectionTimeout, DisconnectionTimeout):
                pass
            finally:
                if socket is not None and person.socket is not socket:
                    with trio.CancelScope(shield=True):
                        await trio.aclose_forcefully(socket._stream)
        person.doubts += 1
        return False

    async def _watch(self, person: Person, socket: WebSocketConnection) -> None:
        try:
            while True:
                await socket.get_message()
        except ConnectionClosed as closed:
            if person.socket is socket:
                person.went()
                person.code = closed.reason.code if closed.reason else None
        finally:
            with trio.CancelScope(shield=True):
                await trio.aclose_forcefully(socket._stream)


@dataclass
class Answer:
    """What GET /ws/presence says: connections by key, and who did not answer."""

    connections: dict[str, int]
    missing: list[str]
    seconds: float


@dataclass
class Service:
    """The processes of one service, on one Redis."""

    processes: Sequence[GatewayProcess]
    backend: "redis.Redis"
    crowd: Crowd
    nursery: trio.Nursery

    async def watch(self, process: GatewayProcess) -> "Watcher":
        """Let an admin at this process watch the branch."""
        found = Watcher()
        self.nursery.start_soon(found.run, process)
        await until(lambda: found.states)
        return found

    async def ask(self, process: GatewayProcess) -> Answer:
        """Ask a process who is present in the branch."""
        token = make_jwt(JWT_SECRET, roles=["MANAGER"])
        headers = {"Authorization": f"Bearer {token}"}
        began = trio.current_time()
        reply = await http(process.port, "/ws/presence?branch_id=1", headers=headers)
        seconds = trio.current_time() - began
        assert reply.status == 200, reply
        found = {_key(each): each["connections"] for each in _people(reply.json)}
        assert reply.json["complete"] == (not reply.json["missing"])
        return Answer(found, reply.json["missing"], seconds)

    def told(self) -> list[tuple[bool, str, float]]:
        """What the stream says, in order: whether it is a join, of whom, and when."""
        entries: Any = self.backend.xrange(PRESENCE)
        found = []
        for _, fields in entries:
            event = json.loads(fields[b"data"])
            subject, _, what = event["type"].partition("_")
            assert subject == ("SESSION" if event["endpoint"] == "diner" else "USER")
            if event["endpoint"] != "admin":
                number = event.get("user_id") or event["session_id"]
                found.append((what == "ONLINE", f"{event['endpoint']}:{number}", event["at"]))
        return found

    def joins_and_leaves(self) -> dict[str, list[bool]]:
        """What the stream says about each; a leave follows a join, and a join a leave."""
        found: defaultdict[str, list[bool]] = defaultdict(list)
        for joined, key, _ in self.told():
            found[key].append(joined)
        for key, changes in found.items():
            wanted = [n % 2 == 0 for n in range(len(changes))]
            assert changes == wanted, f"{key}: {changes}"
        return found

    def present_by_stream(self) -> set[str]:
        return {key for key, changes in self.joins_and_leaves().items() if changes[-1]}


class Watcher:
    """An admin that watches the branch; ``keys`` are those who are present, as it was told."""

    def __init__(self) -> None:
        self.keys: set[str] = set()
        self.wrong: list[str] = []  # changes that change nothing
        self.states = 0
        self.scope = trio.CancelScope()

    async def run(self, process: GatewayProcess) -> None:
        """Watch until the connection is closed."""
        url = Reachable(process.port).staff_url("admin", sub=str(process.port))
        with self.scope:
            await self._watch(url)

    async def _watch(self, url: str) -> None:
        async with trio.open_nursery() as nursery:
            socket = await connect_websocket_url(nursery, url)
            try:
                with suppress(ConnectionClosed):
                    await socket.send_message('{"type":"watch_presence","branch_id":1}')
                    while True:
                        self._take(json.loads(await socket.get_message()))
            finally:
                with trio.CancelScope(shield=True):
                    await trio.aclose_forcefully(socket._stream)
            nursery.cancel_scope.cancel()

    def _take(self, message: Any) -> None:
        if message.get("type") != "presence":
            return
        if "users" in message:
            self.states += 1
            self.keys = set(map(_key, _people(message)))
            return
        for item in filter(_is_counted, message["left"]):
            key = _key(item)
            if key not in self.keys:
                self.wrong.append(f"left: {key}")
            self.keys.discard(key)
        self.keys |= set(map(_key, filter(_is_counted, message["joined"])))


def _people(state: Any) -> list[Any]:
    """Who is present according to a state, without the admins that watch."""
    return [*filter(_is_counted, state["users"]), *state["sessions"]]


def _is_counted(item: Any) -> bool:
    return bool(item.get("endpoint") != "admin")


def _key(item: Any) -> str:
    if "session_id" in item:
        return f"diner:{item['session_id']}"
    return f"{item['endpoint']}:{item['user_id']}"


@asynccontextmanager
async def service(
    redis_url: str, folder: Path, *, first_url: str | None = None, **settings: str
) -> AsyncIterator[Service]:
    """Run four processes, the first on a URL of its own; they are killed at the end."""
    common = {
        "WS_CLUSTER": "true",
        "WS_PRESENCE_STREAM": PRESENCE,
        "WS_MAX_TOTAL_CONNECTIONS": "5000",
        "WS_MAX_CONNECTIONS_PER_USER": "1000",
        "WS_MAX_CONNECTIONS_PER_SESSION": "1000",
        "WS_HEARTBEAT_TIMEOUT": "3600",
        "WS_RECEIVE_TIMEOUT": "3600",
    } | settings
    urls = [first_url or redis_url, *[redis_url] * 3]
    found = [GatewayProcess(url, folder, **common) for url in urls]
    with redis.Redis.from_url(redis_url) as backend:
        try:
            for each in found:
                await each.start()
            async with trio.open_nursery() as nursery:
                yield Service(found, backend, Crowd(nursery), nursery)
                nursery.cancel_scope.cancel()
        finally:
            for each in found:
                each.kill()
