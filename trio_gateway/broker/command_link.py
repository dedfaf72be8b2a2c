"""A link for commands: one connection of its own, for one command after the other.

Through redis-py and the asyncio loop a command costs several times as much. That matters where
every client that connects waits for one.
"""

from collections.abc import Sequence
from typing import Any, Final, NoReturn

import trio

from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost
from .commands import Unavailable
from .connection import RedisConnection, no_error, open_redis
from .topology import Topology

_RETRY: Final = 0.5  # seconds from a connection that could not be opened to the next try


class CommandLink:
    """Sends commands to the primary, one at a time; in a Cluster to that of a slot."""

    def __init__(self, topology: Topology, slot: int | None = None) -> None:
        assert slot is not None or not topology.is_cluster
        self._topology = topology
        self._slot = slot
        self._redis: RedisConnection | None = None
        self._scope = trio.CancelScope()  # of the connection
        self._opened = trio.lowlevel.ParkingLot()

    async def run(self) -> NoReturn:
        """Keep a connection open; returns only when cancelled."""
        while True:
            server = None
            try:
                server = await self._topology.primary(self._slot or 0)
                async with open_redis(server) as redis:
                    await self._keep(redis, server)
            except ConnectionLost:
                if server is not None:
                    self._topology.suspect(server)
                await trio.sleep(_RETRY)

    async def _keep(self, redis: RedisConnection, server: RedisAddress) -> None:
        """Offer a connection until it is dropped, or another server is the primary."""
        self._redis, self._scope = redis, trio.CancelScope()
        self._opened.unpark_all()
        try:
            with self._scope:
                await self._topology.wait_left(server, self._slot)
        finally:
            self._redis = None

    @property
    def is_open(self) -> bool:
        """Whether a command would be sent at once."""
        return self._redis is not None

    def reconnect(self) -> None:
        """Use another connection: this one leads to a server that is not the primary."""
        self._redis = None
        self._scope.cancel()

    async def evaluate(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, seconds: float
    ) -> Any:
        """Run a script and return its reply, see :meth:`ask`."""
        return await self.ask("EVAL", script, len(keys), *keys, *arguments, seconds=seconds)

    async def ask(self, *words: str | bytes | int, seconds: float) -> Any:
        """Send a command and return its reply; it may run twice, if the first answer is lost.

        Raises :exc:`Unavailable`, after ``seconds`` at the latest.
        """
        problem, is_done = "no answer in time", False
        try:
            with trio.move_on_after(seconds):
                for _ in range(2):  # the connection may have been lost since the last command
                    while (redis := self._redis) is None:
                        await self._opened.park()
                    try:
                        reply = await redis.ask(*words)
                        is_done = True
                        return no_error(reply, words[0])
                    except ConnectionLost as lost:
                        problem, is_done = str(lost), False
                        self._drop()
        finally:
            if not is_done:
                self._drop()
        raise Unavailable(problem)

    def _drop(self) -> None:
        """Open another connection: replies of this one may belong to an earlier command."""
        self.reconnect()
        self._topology.suspect_all()
