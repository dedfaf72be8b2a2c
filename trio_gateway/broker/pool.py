"""Connections to one Redis server, by redis-py."""

from collections.abc import Awaitable, Callable
from typing import Any, Final

import redis.asyncio
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import InvalidResponse, MovedError, RedisError

from ..redis_errors import is_wrong_server
from ..redis_url import RedisAddress

# What redis-py and its parser raise for an invalid reply, besides their own errors.
_INVALID_REPLY_ERRORS: Final = (
    AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
)  # fmt: skip

#: Sends commands with a client of redis-py, or adds them to one of its pipelines.
Send = Callable[[Any], Any]
#: Whether a reply has the right shape.
Fits = Callable[[Any], bool]


class Pool:
    """Connections to one server; each is opened when it is needed.

    They belong to redis-py's asyncio loop. A node of a Cluster ``follows_moves``: to be refused
    there, because the slot has moved, is not a reason for new connections.
    """

    def __init__(
        self, server: RedisAddress, max_connections: int, timeout: float, *, follows_moves: bool
    ) -> None:
        self._follows_moves = follows_moves
        self._redis = Redis(
            connection_pool=BlockingConnectionPool(
                **server.pool_options(redis.asyncio),
                protocol=2,  # RESP3 begins with HELLO, which some proxies do not know
                max_connections=max_connections,
                timeout=timeout,
                socket_connect_timeout=timeout,
                socket_timeout=timeout,
                retry=Retry(NoBackoff(), 0),  # it does not know which commands may be repeated
            )
        )
        self._generation = 0  # how often all connections were discarded
        self.is_stale = False  # discard them before the next command

    async def send(self, send: Send, fits: Fits, *, asking: bool = False) -> Any:
        """Send a command once and return its reply.

        ``asking``: the slot is being moved to this node of a Cluster, which serves only those who
        say that they know it. Raises :exc:`RedisError` or :exc:`OSError`.
        """
        if not asking:
            return await self._checked(lambda: send(self._redis), fits)

        async def ask() -> Any:
            pipeline = self._redis.pipeline(transaction=False)
            pipeline.execute_command("ASKING")
            send(pipeline)
            return (await pipeline.execute())[1]

        return await self._checked(ask, fits)

    async def send_all(self, sends: list[Send], fits: Fits) -> list[Any]:
        """Send commands at once; an error reply stands in the place of its reply."""

        async def send() -> Any:
            pipeline = self._redis.pipeline(transaction=False)
            for each in sends:
                each(pipeline)
            return await pipeline.execute(raise_on_error=False)

        found: list[Any] = await self._checked(
            send,
            lambda replies: all(isinstance(reply, RedisError) or fits(reply) for reply in replies),
        )
        return found

    async def _checked(self, send: Callable[[], Awaitable[Any]], fits: Fits) -> Any:
        if self.is_stale:
            self.is_stale = False
            await self._discard(self._generation)
        generation = self._generation
        try:
            reply = await send()
            if fits(reply):
                return reply
        except _INVALID_REPLY_ERRORS:
            pass
        except RedisError as error:
            is_move = self._follows_moves and isinstance(error, MovedError)
            if is_wrong_server(error) and not is_move:
                await self._discard(generation)
            raise
        if generation != self._generation:
            raise NotConnected("closed meanwhile")
        # Invalid, or the answer to another command: then the next replies may be, too.
        await self._discard(generation)
        raise InvalidResponse

    async def close(self) -> None:
        """Close all connections, also those in use."""
        await self._discard(self._generation)

    async def _discard(self, generation: int) -> None:
        """Close all connections, unless that was done since this generation.

        The next ones resolve the host name and authenticate again.
        """
        if generation == self._generation:
            self._generation += 1
            await self._redis.connection_pool.disconnect()
