"""A source of durable events with its servers, a sink that notes what it gets, and a backend."""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from functools import partial

import redis
import trio

from trio_gateway.broker.cluster_streams import ClusterStreams
from trio_gateway.broker.streams import Streams
from trio_gateway.broker.topologies import make_topology
from trio_gateway.broker.topology_watch import watch
from trio_gateway.core.event_ids import Position, Stream, entry_id, tag
from trio_gateway.core.resilience import Backoff, Breaker
from trio_gateway.redis_sets.redis_set import RedisSet
from trio_gateway.redis_url import RedisKind, RedisUrl
from trio_gateway.runtime.source import Entry, Lost, Past, PastLimits, Source
from trio_gateway.runtime.supervision import keep_running

from .gateways import until
from .redis_server import RedisServer


class Recorder:
    """A sink that notes what it gets, and checks the order of the calls."""

    def __init__(self) -> None:
        self.pasts: dict[str, Past] = {}
        self.live: defaultdict[str, list[Position]] = defaultdict(list)
        self.gaps: list[Lost] = []
        self.gaps_told = 0
        self.forgotten: list[Stream] = []
        self.taken = 0
        self.clocks: dict[Stream, float] = {}
        self.accepts = trio.Event()
        self.accepts.set()
        self.most_past = 100_000
        self.ahead: PastLimits | None = None
        self.looked_at: list[tuple[str, list[str]]] = []
        self.begun_before: list[int] = []  # the number of shards, at each look

    def past_limits(self) -> PastLimits:
        return PastLimits(self.most_past, 10**9, 0)

    def look_ahead_limits(self) -> PastLimits | None:
        return self.ahead

    async def look_ahead(self, stream: Stream, name: str, entries: Sequence[Entry]) -> None:
        await trio.lowlevel.checkpoint()
        self.looked_at.append((name, [entry_id(each.position) for each in entries]))
        self.begun_before.append(len(self.pasts))

    async def begin(self, stream: Stream, name: str, past: Past, ahead: float | None) -> None:
        assert name not in self.pasts
        await trio.lowlevel.checkpoint()
        self.pasts[name] = past
        self.live[name] = []

    async def take(
        self,
        stream: Stream,
        name: str,
        entries: Sequence[Entry],
        passed: Callable[[Sequence[Entry]], None],
    ) -> None:
        assert name in self.pasts
        for entry in entries:
            await self.accepts.wait()
            self.live[name].append(entry.position)
            self.taken += 1
            passed([entry])

    async def advance(self, stream: Stream, position: Position) -> None:
        await trio.lowlevel.checkpoint()

    async def gap(self, lost: Sequence[Lost]) -> None:
        assert {each.stream for each in lost} <= set(map(tag, self.pasts))
        self.gaps += lost
        self.gaps_told += 1
        await trio.lowlevel.checkpoint()

    def set_clock(self, streams: Iterable[Stream], ahead: float) -> None:
        self.clocks |= dict.fromkeys(streams, ahead)

    async def settle(self) -> None:
        await trio.lowlevel.checkpoint()

    def forget(self, stream: Stream) -> None:
        self.forgotten.append(stream)
        del self.pasts[next(name for name in self.pasts if tag(name) == stream)]

    def known(self, name: str) -> list[str]:
        """The ids of all entries of a shard that it has, in the order in which they came."""
        if name not in self.pasts:
            return []
        past = [entry.position for entry in self.pasts[name].entries]
        return [entry_id(position) for position in past + self.live[name]]


class Engine:
    """Servers, a source that reads them, and a sink."""

    def __init__(self, servers: RedisServer | RedisSet) -> None:
        self.servers = servers
        self.url = servers.url if isinstance(servers, RedisSet) else servers.connection_url
        url = RedisUrl.from_url(self.url)
        self.topology = make_topology(url)
        self.sentinels = url.seeds if url.kind is RedisKind.SENTINEL else ()
        self.sink = Recorder()
        self.source: Source
        if url.kind is RedisKind.CLUSTER:
            self.source = ClusterStreams(self.topology, Breaker(1000, 30))
        else:
            self.source = Streams(self.topology, on_reading=lambda: None)
        self.added: defaultdict[str, list[str]] = defaultdict(list)
        self._clients: dict[int, redis.Redis] = {}  # by port
        self._primaries: dict[str, int] = {}  # ports, by name

    @property
    def ports(self) -> list[int]:
        """Those of the servers with data."""
        servers = self.servers
        return (
            [node.port for node in servers.nodes]
            if isinstance(servers, RedisSet)
            else [servers.port]
        )

    def client(self, port: int) -> "redis.Redis":
        if port not in self._clients:
            self._clients[port] = redis.Redis(port=port)
        return self._clients[port]

    def at(self, name: str) -> "redis.Redis":
        """A client of the primary that has this stream."""
        servers = self.servers
        if not isinstance(servers, RedisSet):
            return self.client(servers.port)
        return self.client(self.port_of(name))

    def port_of(self, name: str) -> int:
        """The port of the primary that has this stream, as it was when it was last asked for."""
        if name not in self._primaries:
            assert isinstance(self.servers, RedisSet)
            self._primaries[name] = self.servers.primary(name).port
        return self._primaries[name]

    def move_to(self, name: str, port: int) -> None:
        """Add to this stream on another server from now on."""
        self._primaries[name] = port

    def failed_over(self) -> None:
        """Look again who the primaries are; connections to the servers are opened again."""
        self._primaries.clear()
        for client in self._clients.values():
            client.connection_pool.disconnect()

    def empty(self) -> None:
        """Delete all data."""
        for port in self.ports:
            if self.client(port).role()[0] == b"master":
                self.client(port).flushall()

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def add(self, name: str, count: int = 1) -> None:
        pipeline = self.at(name).pipeline(transaction=False)
        for _ in range(count):
            pipeline.xadd(name, {"data": "{}"})
        self.added[name] += [entry.decode() for entry in pipeline.execute()]

    async def add_while(self, condition: Callable[[], bool], *names: str) -> None:
        """Add entries to these shards, one after the other, for as long as this holds."""
        while condition():
            for name in names:
                await trio.to_thread.run_sync(self.add, name)

    def has_all(self, *names: str) -> bool:
        return all(self.sink.known(name) == self.added[name] for name in names)

    def kill_connections(self) -> None:
        """Kill those of the source."""
        for port in self.ports:
            for client in self.client(port).client_list():
                if client["name"] == "trio-gateway":
                    self.client(port).client_kill_filter(_id=client["id"])

    def is_reading(self) -> bool:
        """Whether all that can be read is being read."""
        can = self.source.cursors.keys() - set(self.source.unreadable)
        return self.source.connected and can <= self.sink.pasts.keys()

    @asynccontextmanager
    async def reading(self, *names: str) -> AsyncIterator[None]:
        self.source.follow(names)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch, self.topology, self.sentinels)
            nursery.start_soon(
                keep_running, "stream", partial(self.source.run, self.sink), Breaker(1000, 30),
                Backoff(0.01, 0.05), None if self.topology.is_fixed else self.topology.wait_changed,
            )  # fmt: skip
            await until(
                lambda: (
                    self.source.connected
                    and len(self.sink.pasts) >= len(names) - len(self.source.unreadable)
                )
            )
            yield
            nursery.cancel_scope.cancel()
