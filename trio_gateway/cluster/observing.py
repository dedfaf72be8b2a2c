"""Observing: a program that asks the processes of a service, and is none of them."""

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Final

import trio

from ..broker.commands import Commands
from ..broker.probe import Probe
from ..broker.pubsub import PubSub
from ..broker.topology import Topology
from ..core.control_messages import Node
from ..core.limits import DropAlarm
from ..core.resilience import Breaker
from ..runtime.ingest import Ingest
from ..runtime.queue import EventQueue
from ..runtime.supervision import ConnectionLost
from .control import Control
from .keys import Keys
from .registry import make_name, read_nodes, read_settings

_CONNECT: Final = 5.0  # seconds
_BREAKER: Final = 5, 30.0


@dataclass
class Observer:
    """A registry without beats: it knows the live processes when it is asked."""

    commands: Commands
    keys: Keys
    name: str = field(default_factory=make_name)
    nodes: Mapping[str, Node] = field(default_factory=dict)  # none of our own
    on_forgotten: list[Callable[[], None]] = field(default_factory=list)

    async def read(self) -> dict[str, Node]:
        """Read the live processes. Raises :exc:`Unavailable`."""
        return await read_nodes(self.commands, self.keys)

    async def read_settings(self) -> dict[str, dict[str, Any]]:
        """Read the settings that they should have in common. Raises :exc:`Unavailable`."""
        return await read_settings(self.commands, self.keys)

    def forget(self, name: str) -> None:
        """A process has stopped. There is nothing to forget."""


@dataclass(frozen=True)
class Service:
    """The processes on one Redis, for one that asks them and gives them orders."""

    registry: Observer
    control: Control


@asynccontextmanager
async def open_commands(topology: Topology) -> AsyncIterator[Commands]:
    """Commands for a Redis, without the processes."""
    commands = Commands(topology, Breaker(*_BREAKER), Breaker(*_BREAKER), max_connections=2)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(commands.run)
        yield commands
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def open_service(
    topology: Topology, presence_stream: str | None, database: int
) -> AsyncIterator[Service]:
    """Connect to the Redis of a service; stream and database are those of its settings.

    Raises :exc:`ConnectionLost`, in a group, if Redis does not answer, then or later.
    """
    async with open_commands(topology) as commands:
        keys = Keys(presence_stream, is_cluster=topology.is_cluster, database=database)
        registry = Observer(commands, keys)
        subscribed = trio.Event()
        control = Control(commands, keys, registry, lambda: link.connected)
        probe = Probe()
        probe.is_wanted = False
        link = PubSub(
            topology,
            [],
            Ingest(),
            EventQueue(1, DropAlarm(60, 1, 60)),
            Breaker(*_BREAKER),
            {keys.replies(registry.name): _Replies(control, subscribed)},
            probe=probe,
            anywhere=topology.is_cluster,
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(link.run)
            with trio.move_on_after(_CONNECT):
                await subscribed.wait()
            if not subscribed.is_set():
                raise ConnectionLost(f"no answer in {_CONNECT:g} s")
            yield Service(registry, control)
            nursery.cancel_scope.cancel()


class _Replies:
    """Listens on the channel for answers."""

    def __init__(self, control: Control, subscribed: trio.Event) -> None:
        self.receive = control.receive
        self._control = control
        self._subscribed = subscribed

    def on_subscribed(self) -> None:
        self._control.on_subscribed()
        self._subscribed.set()
