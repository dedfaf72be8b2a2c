"""A service of fake processes that share a real Valkey, in virtual time."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Final, cast

import redis
import trio

from trio_gateway.broker.commands import Commands, Unavailable
from trio_gateway.cluster.keys import Keys
from trio_gateway.cluster.presence import Presence
from trio_gateway.cluster.presence_scripts import common_arguments, presence_keys
from trio_gateway.cluster.registry import Registry
from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.control_messages import Node
from trio_gateway.runtime.connection import Connection
from trio_gateway.testing import make_principal

KEYS: Final = Keys()
_PUBLISHED: Final = "{gateway}:test:published"
_GAP_UNTIL: Final = "{gateway}:test:gap"
STREAM: Final = "{gateway}:presence"
START: Final = 1_790_000_000.0  # unix time at which each world begins


class FakeConnection:
    """What presence sees of a connection."""

    def __init__(self, principal: Principal) -> None:
        self.principal = principal
        self.joined_at = trio.current_time()
        self.waiting_bytes = 0
        self.messages: list[Any] = []

    def send(self, text: bytes) -> None:
        self.messages.append(json.loads(text))

    def known(self, branch: int) -> dict[tuple[str, str], Any]:
        """What an admin knows of a branch that it watches: the items by user or session."""
        found: dict[tuple[str, str], Any] = {}
        for message in self.messages:
            if message["branch_id"] != branch:
                continue
            if "users" in message:
                found.clear()
            for each in message.get("left", []):
                del found[_name(each)]
            for key in ("users", "sessions", "joined"):
                found |= {_name(each): each for each in message.get(key, [])}
        return found


def _name(item: Any) -> tuple[str, str]:
    return item.get("endpoint", "diner"), str(item.get("user_id", item.get("session_id")))


@dataclass
class World:
    """The Valkey, and what was told through it."""

    client: "redis.Redis"
    grace: float = 15.0
    is_away: bool = False
    answers_get_lost: bool = False
    loses_messages: bool = False
    calls: int = 0
    told_at: list[float] = field(default_factory=list)  # in virtual time, of each event
    processes: dict[str, "Process"] = field(default_factory=dict)

    def evaluate(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        """Run a script at the virtual time."""
        self.calls += 1
        now = START + trio.current_time()
        seconds = math.floor(now)
        clock = f"{{'{seconds}', '{(now - seconds) * 1e6:.0f}'}}"
        # Valkey's own time goes on: keys that expire do so at a virtual time, too.
        text = script.replace("redis.call('TIME')", clock).replace(
            "'PX', 7000)", f"'KEEPTTL') redis.call('SET', '{_GAP_UNTIL}', now + 7000)"
        )
        until = cast(Any, self.client.get(_GAP_UNTIL))
        if until is not None and now * 1000 >= float(until):
            self.client.delete(KEYS.gap, _GAP_UNTIL)
        text = text.replace("'PUBLISH', channel", f"'RPUSH', '{_PUBLISHED}'")
        reply = self.client.eval(text, len(keys), *keys, *arguments)
        published = cast(Any, self.client.lrange(_PUBLISHED, 0, -1))
        self.client.delete(_PUBLISHED)
        for process in self.processes.values() if not self.loses_messages else ():
            for each in published:
                process.presence.feed.receive(each)
        told = self.client.xlen(STREAM) - len(self.told_at)
        self.told_at += [now - START] * told
        return reply

    @property
    def events(self) -> list[dict[str, Any]]:
        """The entries of the stream."""
        entries = cast(Any, self.client.xrange(STREAM))
        return [json.loads(fields[b"data"]) for _, fields in entries]

    @property
    def told(self) -> list[tuple[str, str]]:
        """The entries, each as its type and the id of its user or session."""
        return [(e["type"], str(e.get("user_id", e.get("session_id")))) for e in self.events]

    def online(self, tenant: int = 1) -> set[str]:
        """Who is present, as Redis has it."""
        return {
            key.decode() for key in cast(Any, self.client.hkeys(f"{KEYS.prefix}online:{tenant}"))
        }


class Process:
    """One process: its presence, and its beats."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_cut_off = False  # from Redis
        self.resumed = trio.Event()
        self.resumed.set()
        self.scope = trio.CancelScope()
        run, clock = self.run_script, lambda: START + trio.current_time()
        self.presence = Presence(name, run, run, clock)
        self.registry = Registry(name, cast(Commands, self), KEYS, lambda: Node(name))
        self.registry.on_forgotten.append(self.presence.rewrite)
        self.connections: list[FakeConnection] = []
        world.processes[name] = self

    async def run(self) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.presence.run)
                nursery.start_soon(self.registry.run)

    async def run_script(self, script: str, arguments: Sequence[str | int]) -> Any:
        common = common_arguments(KEYS, self.world.grace)
        return await self.evaluate(script, presence_keys(KEYS, STREAM), [*common, *arguments])

    async def evaluate(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any] = (), **_: Any
    ) -> Any:
        """What the registry and presence use of commands."""
        await trio.sleep(0.001)
        await self.resumed.wait()
        if self.world.is_away or self.is_cut_off:
            await trio.sleep(0.5)
            raise Unavailable("away")
        reply = self.world.evaluate(script, keys, arguments)
        if self.world.answers_get_lost:
            raise Unavailable("the answer is lost")
        await self.resumed.wait()
        return reply

    def join(self, user: int = 21, **keys: Any) -> FakeConnection:
        """A client connects."""
        endpoint = keys.pop("endpoint", Endpoint.WAITER)
        principal = make_principal(endpoint, user=user, **keys)
        connection = FakeConnection(principal)
        self.connections.append(connection)
        self.presence.joined(cast(Connection, connection))
        return connection

    def leave(self, connection: FakeConnection) -> None:
        """A client leaves."""
        self.connections.remove(connection)
        self.presence.left(cast(Connection, connection))

    def move(self, connection: FakeConnection, **keys: Any) -> None:
        """A client has another principal."""
        connection.principal = make_principal(connection.principal.endpoint, **keys)
        self.presence.moved(cast(Connection, connection))

    def kill(self) -> None:
        """End it without a word, as SIGKILL does."""
        self.scope.cancel()
        self.connections.clear()
        del self.world.processes[self.name]
