"""The streams source: every process reads the entries of its streams from its own cursors.

It reads with plain XREAD, all streams in one command. A blocked XREAD cannot be given more streams,
and to unblock it takes a right that few users have. So when more streams are followed, a second
connection is opened: on it the new streams are begun, while the first one is read on; then it
takes over, and the first one is closed.
"""

from collections.abc import Callable, Collection, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import replace
from functools import partial
from typing import NoReturn, cast

import structlog
import trio

from ..core.clock_offset import ClockOffset
from ..core.event_ids import START, Stream, entry_id
from ..core.exception_groups import first_leaf
from ..core.slots import read_node
from ..redis_url import RedisAddress
from ..runtime.source import Sink
from ..runtime.supervision import ConnectionLost, Demoted
from .connection import Redirected, RedisConnection, open_redis, raise_if_replica
from .probe import Probe
from .stream_cursor import StreamCursor
from .stream_reader import BLOCK, REPLY_TIMEOUT, StreamReader
from .stream_replies import read_time
from .topology import Topology
from .unreadable import Unreadable

log = structlog.get_logger()


class Streams:
    """Reads streams from their end, and after a lost connection from where it was.

    A stream that is followed for the first time is read from its past on. ``on_reading`` is called
    when a new connection works, ``on_lost`` when it is lost, ``on_demoted`` when the server at the
    other end of one that was in use is not the primary any more. ``ranks`` and ``old_streams`` are
    those of :class:`.core.shards.Sharding`. ``probe`` is published every two seconds. In a Cluster
    all streams are in this ``slot``.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        on_reading: Callable[[], None],
        slot: int | None = None,
        probe: Probe | None = None,
        ranks: Mapping[Stream, int] | None = None,
        old_streams: Collection[Stream] = (),
        on_demoted: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        self._topology = topology
        self._slot = slot or 0
        self._is_in_cluster = slot is not None
        self._asking: RedisAddress | None = None  # it is about to get the slot
        self._probe = probe
        self._on_reading = on_reading
        self._ranks = ranks or {}
        self._old_streams = old_streams
        self._on_demoted = on_demoted
        self._on_lost = on_lost
        self._followed: dict[str, None] = {}  # in order
        self._changed = trio.lowlevel.ParkingLot()
        self._by_name: dict[str, StreamCursor] = {}  # of the streams that have been begun
        self._unreadable = Unreadable()
        self._looked_around_at = 0.0
        self._clock: ClockOffset | None = None  # of the server, if it tells the time
        self._connection_scope = trio.CancelScope()
        self.connected = False
        self.gaps = 0

    @property
    def cursors(self) -> Mapping[str, str]:
        """The id of the last entry read, by stream; ``0-0`` before a stream is begun."""
        return {
            name: self._by_name[name].entry_id if name in self._by_name else entry_id(START)
            for name in self._followed
        }

    @property
    def unreadable(self) -> Collection[str]:
        """The streams that are followed and can't be read, though Redis answers."""
        return tuple(name for name in self._unreadable if name in self._followed)

    def follow(self, shards: Collection[str]) -> None:
        """Read these streams from now on, and no other. Returns at once."""
        self._followed = dict.fromkeys(shards)
        self._changed.unpark_all()

    async def run(self, sink: Sink) -> NoReturn:
        """Read until the connection is :exc:`ConnectionLost`."""
        asking, self._asking = self._asking, None
        server = asking or await self._topology.primary(self._slot)
        self._clock = ClockOffset()
        try:
            async with trio.open_nursery() as nursery:
                if asking is None:
                    nursery.start_soon(self._leave, server)
                open_here = partial(
                    open_redis, server, any_role=self._is_in_cluster, asking=asking is not None
                )
                reader: StreamReader | None = None
                while True:
                    reader = await nursery.start(self._read_on, open_here, sink, reader)
                    while not self._to_begin():
                        await self._changed.park()
        except* ConnectionLost as lost:
            self._note(server, lost)
            raise
        finally:
            if self.connected:
                self._on_lost()
            self.connected = False
            self._connection_scope = trio.CancelScope()

    def has_begun(self, name: str) -> bool:
        """Whether the sink has been given this stream."""
        return name in self._by_name

    def reconnect(self) -> None:
        """Connect again: another connection leads to another Redis."""
        if self.connected:
            self._connection_scope.cancel()

    async def _leave(self, server: RedisAddress) -> None:
        """Lose the connection when another server is the primary."""
        with self._connection_scope:
            await self._topology.wait_left(server, self._slot)
        raise Demoted("another server is the primary")

    def _note(self, server: RedisAddress, lost: BaseExceptionGroup[ConnectionLost]) -> None:
        """Learn from a connection that was lost which server to connect to."""
        redirected, _ = lost.split(Redirected)
        if redirected is not None:
            redirection = cast(Redirected, first_leaf(redirected))
            host, port = read_node(redirection.place, server.host)
            if redirection.kind == "ASK":
                self._asking = replace(server, host=host, port=port)
            else:
                self._topology.moved(redirection.slot, (host, port))
            return
        self._topology.suspect(server)
        # The other connections were made when the server was the primary, too.
        if self.connected and lost.subgroup(Demoted) is not None:
            self._on_demoted()

    async def _read_on(
        self,
        open_here: Callable[[], AbstractAsyncContextManager[RedisConnection]],
        sink: Sink,
        before: StreamReader | None,
        *,
        task_status: trio.TaskStatus[StreamReader],
    ) -> None:
        """Begin what is new, take over from the reader before this one, and read on."""
        async with open_here() as redis:
            reader = StreamReader(
                redis, sink, self._by_name, self._unreadable,
                ranks=self._ranks, old_streams=self._old_streams, on_gap=self._count_gap,
            )  # fmt: skip
            if before is None:
                await reader.check(list(self._by_name.values()), is_new_connection=True)
                await reader.retry_unreadable()
            begun = self._to_begin()
            await reader.look_ahead(begun)
            for name in begun:
                await reader.begin(name)
            if before is not None:
                readable = {name for name in self._by_name if name not in self._unreadable}
                if readable <= set(before.reading):  # it was not waiting for news
                    task_status.started(before)
                    return
                await before.stop()
                # It may have given some up since this one began.
                known = [cursor for name, cursor in self._by_name.items() if name not in begun]
                await reader.check(known, is_new_connection=True)
            if self._by_name:
                # Only a successful read proves that the user has the right to read.
                await reader.read(block=False)
            if before is None:
                self.connected = True
                self._on_reading()
                if not self._is_in_cluster:
                    log.info("reading", source="stream", cursors=self.cursors)
                self._looked_around_at = trio.current_time()
            task_status.started(reader)
            await reader.run_until_stopped(lambda: self._read(reader, redis, sink))

    async def _read(self, reader: StreamReader, redis: RedisConnection, sink: Sink) -> None:
        for name in [name for name in self._unreadable if name not in self._followed]:
            self._unreadable.forget(name)
        if self._by_name.keys() - self._followed.keys():
            await sink.settle()
            for name in self._by_name.keys() - self._followed.keys():
                sink.forget(self._by_name.pop(name).stream)
        if self._by_name:
            await reader.read()
        else:
            await reader.idle()
        if not reader.stopping:  # else a reply may be under way
            await self._look_around(reader, redis, sink)

    def _to_begin(self) -> list[str]:
        known = self._by_name.keys()
        return [n for n in self._followed if n not in known and n not in self._unreadable]

    async def _look_around(self, reader: StreamReader, redis: RedisConnection, sink: Sink) -> None:
        """A connection can outlive its server's time as the primary; errors can be over."""
        now = trio.current_time()
        if now - self._looked_around_at >= BLOCK:
            self._looked_around_at = now
            probe = self._probe if self._probe is not None and self._probe.is_wanted else None
            commands = [("HELLO",), *((probe.next_command(),) if probe is not None else ())]
            if self._clock is not None:
                commands.append(("TIME",))
            role, *replies = await redis.ask_all(commands, timeout=REPLY_TIMEOUT)
            now = trio.current_time()
            if not self._is_in_cluster:  # there, a replica answers XREAD with MOVED
                raise_if_replica(role)
            if probe is not None:
                probe.published(replies[0], now)
            if self._clock is not None:
                self._note_time(self._clock, read_time(replies[-1]), now, sink)
            if self._unreadable:
                await reader.retry_unreadable()
                if self._to_begin():
                    self._changed.unpark_all()

    def _note_time(self, clock: ClockOffset, there: float | None, now: float, sink: Sink) -> None:
        if there is None:  # an ACL would log each time that we ask
            self._clock = None
        else:
            streams = [cursor.stream for cursor in self._by_name.values()]
            sink.set_clock(streams, clock.note(there - now, now))

    def _count_gap(self) -> None:
        self.gaps += 1
