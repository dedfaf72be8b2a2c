"""Sends commands to the primary of their keys, and follows when another server becomes it."""

import random
from collections.abc import Callable, Sequence
from typing import Any, Final, NoReturn

import trio
from redis.exceptions import AskError, MovedError, RedisError, TryAgainError
from redis.exceptions import ConnectionError as NotConnected

from ..core.slots import SLOTS, SlotMap, read_node, slot_of
from ..redis_errors import is_wrong_server
from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost
from .asyncio_calls import AsyncioCalls
from .pool import Fits, Pool, Send
from .topology import PAUSE, Topology

#: What is raised if a command has no reply.
FAILURES: Final = (RedisError, OSError, ConnectionLost)
_QUICK_TRIES: Final = 3  # to follow redirections; then with a pause before each
_MOST_NAMES: Final = 1000  # to find a key of a node that has few slots


class Primaries:
    """Connections to the primaries of a topology, of which there may be one.

    A command that was refused by a server because it is not a primary is sent again, and so is one
    whose answer was lost, if it may be repeated: to a server that does not fail over once, to
    others until the caller's deadline. Methods raise one of :data:`FAILURES`.
    """

    def __init__(self, topology: Topology, *, max_connections: int, timeout: float) -> None:
        self._topology = topology
        self._is_cluster = topology.is_cluster
        self.fails_over = not topology.is_fixed
        self._max_connections = max_connections  # to each server
        self._timeout = timeout
        self._pools: dict[RedisAddress, Pool] = {}
        self._calls = AsyncioCalls()

    async def run(self, on_change: Callable[[], None]) -> NoReturn:
        """Run the loop that redis-py needs; returns only when cancelled.

        ``on_change`` is called when there is another primary.
        """
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._calls.run, self._close_all, self._timeout)
            while True:
                slots = self._topology.known
                await self._leave_others(slots)
                on_change()
                if slots is self._topology.known:
                    await self._topology.wait_changed()

    def reconnect(self) -> None:
        """Use new connections from now on, and ask who is the primary."""
        self._topology.suspect_all()
        for pool in self._pools.values():
            pool.is_stale = True

    def suspect(self) -> None:
        """Ask who is the primary before the next command: there was no answer in time."""
        self._topology.suspect_all()

    async def execute(
        self, key: str | None, send: Send, fits: Fits, *, again: bool = True, patient: bool = True
    ) -> Any:
        """Send a command for a key, or for none, and return its reply.

        ``again``: it may be repeated if its answer was lost. Not ``patient``: it is sent twice at
        most.
        """
        slot = slot_of(key) if key is not None else random.randrange(SLOTS)  # noqa: S311 - spreads load, keeps no secret
        asking: RedisAddress | None = None
        tries = 0
        while True:
            if (tries := tries + 1) > _QUICK_TRIES:
                await trio.sleep(PAUSE)
            server = asking or await self._topology.primary(slot)
            try:
                return await self._send(server, send, fits, asking=asking is not None)
            except (RedisError, OSError) as error:
                if tries > 1 and not (self.fails_over and patient):
                    raise
                if not self._learn(error, server, slot, again=again):
                    raise
                asking = self._asked(error, server)

    async def mget(self, keys: Sequence[str], fits: Fits) -> list[Any]:
        """Return the value of each key. A Cluster is asked node by node."""
        if not self._is_cluster:
            found: list[Any] = await self.execute(
                None,
                lambda redis: redis.mget(keys),
                lambda reply: (
                    isinstance(reply, list) and len(reply) == len(keys) and all(map(fits, reply))
                ),
            )
            return found
        values: dict[str, Any] = {}
        tries = 0
        while left := set(keys) - values.keys():
            if (tries := tries + 1) > _QUICK_TRIES:
                await trio.sleep(PAUSE)
            groups: dict[RedisAddress, list[str]] = {}
            for key in left:
                groups.setdefault(await self._topology.primary(slot_of(key)), []).append(key)
            problems: list[Exception] = []
            async with trio.open_nursery() as nursery:
                for server, group in groups.items():
                    nursery.start_soon(self._get_group, server, group, fits, values, problems)
            if problems:
                raise problems[0]
        return [values[key] for key in keys]

    async def _get_group(
        self,
        server: RedisAddress,
        keys: list[str],
        fits: Fits,
        values: dict[str, Any],
        problems: list[Exception],
    ) -> None:
        """Add the values of keys of one node, or a problem; neither means: try again."""
        sends: list[Send] = [_get(key) for key in keys]
        pool = self._pool(server)
        try:
            replies = await self._calls.call(lambda: pool.send_all(sends, fits))
            for key, send, reply in zip(keys, sends, replies, strict=True):
                if not isinstance(reply, RedisError):
                    values[key] = reply
                elif isinstance(reply, AskError | TryAgainError):
                    values[key] = await self.execute(key, send, fits)
                elif not self._learn(reply, server, slot_of(key), again=True):
                    raise reply
        except FAILURES as error:
            if isinstance(error, ConnectionLost) or not self._learn(error, server, 0, again=True):
                problems.append(error)

    async def execute_on_one(self, send: Callable[[Any, str], Any], fits: Fits, name: str) -> None:
        """Send a command with a key of each primary; it is enough if one replies.

        The key is ``name`` with a number at its end where there are several primaries.
        """
        keys = await self._key_of_each(name)
        problems: list[Exception] = []
        done = False

        async def send_to(key: str) -> None:
            nonlocal done
            try:
                await self.execute(key, lambda redis: send(redis, key), fits, patient=False)
            except FAILURES as error:
                problems.append(error)
            else:
                done = True
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for key in keys:
                nursery.start_soon(send_to, key)
        if not done:
            raise problems[0]

    async def _key_of_each(self, name: str) -> list[str]:
        if not self._is_cluster:
            return [name]
        slots = await self._topology.current()
        found: dict[Any, str] = {}
        for number in range(_MOST_NAMES):
            key = f"{name}:{number}"
            found.setdefault(slots.primary_of(slot_of(key)), key)
            if len(found) == len(slots.primaries):
                break
        return list(found.values())

    async def _send(self, server: RedisAddress, send: Send, fits: Fits, *, asking: bool) -> Any:
        pool = self._pool(server)
        return await self._calls.call(lambda: pool.send(send, fits, asking=asking))

    def _pool(self, server: RedisAddress) -> Pool:
        if (found := self._pools.get(server)) is None:
            found = Pool(
                server, self._max_connections, self._timeout, follows_moves=self._is_cluster
            )
            self._pools[server] = found
        return found

    def _learn(self, error: Exception, server: RedisAddress, slot: int, *, again: bool) -> bool:
        """Learn who the primary is, or is not; returns whether another try may succeed."""
        if self._is_cluster:
            if isinstance(error, MovedError):
                self._topology.moved(slot, read_node(f"{error.host}:{error.port}", server.host))
            if isinstance(error, AskError | TryAgainError):
                return True
        lost = isinstance(error, NotConnected)
        refused = isinstance(error, RedisError) and is_wrong_server(error)
        if lost or refused:
            self._topology.suspect(server)
        return refused or (lost and again)

    def _asked(self, error: Exception, server: RedisAddress) -> RedisAddress | None:
        """The node to ask instead, once: the slot is being moved to it."""
        if not self._is_cluster or not isinstance(error, AskError) or isinstance(error, MovedError):
            return None
        return self._topology.address(read_node(f"{error.host}:{error.port}", server.host))

    async def _leave_others(self, slots: SlotMap) -> None:
        """Close the connections to servers that are not primaries any more.

        A command that waits for a reply on one of them fails.
        """
        for server in self._pools.keys() - set(map(self._topology.address, slots.primaries)):
            pool = self._pools.pop(server)
            with trio.move_on_after(self._timeout):
                await self._calls.call(pool.close)

    async def _close_all(self) -> None:
        for pool in self._pools.values():
            await pool.close()


def _get(key: str) -> Send:
    return lambda redis: redis.get(key)
