"""Commands to Redis: redis-py under trio-asyncio, behind a breaker."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import structlog
import trio
import trio_asyncio
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError

from ..core.resilience import Breaker, State

log = structlog.get_logger()
T = TypeVar("T")

TIMEOUT: Final = 2.0  # seconds for one command


class Unavailable(Exception):  # noqa: N818 - an outcome
    """Redis does not answer, or has not for a while; nothing was learnt."""


class Commands:
    """The few commands that the gateway gives; each raises :exc:`Unavailable` in bounded time."""

    def __init__(self, redis: Redis, breaker: Breaker, loop: Any) -> None:
        self._redis = redis
        self._loop = loop  # not the current one in tasks that others started
        self._breaker = breaker

    async def ping(self) -> None:
        await self._run(lambda redis: redis.ping())

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        found: list[bytes | None] = await self._run(lambda redis: redis.mget(keys))
        return found

    async def set_for(self, key: str, value: str, seconds: int) -> None:
        await self._run(lambda redis: redis.set(key, value, ex=seconds))

    async def getdel(self, key: str) -> bytes | None:
        found: bytes | None = await self._run(lambda redis: redis.getdel(key))
        return found

    async def claim(self, key: str, seconds: int) -> bool:
        """Whether we are the first to name this key in so many seconds."""
        return bool(await self._run(lambda redis: redis.set(key, "1", ex=seconds, nx=True)))

    async def add(self, stream: str, fields: dict[str, str | bytes], max_length: int) -> None:
        """Add an entry to a stream that is kept at about that length."""
        entry: Any = fields
        await self._run(lambda redis: redis.xadd(stream, entry, maxlen=max_length))

    async def _run(self, give: Callable[[Redis], Awaitable[Any]]) -> Any:
        breaker = self._breaker
        if not breaker.try_now(trio.current_time()):
            raise Unavailable("breaker is open")

        async def command() -> Any:
            return await give(self._redis)

        reply: Any = None
        try:
            # redis-py throws away a connection whose command is cancelled, so its reply can't
            # become the next caller's.
            with trio.move_on_after(TIMEOUT) as scope:
                reply = await trio_asyncio.aio_as_trio(command, loop=self._loop)()
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer in {TIMEOUT:g} s")
        except (RedisError, OSError) as error:
            was = breaker.state
            breaker.failed(trio.current_time())
            if was is not State.OPEN and breaker.state is State.OPEN:
                log.error("breaker opened", source="commands", error=type(error).__name__)
            raise Unavailable(type(error).__name__) from None
        except BaseException:
            breaker.abandoned(trio.current_time())
            raise
        breaker.succeeded()
        return reply


@asynccontextmanager
async def open_commands(
    url: str, breaker: Breaker, *, max_connections: int
) -> AsyncIterator[Commands]:
    """A pool of connections to Redis; none is opened before it is needed."""
    async with trio_asyncio.open_loop() as loop:
        pool = BlockingConnectionPool.from_url(
            url,
            max_connections=max_connections,
            timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            # A pooled connection may be one that a restarted Redis has forgotten.
            retry=Retry(NoBackoff(), 1),
        )
        redis = Redis(connection_pool=pool)
        try:
            yield Commands(redis, breaker, loop)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + TIMEOUT):
                await trio_asyncio.aio_as_trio(pool.disconnect)()
