"""The streams source in a Cluster: each stream is read on a connection to the node that has it.

One XREAD cannot name streams of different slots, even if one node has them all. So each stream has
a reader of its own, and a node that is gone stops those of its own streams alone.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import NoReturn

import structlog
import trio

from ..core.event_ids import START, entry_id, tag
from ..core.exception_groups import first_leaf
from ..core.resilience import SOON, Backoff, Breaker
from ..core.slots import slot_of
from ..runtime.source import Sink
from ..runtime.supervision import ConnectionLost
from ..runtime.throttled_log import ThrottledLog
from .streams import Streams
from .topology import Topology

log = structlog.get_logger()


class ClusterStreams:
    """Reads each stream as :class:`.Streams` does, each on its own.

    The breaker is that of all: it counts what was lost since all of them were last being read.
    """

    def __init__(
        self,
        topology: Topology,
        breaker: Breaker,
        on_reading: Callable[[str], None] = lambda name: None,
        on_lost: Callable[[str], None] = lambda name: None,
    ) -> None:
        """``on_reading`` is called when a stream is read on a new connection, ``on_lost`` when its
        connection is lost.
        """
        self._topology = topology
        self._on_reading = on_reading
        self._on_lost = on_lost
        self._breaker = breaker
        self._followed: dict[str, None] = {}  # in order
        self._changed = trio.lowlevel.ParkingLot()
        self._parts: dict[str, _Part] = {}
        self._lost: set[str] = set()  # what was being read, or should be, and is not now
        self._gaps_before = 0  # of streams that are not followed any more
        self._throttled_log = ThrottledLog(log)
        self._is_running = False

    @property
    def connected(self) -> bool:
        """Whether the Cluster answers: what can't be read is :attr:`unreadable`."""
        return self._is_running and self._topology.is_known

    @property
    def gaps(self) -> int:
        """The number of gaps so far."""
        return self._gaps_before + sum(part.streams.gaps for part in self._parts.values())

    @property
    def cursors(self) -> Mapping[str, str]:
        """The id of the last entry read, by stream; ``0-0`` before a stream is begun."""
        parts = self._parts
        return {
            name: parts[name].streams.cursors[name] if name in parts else entry_id(START)
            for name in self._followed
        }

    @property
    def unreadable(self) -> Collection[str]:
        """The streams that are followed and can't be read at present."""
        return [
            name
            for name, part in self._parts.items()
            if name in self._followed and (name in self._lost or part.streams.unreadable)
        ]

    def follow(self, shards: Collection[str]) -> None:
        """Read these streams from now on, and no other. Returns at once."""
        self._followed = dict.fromkeys(shards)
        self._changed.unpark_all()

    async def run(self, sink: Sink) -> NoReturn:
        """Read; return only when cancelled. The loss of a connection costs its stream alone."""
        try:
            async with trio.open_nursery() as nursery:
                await self._topology.current()
                self._is_running = True
                for part in self._parts.values():
                    part.start(nursery, sink)
                while True:
                    for name in self._followed.keys() - self._parts.keys():
                        part = self._parts[name] = _Part(
                            name, self._topology, partial(self._note_lost, name),
                            partial(self._note_reading, name),
                        )  # fmt: skip
                        part.start(nursery, sink)
                    if left := self._parts.keys() - self._followed.keys():
                        await self._give_up(left.pop(), sink)
                    else:
                        await self._changed.park()
        finally:
            self._is_running = False

    async def _give_up(self, name: str, sink: Sink) -> None:
        part = self._parts[name]
        await part.stop()
        await sink.settle()
        del self._parts[name]
        self._note_reading(name)
        self._gaps_before += part.streams.gaps
        if part.streams.has_begun(name):
            sink.forget(tag(name))

    def _note_lost(self, name: str, error: BaseException) -> None:
        self._breaker.failed(trio.current_time(), soon=True)
        if name not in self._lost:
            self._on_lost(name)
            self._lost.add(name)
            self._throttled_log.warning(
                "stream lost", kind="stream lost", stream=name, error=str(error)
            )

    def _note_reading(self, name: str) -> None:
        self._on_reading(name)
        was_lost = name in self._lost
        self._lost.discard(name)
        if not self._lost:
            self._breaker.succeeded()
            if was_lost:
                log.info("reading", source="stream", streams=len(self._parts))


class _Part:
    """One stream, read from the node that has it, again and again."""

    def __init__(
        self,
        name: str,
        topology: Topology,
        on_lost: Callable[[BaseException], None],
        on_reading: Callable[[], None],
    ) -> None:
        self.streams = Streams(topology, on_reading=self._note_reading, slot=slot_of(name))
        self.streams.follow([name])
        self._topology = topology
        self._on_lost = on_lost
        self._on_reading = on_reading
        self._failures = 0  # in a row
        self._scope = trio.CancelScope()
        self._ended = trio.Event()

    def _note_reading(self) -> None:
        self._failures = 0
        self._on_reading()

    def start(self, nursery: trio.Nursery, sink: Sink) -> None:
        """Start to read in this nursery, until :meth:`stop`."""
        self._scope, self._ended = trio.CancelScope(), trio.Event()
        nursery.start_soon(self._run, sink)

    async def _run(self, sink: Sink) -> None:
        backoff = Backoff(most=SOON)
        try:
            with self._scope:
                while True:
                    error: BaseException = ConnectionLost("ended")
                    try:
                        await self.streams.run(sink)
                    except* ConnectionLost as group:
                        error = first_leaf(group)
                    self._on_lost(error)
                    with trio.move_on_after(backoff.after(self._failures)):
                        await self._topology.wait_changed()
                    self._failures += 1
        finally:
            self._ended.set()

    async def stop(self) -> None:
        """Stop to read."""
        self._scope.cancel()
        await self._ended.wait()
