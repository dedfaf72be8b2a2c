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
# What redis-py and its parser raise for an invalid reply, besides their own errors.
_INVALID_REPLY_ERRORS: Final = (
    AssertionError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
)  # fmt: skip

# Of dead letters, and of scans: failures in a row, seconds until the next try.
_OWN_BREAKER: Final = 5, 30.0
# Entries of a stream, their ids and their fields; an entry that was deleted has none.
Entries = list[tuple[bytes, dict[bytes, bytes] | None]]
# An XADD that fails ends the script before the key is set.
_ADD_ONCE: Final = """
if redis.call('EXISTS', KEYS[1]) == 1 then return 0 end
redis.call('XADD', KEYS[2], 'MAXLEN', '~', ARGV[2], '*', unpack(ARGV, 3))
redis.call('SET', KEYS[1], '1', 'EX', ARGV[1])
return 1
"""


class Unavailable(Exception):  # noqa: N818 - an outcome
    """Redis does not answer, or its breaker is open. It is unknown what the answer would be."""


class _Call:
    """A command on its way to the asyncio loop, and its outcome."""

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
    """The few commands that the gateway sends; each raises :exc:`Unavailable` in bounded time.

    Reads and writes have a breaker each. A Redis that is full, or is a replica, refuses writes
    and answers reads: clients with a token, which needs a read, must not be turned away because
    tickets, which need a write, fail.
    """

    def __init__(self, url: str, reads: Breaker, writes: Breaker, *, max_connections: int) -> None:
        self._redis = Redis(connection_pool=_pool(url, max_connections))
        self._send, self._receive = trio.open_memory_channel[_Call](0)
        self._reads = reads
        self._writes = writes
        # Dead letters and scans have their own: a stream or a right that only they need must not
        # cost anybody a ticket.
        self._dead_letters = Breaker(*_OWN_BREAKER)
        self._scans = Breaker(*_OWN_BREAKER)
        self._generation = 0  # how often all connections were discarded
        self._is_stale = False  # discard them before the next command

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
        """Use new connections: another one has found that the server is not the primary."""
        self._is_stale = True

    async def check(self, seconds: float) -> None:
        """Raise :exc:`Unavailable` unless Redis answers in ``seconds`` and accepts writes.

        Anybody can cause a check, so a slow answer opens no breaker.
        """
        deadline = trio.current_time() + seconds
        await self._run(
            self._reads, lambda redis: redis.ping(), bool, seconds=seconds, is_check=True
        )
        await self._run(
            self._writes,
            lambda redis: redis.set(
                "gateway:ticket:check", "", xx=True
            ),  # the key never exists: no change
            _is_true_or_none,
            seconds=max(0.0, deadline - trio.current_time()),
            is_check=True,
        )

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the value of each key, None for a key that does not exist."""

        def fits(reply: Any) -> bool:
            return (
                isinstance(reply, list) and len(reply) == len(keys) and all(map(_is_value, reply))
            )

        found: list[bytes | None] = await self._run(
            self._reads, lambda redis: redis.mget(keys), fits
        )
        return found

    async def set_for(self, key: str, value: str, seconds: int) -> None:
        """Set a key that expires after ``seconds``."""
        await self._run(self._writes, lambda redis: redis.set(key, value, ex=seconds), bool)

    async def get(self, key: str) -> bytes | None:
        """Return a key's value, or None."""
        found: bytes | None = await self._run(self._reads, lambda redis: redis.get(key), _is_value)
        return found

    async def getdel(self, key: str) -> bytes | None:
        """Return a key's value, or None, and delete the key."""
        # Not repeated if its answer is lost: the key is deleted by then, and None would be wrong.
        found: bytes | None = await self._run(
            self._writes, lambda redis: redis.getdel(key), _is_value, again=False
        )
        return found

    async def publish(self, channel: str, payload: bytes) -> None:
        """Publish a message on a channel."""
        await self._run(
            self._writes, lambda redis: redis.publish(channel, payload), _is_count, again=False
        )

    async def add(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """Add an entry to a stream, without trimming the stream."""
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
        """Add an entry to a stream, unless one was added under ``key`` within ``seconds``.

        Returns whether it was added. The stream is trimmed to about ``max_length`` entries. Key
        and entry are written in one step, so neither a failure nor a second try loses the entry
        or adds it twice.
        """
        if self._writes.state is not State.CLOSED:
            raise Unavailable("breaker is open")
        words = [word for pair in fields.items() for word in pair]
        added = await self._run(
            self._dead_letters,
            lambda redis: redis.eval(_ADD_ONCE, 2, key, stream, seconds, max_length, *words),
            _is_count,
        )
        return bool(added)

    async def read_back(self, stream: str, end: str, count: int) -> Entries:
        """Return the last entries of a stream up to this id, the newest first."""
        found: Entries = await self._run(
            self._scans, lambda redis: redis.xrevrange(stream, end, "-", count), _is_entries
        )
        return found

    async def read_on(self, stream: str, after: str, count: int) -> Entries:
        """Return the first entries of a stream after this id, the oldest first."""
        ids: Any = {stream: after}
        # XREAD and not XRANGE: the user has the right to it.
        found = await self._run(
            self._scans,
            lambda redis: redis.xread(ids, count),
            lambda reply: (
                reply == []
                or (
                    (isinstance(reply, list) and len(reply) == 1 and len(reply[0]) == 2)
                    and _is_entries(reply[0][1])
                )
            ),
        )
        entries: Entries = found[0][1] if found else []
        return entries

    async def _run(
        self,
        breaker: Breaker,
        send: Callable[[Redis], Awaitable[Any]],
        fits: Callable[[Any], bool],
        *,
        seconds: float = TIMEOUT,
        again: bool = True,
        is_check: bool = False,
    ) -> Any:
        """Send a command within ``seconds``, at most twice, and return its reply.

        ``fits`` says whether a reply has the right shape. ``again`` says whether the command may
        be repeated when its answer was lost; one that was refused may be in any case.
        """
        if not breaker.try_now(trio.current_time()):
            raise Unavailable("breaker is open")

        async def send_once() -> Any:
            if self._is_stale:
                self._is_stale = False
                await self._discard_connections(self._generation)
            generation = self._generation
            try:
                reply = await send(self._redis)
                if fits(reply):
                    return reply
            except _INVALID_REPLY_ERRORS:
                pass
            except RedisError as error:
                if is_wrong_server(error):
                    await self._discard_connections(generation)
                raise
            if generation != self._generation:
                raise NotConnected("closed meanwhile")
            # Invalid, or the answer to another command: then the next replies may be, too.
            await self._discard_connections(generation)
            raise InvalidResponse

        async def command() -> Any:
            try:
                return await send_once()
            except RedisError as error:
                # A pooled connection may lead to a Redis that has restarted, or was demoted.
                lost = again and isinstance(error, NotConnected)
                if not (lost or is_wrong_server(error)):
                    raise
            return await send_once()

        reply: Any = None
        try:
            # redis-py closes a connection whose command is cancelled, so its reply can't become
            # the next caller's.
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
                names = {self._reads: "commands", self._writes: "writes", self._scans: "scans"}
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

    async def _discard_connections(self, generation: int) -> None:
        """Close all connections, unless that was done since this generation.

        The next ones resolve the host name and authenticate again.
        """
        if generation == self._generation:
            self._generation += 1
            await self._redis.connection_pool.disconnect()


def _is_count(reply: Any) -> bool:
    return isinstance(reply, int)


def _is_value(reply: Any) -> bool:
    return reply is None or isinstance(reply, bytes)


def _is_true_or_none(reply: Any) -> bool:
    return reply is None or reply is True


def _is_entries(reply: Any) -> bool:
    return isinstance(reply, list) and all(
        isinstance(entry, tuple)
        and isinstance(entry[0], bytes)
        and isinstance(entry[1], dict | None)
        for entry in reply
    )


def _pool(url: str, max_connections: int) -> BlockingConnectionPool:
    """A pool of connections to Redis; each is opened when it is needed."""
    return BlockingConnectionPool(
        **RedisAddress.from_url(url).pool_options(redis.asyncio),
        protocol=2,  # RESP3 begins with HELLO, which some proxies do not know
        max_connections=max_connections,
        timeout=TIMEOUT,
        socket_connect_timeout=TIMEOUT,
        socket_timeout=TIMEOUT,
        retry=Retry(NoBackoff(), 0),  # it does not know which commands may be repeated
    )
