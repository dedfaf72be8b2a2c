"""Commands to Redis: redis-py under trio-asyncio, behind a breaker."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, TypeVar

import redis.asyncio
import structlog
import trio
import trio_asyncio
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import InvalidResponse, RedisError

from ..core.resilience import Breaker, State
from ..redis_url import Address

log = structlog.get_logger()
T = TypeVar("T")

TIMEOUT: Final = 2.0  # seconds for one command
# By redis-py and its parser, beside its own errors.
_WHAT_JUNK_RAISES: Final = (
    AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
)  # fmt: skip


class Unavailable(Exception):  # noqa: N818 - an outcome
    """Redis does not answer, or has not for a while; nothing was learnt."""


class Commands:
    """The few commands that the gateway gives; each raises :exc:`Unavailable` in bounded time.

    What writes has a breaker of its own: a Redis that is full, or a replica, refuses that and
    answers all else, and who brings a token must not suffer for who brings a ticket.
    """

    def __init__(self, redis: Redis, reads: Breaker, writes: Breaker, loop: Any) -> None:
        self._redis = redis
        self._loop = loop  # not the current one in tasks that others started
        self._reads = reads
        self._writes = writes

    async def check(self, seconds: float) -> None:
        """Raise :exc:`Unavailable` unless Redis answers, and would take a ticket."""
        deadline = trio.current_time() + seconds
        await self._run(self._reads, lambda redis: redis.ping(), bool, seconds=seconds)
        await self._run(
            self._writes,
            lambda redis: redis.set("gateway:ticket:check", "", xx=True),  # never there: no change
            _is_true_or_none,
            seconds=max(0.0, deadline - trio.current_time()),
        )

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        def fits(reply: Any) -> bool:
            return (
                isinstance(reply, list) and len(reply) == len(keys) and all(map(_is_value, reply))
            )

        found: list[bytes | None] = await self._run(
            self._reads, lambda redis: redis.mget(keys), fits
        )
        return found

    async def set_for(self, key: str, value: str, seconds: int) -> None:
        await self._run(self._writes, lambda redis: redis.set(key, value, ex=seconds), bool)

    async def getdel(self, key: str) -> bytes | None:
        # Not again if its answer is lost: what was there is gone then, and None would be a lie.
        found: bytes | None = await self._run(
            self._writes, lambda redis: redis.getdel(key), _is_value, again=False
        )
        return found

    async def publish(self, channel: str, payload: bytes) -> None:
        await self._run(
            self._writes, lambda redis: redis.publish(channel, payload), _is_count, again=False
        )

    async def claim(self, key: str, seconds: int) -> bool:
        """Whether we are the first to name this key in so many seconds."""
        first = await self._run(
            self._writes,
            lambda redis: redis.set(key, "1", ex=seconds, nx=True),
            _is_true_or_none,
            again=False,  # or we might come second to ourselves
        )
        return bool(first)

    async def add(self, stream: str, fields: dict[str, str | bytes], max_length: int) -> None:
        """Add an entry to a stream that is kept at about that length."""
        entry: Any = fields
        await self._run(
            self._writes,
            lambda redis: redis.xadd(stream, entry, maxlen=max_length),
            _is_value,
            again=False,
        )

    async def _run(
        self,
        breaker: Breaker,
        give: Callable[[Redis], Awaitable[Any]],
        fits: Callable[[Any], bool],
        *,
        seconds: float = TIMEOUT,
        again: bool = True,
    ) -> Any:
        """``fits`` says whether a reply can be the answer; ``again``, whether the command may be
        given twice.
        """
        if not breaker.try_now(trio.current_time()):
            raise Unavailable("breaker is open")

        async def command() -> Any:
            try:
                try:
                    reply = await give(self._redis)
                except NotConnected:
                    # A pooled connection may be one that a restarted Redis has forgotten.
                    if not again:
                        raise
                    reply = await give(self._redis)
                if fits(reply):
                    return reply
            except _WHAT_JUNK_RAISES:
                pass
            # Junk, or the answer to another question: then what comes next may be that, too.
            await self._redis.connection_pool.disconnect()
            raise InvalidResponse

        reply: Any = None
        try:
            # redis-py throws away a connection whose command is cancelled, so its reply can't
            # become the next caller's.
            with trio.move_on_after(seconds) as scope:
                reply = await trio_asyncio.aio_as_trio(command, loop=self._loop)()
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer in {seconds:g} s")
        except (RedisError, OSError) as error:
            was = breaker.state
            breaker.failed(trio.current_time())
            if was is not State.OPEN and breaker.state is State.OPEN:
                name = "commands" if breaker is self._reads else "writes"
                log.error("breaker opened", source=name, error=type(error).__name__)
            raise Unavailable(type(error).__name__) from None
        except BaseException:
            breaker.abandoned(trio.current_time())
            raise
        breaker.succeeded()
        return reply


def _is_count(reply: Any) -> bool:
    return isinstance(reply, int)


def _is_value(reply: Any) -> bool:
    return reply is None or isinstance(reply, bytes)


def _is_true_or_none(reply: Any) -> bool:
    return reply is None or reply is True


@asynccontextmanager
async def open_commands(
    url: str, reads: Breaker, writes: Breaker, *, max_connections: int
) -> AsyncIterator[Commands]:
    """A pool of connections to Redis; none is opened before it is needed."""
    async with trio_asyncio.open_loop() as loop:
        pool = BlockingConnectionPool(
            **Address.from_url(url).pool_options(redis.asyncio),
            protocol=2,  # RESP3 begins with HELLO, which some proxies do not know
            max_connections=max_connections,
            timeout=TIMEOUT,
            socket_connect_timeout=TIMEOUT,
            socket_timeout=TIMEOUT,
            retry=Retry(NoBackoff(), 0),  # it does not know which commands may be given twice
        )
        try:
            yield Commands(Redis(connection_pool=pool), reads, writes, loop)
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + TIMEOUT):
                await trio_asyncio.aio_as_trio(pool.disconnect)()
