"""Topology: which Redis server is the primary of a key, now.

A single server always is. The primary of a Sentinel set, or those of a Cluster, are asked for when
they are not known. A caller that finds that a server does not answer, or is not a primary, reports
it with :meth:`Topology.suspect`; the next that needs one asks again.
"""

from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Final

import structlog
import trio

from ..core.slots import Node, SlotMap
from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost

log = structlog.get_logger()

PAUSE: Final = 0.1  # seconds at least from one look to the next

#: Asks the servers, of which those of the map are known; raises :exc:`ConnectionLost`.
Look = Callable[[SlotMap], Awaitable[SlotMap]]


class Topology:
    """The present :class:`SlotMap`, kept up to date by those who use it.

    ``address`` completes a node with credentials and TLS options.
    """

    def __init__(
        self,
        look: Look,
        address: Callable[[Node], RedisAddress],
        known: SlotMap | None = None,
        *,
        is_cluster: bool = False,
    ) -> None:
        self.is_cluster = is_cluster
        self.is_fixed = known is not None  # nothing ever changes
        self._look = look
        self.address = address
        self._map = known or SlotMap()
        self._told = self._map.primaries  # the primaries that the log has last told of
        self._is_suspect = known is None
        self._lock = trio.Lock()
        self._looks = 0
        self._looked_at = -PAUSE
        self._problem: str | None = None  # of the last look
        self._changed = trio.lowlevel.ParkingLot()
        self._suspected = trio.lowlevel.ParkingLot()
        self.suspicions = 0  # so far

    @property
    def is_known(self) -> bool:
        """Whether the last who was asked, if anybody was, has answered."""
        return bool(self._map.ranges) and self._problem is None

    async def primary(self, slot: int = 0) -> RedisAddress:
        """The server that executes commands for the keys of a slot.

        Raises :exc:`ConnectionLost` if no server says which one.
        """
        found = (await self.current()).primary_of(slot)
        if found is None:
            self._is_suspect = True
            raise ConnectionLost(f"slot {slot} has no primary")
        return self.address(found)

    async def primaries(self) -> list[RedisAddress]:
        """All servers that execute commands; only a Cluster has several.

        Raises :exc:`ConnectionLost` as :meth:`primary` does.
        """
        return [self.address(node) for node in (await self.current()).primaries]

    @property
    def known(self) -> SlotMap:
        """The map that was told last, right or not; empty at first."""
        return self._map

    async def current(self) -> SlotMap:
        """The present map, or the last one if nobody answers who knows it: it may be right.

        Raises :exc:`ConnectionLost` if none was ever known.
        """
        if self._is_suspect:
            with suppress(ConnectionLost):
                return await self.look_again()
            if not self._map.ranges:
                raise ConnectionLost(self._problem or "no primary is known")
        return self._map

    async def look_again(self) -> SlotMap:
        """Ask the servers; those who want it at the same time share one answer."""
        before = self._looks
        async with self._lock:
            if self._looks == before:
                await trio.sleep(max(0.0, self._looked_at + PAUSE - trio.current_time()))
                await self._look_once()
            if self._problem is not None:
                raise ConnectionLost(self._problem)
            return self._map

    async def _look_once(self) -> None:
        self._is_suspect = False  # what is suspected from now on is asked for again
        is_over = False
        try:
            found = await self._look(self._map)
        except ConnectionLost as lost:
            self._problem = str(lost)
            is_over = bool(self._map.ranges)  # the last primaries are used, until one is suspected
        else:
            self._problem = None
            self._set(found)
            is_over = True
        finally:
            self._is_suspect |= not is_over
            self._looked_at = trio.current_time()
        self._looks += 1

    def suspect(self, server: RedisAddress) -> None:
        """This server does not answer, or is not a primary: ask before the next command."""
        if any(self.address(node) == server for node in self._map.primaries):
            self.suspect_all()

    def suspect_all(self) -> None:
        """A failover may be under way: ask before the next command."""
        self._is_suspect = True
        self._hint()

    def _hint(self) -> None:
        self.suspicions += 1
        self._suspected.unpark_all()

    def moved(self, slot: int, primary: Node) -> None:
        """A node of the Cluster says that this slot has another primary."""
        if self._map.primary_of(slot) != primary:
            self._map = self._map.moved(slot, primary)
            self._changed.unpark_all()
            self._hint()  # maybe not this slot alone

    async def wait_changed(self) -> None:
        """Wait until a slot gets another primary."""
        await self._changed.park()

    async def wait_suspected(self, since: int) -> None:
        """Wait until there are more :attr:`suspicions` than that."""
        while self.suspicions == since:
            await self._suspected.park()

    async def wait_left(self, server: RedisAddress, slot: int | None) -> None:
        """Wait until the server is not the primary of the slot, or of any if None."""
        while any(self.address(node) == server for node in self._map.primaries_of(slot)):
            await self._changed.park()

    def _set(self, found: SlotMap) -> None:
        before, self._map = self._map, found
        # A primary that a node has named in a redirection is in the map before.
        told, self._told = self._told, found.primaries
        if told and told != self._told:
            log.warning(
                "primary changed", was=_names(told - self._told), now=_names(self._told - told)
            )
        if before.ranges not in ((), found.ranges):
            self._changed.unpark_all()


def _names(nodes: frozenset[Node]) -> str:
    return ", ".join(sorted(f"{host}:{port}" for host, port in nodes)) or "none"


def single(server: RedisAddress) -> Topology:
    """The topology of one server, or of a name that leads to the primary."""
    known = SlotMap.of_one((server.host, server.port))

    async def look(before: SlotMap) -> SlotMap:
        return known

    return Topology(look, lambda node: server, known)
