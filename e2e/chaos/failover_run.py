"""A run: gateways, clients and a backend on Redis servers that a test disturbs again and again."""

import json
import math
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

from tests.support.gateways import http, until
from tests.support.processes import GatewayProcess
from tests.support.stopwatch import Stopwatch
from trio_gateway.redis_sets import Node, NotRunning, RedisSet

from .durable import FOR_CROWDS, STREAM, paths
from .failover import EVENT, LIVE_AGAIN, Backend, Confirm, Figures, Took, Watcher
from .relay import Relay
from .services import Services

_STUCK: Final = 30  # seconds; no claim
_LATE: Final = 5  # seconds that the last event may take
_PROBE_EVERY: Final = 0.05  # seconds
# A failover must not take as long as the default of this.
_SETTINGS: Final = {**FOR_CROWDS, "CIRCUIT_RECOVERY_TIMEOUT": "30"}


class Network:
    """The relays in front of the servers, if there are any."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self._nursery = nursery
        self._relays: dict[int, Relay] = {}  # by their own port

    def front(self, port: int) -> int:
        """Put a relay in front of a port; called in a thread."""
        relay = trio.from_thread.run_sync(Relay, port, self._nursery)
        self._relays[relay.port] = relay
        return relay.port

    def cut_off(self, node: Node, servers: RedisSet) -> None:
        """Cut the connections between a node and the other servers, both ways."""
        everybody = {each.source for each in servers.all_nodes if each.source is not None}
        assert node.source is not None
        for relay in self._relays.values():
            mine = relay.target in {node.port, node.bus_port}
            relay.split(everybody - {node.source} if mine else {node.source})

    def heal(self) -> None:
        """Hand on everything again."""
        for relay in self._relays.values():
            relay.forward()


class Stage:
    """A run: the servers, the gateways, the clients and the backend."""

    def __init__(
        self,
        servers: RedisSet,
        gateways: Sequence[GatewayProcess],
        clients: Sequence[Watcher],
        backend: Backend,
        network: Network,
        figures: Figures,
        watched: float,
    ) -> None:
        self.servers = servers
        self.watched = watched
        self.network = network
        self.gateways = gateways
        self.clients = clients
        self.backend = backend
        self.figures = figures
        self.probes = 0

    async def progress(self, seconds: float = _STUCK) -> None:
        """Wait until every client has seen something that is published from now on."""
        number = self.backend.published + 1
        await until(lambda: all(c.seen and c.seen[-1] >= number for c in self.clients), seconds)

    async def primary(self) -> Node:
        """The primary of the events."""
        return await trio.to_thread.run_sync(self.servers.primary, STREAM)

    async def healthy(self) -> None:
        """Wait until the servers are."""
        await trio.to_thread.run_sync(self.servers.wait_healthy, _STUCK)

    async def failed_over(
        self,
        other_than: Node | None,
        began: float,
        mend: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Wait for the new primary, and measure when all works again.

        ``mend`` is called once the clients are live again: in a Cluster, the new primary has no
        replica that could confirm events before the old one is back.
        """
        new = await trio.to_thread.run_sync(
            lambda: self.servers.wait_writable(STREAM, other_than=other_than, timeout=_STUCK)
        )
        accepts, watch = time.monotonic(), Stopwatch()
        self.figures.times += 1
        self.figures.writable_after.append(accepts - began)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._measure_publisher, accepts)
            async with trio.open_nursery() as live:
                live.start_soon(self._measure_live, new, accepts, watch)
                for gateway in self.gateways:
                    live.start_soon(self._measure_http, gateway, watch)
            settled = await settle(self.servers, other_than)
            self.figures.times += settled is not new
            if mend is not None:
                await mend()

    async def _measure_live(self, new: Node, accepts: float, watch: Stopwatch) -> None:
        """Every client receives something that is added to the new primary itself.

        Several probes are added: a gap may stand for the first ones.
        """
        first = self.probes + 1
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._add_probes, new)
            await until(lambda: all(c.last_probe >= first for c in self.clients), _STUCK)
            nursery.cancel_scope.cancel()
        elapsed = max(client.first_since(first) for client in self.clients) - accepts
        self.figures.live_after.append(Took(elapsed, elapsed - watch.taken))

    async def _add_probes(self, new: Node) -> None:
        while True:
            self.probes += 1
            probe = json.dumps({"probe": self.probes, **EVENT})
            await trio.to_thread.run_sync(new.ask, "XADD", STREAM, "*", "data", probe)
            await trio.sleep(_PROBE_EVERY)

    async def _measure_publisher(self, accepts: float) -> None:
        await until(lambda: self.backend.confirmed_at > accepts, _STUCK)
        self.figures.published_after.append(self.backend.confirmed_at - accepts)

    async def _measure_http(self, gateway: GatewayProcess, watch: Stopwatch) -> None:
        """When the process said that it is ready, and made a ticket, and went on to do so."""
        services = Services(gateway.port)
        ready = ticket = never = Took(math.inf, math.inf)
        while watch.elapsed < self.watched or never in {ready, ticket}:
            is_ready = await _is_ready(gateway)
            ready = min(ready, Took(watch.elapsed, watch.net)) if is_ready else never
            has_ticket = await services.try_ticket() is not None
            ticket = min(ticket, Took(watch.elapsed, watch.net)) if has_ticket else never
            assert watch.net < _STUCK, "not ready, or no ticket"
            await trio.sleep(0.05)
        self.figures.ready_after.append(ready)
        self.figures.tickets_after.append(ticket)


