"""Commands to Redis: redis-py under trio-asyncio, behind a breaker."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final, NoReturn

import structlog
import trio
from redis.exceptions import RedisError
from redis.exceptions import TimeoutError as TooSlow

from ..core.resilience import Breaker, State
from ..redis_errors import describe, is_wrong_server, refusal
from ..runtime.supervision import ConnectionLost
from ..runtime.throttled_log import ThrottledLog
from .primaries import FAILURES, Primaries
from .topology import Topology

log = structlog.get_logger()

TIMEOUT: Final = 2.0  # seconds for one command

_CHECK: Final = "gateway:ticket:check"
# Of dead letters, and of scans: failures in a row, seconds until the next try.
_OWN_BREAKER: Final = 5, 30.0
_CLUSTER_BREAKER: Final = 3, 1.0
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
    """Redis does not answer, or its breaker is open. It is unknown what the answer would be.

    ``refusal`` is the first word of Redis' error, if it refuses such commands.
    """

    def __init__(self, text: str, refusal: str = "") -> None:
        super().__init__(text)
        self.refusal = refusal

    @property
    def cause(self) -> str:
        """What to tell others about it."""
        return f"Redis refuses ({self.refusal})" if self.refusal else "Redis does not answer"


class Commands:
    """The few commands that the gateway sends; each raises :exc:`Unavailable` in bounded time.

    Reads and writes have a breaker each. A Redis that is full, or is a replica, refuses writes
    and answers reads: clients with a token, which needs a read, must not be turned away because
    tickets, which need a write, fail.
    """

    def __init__(
        self, topology: Topology, reads: Breaker, writes: Breaker, *, max_connections: int
    ) -> None:
        self._primaries = Primaries(topology, max_connections=max_connections, timeout=TIMEOUT)
        self._reads = reads
        self._writes = writes
        # Dead letters and scans have their own: a stream or a right that only they need must not
        # cost anybody a ticket.
        self._dead_letters = Breaker(*_OWN_BREAKER)
        self._scans = Breaker(*_OWN_BREAKER)
        # What processes tell each other waits for nobody, so it is tried again soon.
        self.cluster_breaker = Breaker(*_CLUSTER_BREAKER)
        self._names = {
            reads: "commands",
            writes: "writes",
            self.cluster_breaker: "cluster",
            self._dead_letters: "dead letters",
            self._scans: "scans",
        }

        self._groups: dict[str, Breaker] = {}  # of scripts
        self._refusals: dict[Breaker, str] = {}  # the cause of the last failure of each
        self._throttled_log = ThrottledLog(log)

    async def run(self) -> NoReturn:
        """Run the asyncio loop that redis-py needs; returns only when cancelled.

        A command waits, within its own deadline, until this runs.
        """
        await self._primaries.run(self._retry)

    def _retry(self) -> None:
        """Another server is the primary: try that at once."""
        for breaker in self._names:
            breaker.retry(trio.current_time())

    def reconnect(self) -> None:
        """Use new connections: another one has found that the server is not the primary."""
        self._primaries.reconnect()

    async def check(self, seconds: float) -> None:
        """Raise :exc:`Unavailable` unless Redis answers in ``seconds`` and accepts writes.

        Of a Cluster one primary is enough: for clients whose keys are on the others, no other
        process could do more. Anybody can cause a check, so a slow answer opens no breaker.
        """
        deadline = trio.current_time() + seconds
        await self._run(
            self._reads,
            lambda: self._primaries.execute_on_one(
                lambda redis, key: redis.mget([key]), lambda reply: reply == [None], _CHECK
            ),
            seconds=seconds,
            is_check=True,
        )
        await self._run(
            self._writes,
            lambda: self._primaries.execute_on_one(
                # The key never exists: no change.
                lambda redis, key: redis.set(key, "", xx=True),
                _is_true_or_none,
                _CHECK,
            ),
            seconds=max(0.0, deadline - trio.current_time()),
            is_check=True,
        )

    async def mget(self, keys: Sequence[str]) -> list[bytes | None]:
        """Return the value of each key, None for a key that does not exist."""
        found: list[bytes | None] = await self._run(
            self._reads, lambda: self._primaries.mget(keys, _is_value)
        )
        return found

    async def set_for(self, key: str, value: str, seconds: int) -> None:
        """Set a key that expires after ``seconds``."""
        await self._send(self._writes, key, lambda redis: redis.set(key, value, ex=seconds), bool)

    async def get(self, key: str) -> bytes | None:
        """Return a key's value, or None."""
        found: bytes | None = await self._send(
            self._reads, key, lambda redis: redis.get(key), _is_value
        )
        return found

    async def getdel(self, key: str) -> bytes | None:
        """Return a key's value, or None, and delete the key."""
        # Not repeated if its answer is lost: the key is deleted by then, and None would be wrong.
        found: bytes | None = await self._send(
            self._writes, key, lambda redis: redis.getdel(key), _is_value, again=False
        )
        return found

    async def publish(self, channel: str, payload: bytes) -> None:
        """Publish a message on a channel."""
        await self._send(
            self._writes,
            None,
            lambda redis: redis.publish(channel, payload),
            _is_count,
            again=False,
        )

    async def add(self, stream: str, fields: dict[str, str | bytes]) -> None:
        """Add an entry to a stream, without trimming the stream."""
        entry: Any = fields
        await self._send(
            self._writes, stream, lambda redis: redis.xadd(stream, entry), _is_value, again=False
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
        or adds it twice. In a Cluster the key must be in the slot of the stream.
        """
        if self._writes.state is not State.CLOSED:
            raise Unavailable("breaker is open")
        words = [word for pair in fields.items() for word in pair]
        added = await self._send(
            self._dead_letters,
            stream,
            lambda redis: redis.eval(_ADD_ONCE, 2, key, stream, seconds, max_length, *words),
            _is_count,
        )
        return bool(added)

    async def read_back(self, stream: str, end: str, count: int) -> Entries:
        """Return the last entries of a stream up to this id, the newest first."""
        found: Entries = await self._send(
            self._scans, stream, lambda redis: redis.xrevrange(stream, end, "-", count), _is_entries
        )
        return found

    async def read_on(self, stream: str, after: str, count: int) -> Entries:
        """Return the first entries of a stream after this id, the oldest first."""
        ids: Any = {stream: after}
        # XREAD and not XRANGE: the user has the right to it.
        found = await self._send(
            self._scans,
            stream,
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

    async def is_whole(self, stream: str) -> bool:
        """Whether a stream still holds every entry that was ever added; False before Redis 7."""
        info = await self._send(
            self._scans,
            stream,
            lambda redis: redis.xinfo_stream(stream),
            lambda reply: isinstance(reply, dict) and isinstance(reply.get("length"), int),
        )
        return bool(info["length"] == info.get("entries-added"))

    async def evaluate(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int | float] = (),
        *,
        again: bool = True,
        fits: Callable[[Any], bool] = lambda reply: True,
        seconds: float = TIMEOUT,
        group: str | None = None,
    ) -> Any:
        """Run a Lua script, and return its reply. In a Cluster its keys must be in one slot.

        ``again``: it may run twice, as it does if the first answer was lost. ``fits`` says whether
        a reply has the right shape. Scripts of a ``group``, of which there are few, have a breaker
        of their own.
        """
        return await self._run(
            self.cluster_breaker if group is None else self._breaker_of(group),
            lambda: self._primaries.execute(
                keys[0],
                lambda redis: redis.eval(script, len(keys), *keys, *arguments),
                fits,
                again=again,
            ),
            seconds=seconds,
        )

    def _breaker_of(self, group: str) -> Breaker:
        if (found := self._groups.get(group)) is None:
            found = self._groups[group] = Breaker(*_CLUSTER_BREAKER)
            self._names[found] = group
        return found

    async def _send(
        self,
        breaker: Breaker,
        key: str | None,
        send: Callable[[Any], Any],
        fits: Callable[[Any], bool],
        *,
        again: bool = True,
    ) -> Any:
        """Send a command and return its reply.

        ``fits`` says whether a reply has the right shape. ``again`` says whether the command may
        be repeated when its answer was lost; one that was refused may be in any case.
        """
        return await self._run(
            breaker, lambda: self._primaries.execute(key, send, fits, again=again)
        )

    async def _run(
        self,
        breaker: Breaker,
        work: Callable[[], Awaitable[Any]],
        *,
        seconds: float = TIMEOUT,
        is_check: bool = False,
    ) -> Any:
        """Do work within ``seconds``, unless the breaker is open, and tell it the outcome."""
        if not breaker.try_now(trio.current_time()):
            raise Unavailable("breaker is open", self._refusals.get(breaker, ""))
        reply: Any = None
        try:
            # redis-py closes a connection whose command is cancelled, so its reply can't become
            # the next caller's.
            with trio.move_on_after(seconds) as scope:
                reply = await work()
            if scope.cancelled_caught:
                self._primaries.suspect()
                raise TimeoutError(f"no answer in {seconds:g} s")
        except FAILURES as error:
            if is_check and isinstance(error, TimeoutError | TooSlow):
                breaker.abandoned(trio.current_time())
                raise Unavailable("no answer in time") from None
            was = breaker.state
            # While a failover runs, a try costs little, and may be the first one that succeeds.
            soon = self._primaries.fails_over or (
                isinstance(error, RedisError) and is_wrong_server(error)
            )
            breaker.failed(trio.current_time(), soon=soon)
            if was is State.CLOSED and breaker.state is State.OPEN:
                log.error("breaker opened", source=self._names[breaker], error=describe(error))
            # Health checks show it, maybe to anybody: no address.
            is_lost = isinstance(error, ConnectionLost)
            text = "primary unknown" if is_lost else type(error).__name__
            self._refusals[breaker] = word = refusal(error)
            if word:
                self._throttled_log.warning(
                    "Redis refuses a command", source=self._names[breaker], error=word
                )
            raise Unavailable(text, word) from None
        except BaseException:
            breaker.abandoned(trio.current_time())
            raise
        if breaker.state is not State.CLOSED:
            log.info("breaker closed", source=self._names[breaker])
        breaker.succeeded()
        return reply


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
