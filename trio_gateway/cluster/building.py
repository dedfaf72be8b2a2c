"""Builds what a process needs to be one of several, without I/O."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any, Final

import trio

from ..broker.command_link import CommandLink
from ..broker.commands import TIMEOUT, Commands, Unavailable
from ..broker.probe import Probe
from ..broker.pubsub import Listener, PubSub
from ..broker.topology import Topology
from ..core.capacity import CapacityLimits
from ..core.control_messages import Node, SectorsChanged
from ..core.resilience import Backoff, Breaker
from ..runtime.hub import Hub
from ..runtime.ingest import Ingest
from ..runtime.queue import EventQueue
from ..runtime.room import Room
from ..runtime.supervision import keep_running
from ..settings import Settings
from .carrying_out import carry_out_orders
from .control import Control
from .keys import Keys
from .limits import ClusterLimits, Evaluate
from .presence import Presence
from .presence_query import answer_presence
from .presence_scripts import common_arguments, presence_keys
from .registry import Registry, make_name
from .room import ClusterRoom

# Settings that should be the same in all processes, see ``trio-gateway check``.
COMMON: Final = (
    "WS_CLUSTER", "WS_MAX_CONNECTIONS_PER_USER", "WS_MAX_CONNECTIONS_PER_SESSION",
    "WS_MAX_CONNECTIONS_PER_TENANT", "WS_PRESENCE_GRACE", "WS_PRESENCE_STREAM", "WS_SLO_SECONDS",
    "REDIS_STREAMS", "REDIS_STREAM_SHARDS", "REDIS_STREAM_SHARDS_PREVIOUS",
)  # fmt: skip

_RECOVERY: Final = 1.0  # seconds: without the link, API calls fail that would work by now


@dataclass(frozen=True, kw_only=True, eq=False)
class ClusterParts:
    """The parts of a process that is one of several, with WS_CLUSTER or an API for backends."""

    keys: Keys
    registry: Registry
    control: Control
    scripts: Sequence[CommandLink]  # of limits, and of presence; none in a Cluster
    limits: ClusterLimits | None  # with WS_CLUSTER
    room: ClusterRoom | None  # with WS_CLUSTER
    link: PubSub  # of control, apart from the events: neither delays the other
    topology: Topology
    breakers: Mapping[str, Breaker]
    presence: Presence | None  # with WS_CLUSTER

    def start(self, nursery: trio.Nursery) -> None:
        """Start the tasks of all parts."""
        changed = None if self.topology.is_fixed else self.topology.wait_changed
        breaker = self.breakers["control"]
        backoff = Backoff(most=_RECOVERY)
        nursery.start_soon(keep_running, "control", self.link.run, breaker, backoff, changed)
        nursery.start_soon(self.registry.run)
        nursery.start_soon(self.control.run)
        for each in self.scripts:
            nursery.start_soon(each.run)
        if self.limits is not None and self.room is not None:
            nursery.start_soon(self.limits.run)
            nursery.start_soon(self.room.run)
        if self.presence is not None:
            nursery.start_soon(self.presence.run)

    def reconnect(self) -> None:
        """Use new connections: another one has found that the server is not the primary."""
        self.link.reconnect()
        for each in self.scripts:
            each.reconnect()

    async def leave(self) -> None:
        """Tell the other processes that this one has stopped, if Redis answers."""
        if self.limits is not None:
            self.limits.stop()
        if self.presence is not None:
            await self.presence.flush()
        with suppress(Unavailable):
            await self.registry.leave()


def common_settings(settings: Settings) -> dict[str, Any]:
    """The settings that should be the same in all processes."""
    return {each: getattr(settings, each.lower()) for each in COMMON}


def build_cluster(
    settings: Settings,
    *,
    topology: Topology,
    database: int,
    commands: Commands,
    hub: Hub,
    capacity: CapacityLimits,
    room: Room,
    ingest: Ingest,
    queue: EventQueue,
    describe: Callable[[str], Node],
    clock: Callable[[], float],
    sectors_changed: Callable[[SectorsChanged], None] | None,
) -> ClusterParts:
    """Build the parts. ``database`` is a number of Redis; ``describe`` returns the state of the
    process of this name.
    """
    name = make_name()
    keys = Keys(settings.ws_presence_stream, is_cluster=topology.is_cluster, database=database)
    # In a Cluster the link itself publishes its probe, on another node.
    probe = Probe(f"{keys.replies(name)}:probe")
    registry = Registry(
        name,
        commands,
        keys,
        lambda: describe(name),
        settings=common_settings(settings),
        probe=None if topology.is_cluster else probe,
    )
    control = Control(commands, keys, registry, lambda: link.connected)
    listeners: dict[str, Listener] = {keys.control: control, keys.replies(name): control}
    presence = None
    # What each client that connects costs goes through links of its own.
    scripts: list[CommandLink] = []
    ask_limits: Evaluate = commands.evaluate
    write_presence: Evaluate = commands.evaluate
    if settings.ws_cluster and not topology.is_cluster:
        scripts = [CommandLink(topology), CommandLink(topology)]
        ask_limits, write_presence = (each.evaluate for each in scripts)
    if settings.ws_cluster:
        run_script, run_write = (
            partial(
                _run_script,
                evaluate,
                presence_keys(keys, settings.ws_presence_stream),
                common_arguments(keys, settings.ws_presence_grace),
            )
            for evaluate in (commands.evaluate, write_presence)
        )
        presence = hub.observer = Presence(name, run_script, run_write, clock)
        listeners[keys.changes] = presence.feed
        registry.on_forgotten.append(presence.rewrite)
        answer_presence(control, presence)
    breaker = Breaker(settings.circuit_failure_threshold, _RECOVERY)
    link = PubSub(
        topology,
        [],
        ingest,
        queue,
        breaker,
        listeners,
        probe=probe,
        anywhere=topology.is_cluster,
    )
    link.name = "control"
    limits, cluster_room = None, None
    if settings.ws_cluster:
        limits = ClusterLimits(hub, capacity, keys, name, ask_limits, registry.beat)
        registry.on_forgotten.append(limits.write_all)
        cluster_room = ClusterRoom(hub, room, limits, control, name)
    carry_out_orders(control, hub, sectors_changed)
    return ClusterParts(
        keys=keys,
        registry=registry,
        control=control,
        scripts=scripts,
        limits=limits,
        room=cluster_room,
        link=link,
        topology=topology,
        breakers={"cluster": commands.cluster_breaker, "control": breaker},
        presence=presence,
    )


async def _run_script(
    evaluate: Evaluate,
    keys: Sequence[str],
    common: Sequence[str],
    script: str,
    arguments: Sequence[str | int],
) -> Any:
    return await evaluate(script, keys, [*common, *arguments], seconds=TIMEOUT)