async def settle(servers: RedisSet, other_than: Node | None) -> Node:
    """Wait until the servers agree on a primary of the events other than that one.

    It may be another than the first that took writes: on a busy machine, Sentinels take that one
    for dead, too, and choose again.
    """
    found: list[Node] = []

    async def agree() -> bool:
        with suppress(NotRunning):
            found.append(await trio.to_thread.run_sync(servers.primary, STREAM))
        return bool(found) and found[-1] is not other_than

    await until(agree, _STUCK)
    return found[-1]


Disturb = Callable[[Stage], Awaitable[None]]
OpenServers = Callable[..., AbstractContextManager[RedisSet]]


async def run(
    what: str,
    open_servers: OpenServers,
    disturb: Disturb,
    *,
    times: int,
    clients: int,
    confirm: Confirm = 0,
    gateways: int = 2,
    rate: float = 200,
    relayed: bool = False,
    watched: float = LIVE_AGAIN,
) -> Figures:
    """Disturb the servers so many times under load, and check everything after each.

    With ``relayed``, each server has a relay in front of it, so that the network can split. HTTP is
    asked for so many seconds after each failover.
    """
    figures = Figures(what, confirm, clients)
    async with (
        _servers(open_servers, relayed) as (servers, network),
        _gateways(servers, gateways) as fleet,
        trio.open_nursery() as nursery,
    ):
        crowd = _crowd([gateway.port for gateway in fleet], clients)
        for client in crowd:
            nursery.start_soon(client.run)
        with trio.fail_after(_STUCK):
            for client in crowd:
                await client.ready.wait()
        backend = Backend(servers.url, rate, confirm)
        nursery.start_soon(backend.run)
        stage = Stage(servers, fleet, crowd, backend, network, figures, watched)
        try:
            await stage.progress()
            for n in range(times):
                if n:
                    await stage.healthy()
                await disturb(stage)
                await stage.progress()
                for gateway in fleet:
                    await Services(gateway.port).check(servers)
        finally:
            backend.stop()
        await trio.sleep(0.5)
        with trio.move_on_after(_LATE):  # what is lost never comes, and is counted
            while not all(client.seen[-1] == backend.published for client in crowd):
                await trio.sleep(0.05)
        figures.count(crowd, backend)
        for gateway in fleet:
            _check_process(gateway, figures)
        nursery.cancel_scope.cancel()
    return figures


@asynccontextmanager
async def _servers(
    open_servers: OpenServers, relayed: bool
) -> AsyncIterator[tuple[RedisSet, Network]]:
    async with trio.open_nursery() as nursery:
        network = Network(nursery)
        front: dict[str, Any] = {"front": network.front} if relayed else {}
        opened = open_servers(appendonly="yes", **front)
        servers = await trio.to_thread.run_sync(opened.__enter__)
        try:
            yield servers, network
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(opened.__exit__, None, None, None)
            nursery.cancel_scope.cancel()


@asynccontextmanager
async def _gateways(servers: RedisSet, number: int) -> AsyncIterator[Sequence[GatewayProcess]]:
    with tempfile.TemporaryDirectory() as folder:
        fleet = [GatewayProcess(servers.url, Path(folder), **_SETTINGS) for _ in range(number)]
        try:
            async with trio.open_nursery() as nursery:
                for gateway in fleet:
                    nursery.start_soon(gateway.start)
            for gateway in fleet:
                await until(partial(_is_ready, gateway), _STUCK)
            yield fleet
        finally:
            for gateway in fleet:
                gateway.kill()


async def _is_ready(gateway: GatewayProcess) -> bool:
    return (await http(gateway.port, "/ws/health/ready")).status == 200


def _crowd(ports: list[int], number: int) -> list[Watcher]:
    """Three of four stay; the others come and go, at any gateway, and resume."""
    crowd = []
    for n, path in enumerate(paths(number)):
        first, *others = [*ports[n % len(ports) :], *ports[: n % len(ports)]]
        stays = n % 4 > 0
        patience = math.inf if stays else 1 + n / number
        crowd.append(Watcher(first, path, patience, [] if stays else others))
    return crowd


def _check_process(gateway: GatewayProcess, figures: Figures) -> None:
    """It still runs, without a traceback, and its log is short."""
    assert gateway.process is not None
    log = gateway.log.read_text()
    assert gateway.process.poll() is None, log
    assert "Traceback" not in log, log
    assert '"critical"' not in log, log
    figures.log_lines = max(figures.log_lines, len(log.splitlines()))
