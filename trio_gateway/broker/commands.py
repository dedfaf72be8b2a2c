"""Commands to Redis: redis-py under trio-asyncio, behind a breaker."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import outcome
import redis.asyncio
import structlog
import trio
import trio_asyncio
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as NotConnected
from redis.exceptions import InvalidResponse, RedisError
from redis.exceptions import TimeoutError as TooSlow

from ..core.resilience import Breaker, State
from ..redis_errors import is_wrong_server
from ..redis_url import RedisAddress

log = structlog.get_logger()

TIMEOUT: Final = 2.0  # seconds for one command
# By redis-py and its parser, beside its own errors.
_WHAT_JUNK_RAISES: Final = (
    AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
)  # fmt: skip


_LETTERS: Final = 5, 30.0  # failures in a row, and seconds until the next try
# An XADD that fails ends the script before the key is set.
_ADD_ONCE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
return 1
"""


class Unavailable(Exception):  # noqa: N818 - an outcome
    """Redis does not answer, or has not for a while; nothing was learnt."""


class _Call:
    """A command on its way to the asyncio loop, and what came of it."""

    __slots__ = ("command", "done", "outcome", "scope")

    def __init__(self, command: Callable[[], Awaitable[Any]]) -> None:
        self.command = command
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.outcome: outcome.Outcome[Any] | None = None

    async def run(self, loop: Any) -> None:
        with self.scope:
            self.outcome = await outcome.acapture(trio_asyncio.aio_as_trio(self.command, loop=loop))
            self.done.set()


class Commands:
    """The few commands that the gateway gives; each raises :exc:`Unavailable` in bounded time.

    What writes has a breaker of its own: a Redis that is full, or a replica, refuses that and
    answers all else, and who brings a token must not suffer for who brings a ticket.
    """

    def __init__(self, url: str, reads: Breaker, writes: Breaker, *, max_connections: int) -> None:
        self._redis = Redis(connection_pool=_pool(url, max_connections))
        self._send, self._receive = trio.open_memory_channel[_Call](0)
        self._reads = reads
        self._writes = writes
        # Of dead letters: a stream or a right that only they need must not cost anybody a ticket.
        self._letters = Breaker(*_LETTERS)
        self._connections = 0  # the number of times that they were all thrown away
        self._is_stale = False  # they have to be, before the next command

    async def run(self) -> NoReturn:
        """Run the asyncio loop that redis-py needs; returns only when cancelled.

        A command waits, within its own deadline, until this runs.
        """
        async with trio_asyncio.open_loop() as loop:
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        nursery.start_soon((await self._receive.receive()).run, loop)
            finally:
                with trio.CancelScope(shield=True, deadline=trio.current_time() + TIMEOUT):
                    await trio_asyncio.aio_as_trio(self._redis.connection_pool.disconnect)()

    def reconnect(self) -> None:
        """Connect anew: another link to the same Redis has found that it is no primary."""
        self._is_stale = True

    async def check(self, seconds: float) -> None:
        """Raise :exc:`Unavailable` unless Redis answers, and would take a ticket.

        Anybody can cause a check: that it takes too long opens no breaker.
        """
        deadline = trio.current_time() + seconds
        await self._run(
            self._reads, lambda redis: redis.ping(), bool, seconds=seconds, is_check=True
        )
        await self._run(
            self._writes,
            lambda redis: redis.set("gateway:ticket:check", "", xx=True),  # never there: no change
            _is_true_or_none,
            seconds=max(0.0, deadline - trio.current_time()),
            is_check=True,
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

    async def get(self, key: str) -> bytes | None:
        found: bytes | None = await self._run(self._reads, lambda redis: redis.get(key), _is_value)
        return found

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

    async def add(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """Add an entry to a stream, which is not trimmed by that."""
        entry: Any = fields
        await self._run(
            self._writes, lambda redis: redis.xadd(stream, entry), _is_value, again=False
        )

    async def add_once(
        self,
        key: str,
        seconds: int,
        stream: str,
        fields: dict[str, str | bytes],
        max_length: int,
    ) -> bool:
        """Add an entry to a stream that is kept at about that length, unless that was done under
        this key in so many seconds; whether it was done now.

        In one step: the key is set when the entry is there, so neither a failure in between nor a
        second try loses the entry or adds it twice.
        """
        if self._writes.state is not State.CLOSED:
            raise Unavailable("breaker is open")
        words = [word for pair in fields.items() for word in pair]
        added = await self._run(
            self._letters,
            lambda redis: redis.eval(_ADD_ONCE, 2, key, stream, seconds, max_length, *words),
            _is_count,
        )
        return bool(added)

    async def _run(
        self,
        breaker: Breaker,
        give: Callable[[Redis], Awaitable[Any]],
        fits: Callable[[Any], bool],
        *,
        seconds: float = TIMEOUT,
        again: bool = True,
        is_check: bool = False,
    ) -> Any:
        """``fits`` says whether a reply can be the answer; ``again``, whether the command may be
        given twice where its answer was lost. One that was refused always may.
        """
        if not breaker.try_now(trio.current_time()):
            raise Unavailable("breaker is open")

        async def give_once() -> Any:
            if self._is_stale:
                self._is_stale = False
                await self._throw_away(self._connections)
            connections = self._connections
            try:
                reply = await give(self._redis)
                if fits(reply):
                    return reply
            except _WHAT_JUNK_RAISES:
                pass
            except RedisError as error:
                if is_wrong_server(error):
                    await self._throw_away(connections)
                raise
            if connections != self._connections:
                raise NotConnected("closed meanwhile")
            # Junk, or the answer to another question: then what comes next may be that, too.
            await self._throw_away(connections)
            raise InvalidResponse

        async def command() -> Any:
            try:
                return await give_once()
            except RedisError as error:
                # A pooled connection may lead to a Redis that has restarted, or was demoted.
                lost = again and isinstance(error, NotConnected)
                if not (lost or is_wrong_server(error)):
                    raise
            return await give_once()

        reply: Any = None
        try:
            # redis-py throws away a connection whose command is cancelled, so its reply can't
            # become the next caller's.
            with trio.move_on_after(seconds) as scope:
                reply = await self._in_loop(command)
            if scope.cancelled_caught:
                raise TimeoutError(f"no answer in {seconds:g} s")
        except (RedisError, OSError) as error:
            if is_check and isinstance(error, TimeoutError | TooSlow):
                breaker.abandoned(trio.current_time())
                raise Unavailable("no answer in time") from None
            was = breaker.state
            soon = isinstance(error, RedisError) and is_wrong_server(error)
            breaker.failed(trio.current_time(), soon=soon)
            if was is not State.OPEN and breaker.state is State.OPEN:
                names = {self._reads: "commands", self._writes: "writes"}
                name = names.get(breaker, "dead letters")
                log.error("breaker opened", source=name, error=type(error).__name__)
            raise Unavailable(type(error).__name__) from None
        except BaseException:
            breaker.abandoned(trio.current_time())
            raise
        breaker.succeeded()
        return reply

    async def _in_loop(self, command: Callable[[], Awaitable[Any]]) -> Any:
        call = _Call(command)
        await self._send.send(call)
        try:
            await call.done.wait()
        finally:
            call.scope.cancel()
        assert call.outcome is not None
        return call.outcome.unwrap()

    async def _throw_away(self, connections: int) -> None:
        """Close all connections, unless that was done since: the next ones resolve the name anew
        and authenticate again.
        """
        if connections == self._connections:
            self._connections += 1
            await self._redis.connection_pool.disconnect()


def _is_count(reply: Any) -> bool:
    return isinstance(reply, int)


def _is_value(reply: Any) -> bool:
    return reply is None or isinstance(reply, bytes)


def _is_true_or_none(reply: Any) -> bool:
    return reply is None or reply is True


def _pool(url: str, max_connections: int) -> BlockingConnectionPool:
    """A pool of connections to Redis; none is opened before it is needed."""
    return BlockingConnectionPool(
        **RedisAddress.from_url(url).pool_options(redis.asyncio),
        protocol=2,  # RESP3 begins with HELLO, which some proxies do not know
        max_connections=max_connections,
        timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        socket_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),  # it does not know which commands may be given twice
    )
