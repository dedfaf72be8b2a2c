"""Orders: what all processes are to do, kept in a stream for those that do not run now."""

import math
from collections.abc import Awaitable, Callable
from typing import Final, NamedTuple, NoReturn

import structlog
import trio

from ..broker.commands import Commands, Unavailable
from ..core.event_ids import START, Position, before, entry_id, read_position
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys
from .liveness import NAMES, NOW, RETURN_NAMES, is_list_of

log = structlog.get_logger()

KEPT: Final = 3_600_000  # milliseconds
_MOST: Final = 100_000  # orders that are kept, about
_BATCH: Final = 100
_RETRY: Final = 1.0  # seconds
_SKEW: Final = 60_000  # milliseconds by which the clock of another primary may be behind
_MARGIN: Final = 10.0  # seconds before its start from which on a process reads: more than one try
_REMEMBERED: Final = 10_000  # orders that are not carried out twice when they are read again

_GIVE: Final = (
    NAMES
    + """
local order = redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[2], '*',
  'id', ARGV[3], 'giver', ARGV[4], 'kind', ARGV[5], 'request', ARGV[6])
redis.call('XTRIM', KEYS[3], 'MINID', '~', now - ARGV[1])
redis.call('PEXPIRE', KEYS[3], ARGV[1])
redis.call('PUBLISH', ARGV[7], '{"type":"ordered","order":"' .. order .. '"}')
"""
    + RETURN_NAMES
)
# Without an id, the orders of the last milliseconds.
_READ: Final = (
    NOW
    + """
local after = ARGV[1]
if after == '' then after = (now - ARGV[2]) .. '-0' end
return {now, after, redis.call('XRANGE', KEYS[1], '(' .. after, '+', 'COUNT', ARGV[3])}
"""
)


class Order(NamedTuple):
    """An order: an id for its answers, who gave it, and what is to be done."""

    id: str
    giver: str
    kind: str
    request: bytes


class Orders:
    """Gives orders, and reads those of all processes, each once.

    A process begins with the orders since it started: earlier ones concern connections that are
    older than itself.
    """

    def __init__(self, commands: Commands, keys: Keys) -> None:
        self._commands = commands
        self._keys = keys
        self._after: Position | None = None  # None: nothing was read yet
        self._done: dict[str, None] = {}
        self._wake = trio.Event()
        self._throttled_log = ThrottledLog(log)

    async def give(self, order: Order) -> tuple[list[bytes], bool]:
        """Add an order, tell all, and return the names of the live processes.

        True means that Redis may not know all of them.
        """
        names, doubtful = await self._commands.evaluate(
            _GIVE,
            [self._keys.nodes, self._keys.gap, self._keys.orders],
            [KEPT, _MOST, *order, self._keys.control],
            again=False,
            fits=is_list_of(2),
        )
        return names, bool(doubtful)

    def wake(self, order: str | None = None) -> None:
        """There may be orders to read; ``order`` is the entry id of one."""
        if order is not None and self._after is not None and order not in self._done:
            try:
                self._after = max(START, min(self._after, before(read_position(order))))
            except ValueError:
                self._throttled_log.warning("invalid control message")
        self._wake.set()

    def read_again(self) -> None:
        """Redis may have lost orders: entry ids of new ones can be below those read before."""
        if self._after is not None:
            self._after = Position((max(0, self._after[0] - _SKEW), 0))
        self._wake.set()

    async def run(self, carry_out: Callable[[Order, float], Awaitable[None]]) -> NoReturn:
        """Carry out orders as they come; returns only when cancelled."""
        started_at = trio.current_time()
        while True:
            await self._wake.wait()
            self._wake = trio.Event()
            try:
                while await self._read_some(started_at, carry_out):
                    pass
            except Unavailable as error:
                self._throttled_log.warning("orders not read", error=str(error))
                await trio.sleep(_RETRY)
                self._wake.set()

    async def _read_some(
        self, started_at: float, carry_out: Callable[[Order, float], Awaitable[None]]
    ) -> bool:
        """Carry out a batch of orders; returns whether there may be more."""
        asked_after = self._after
        own_age = math.ceil((trio.current_time() - started_at + _MARGIN) * 1000)
        now, after, entries = await self._commands.evaluate(
            _READ,
            [self._keys.orders],
            ["" if asked_after is None else entry_id(asked_after), own_age, _BATCH],
            fits=is_list_of(3),
        )
        answered_at = trio.current_time()
        if self._after is asked_after:  # else an earlier one was announced meanwhile
            last = entries[-1][0] if entries else after
            self._after = read_position(last.decode())
        for entry, words in entries:
            name = entry.decode()
            if name in self._done:
                continue
            self._done[name] = None
            if len(self._done) > _REMEMBERED:
                del self._done[next(iter(self._done))]
            if (order := _read_order(words)) is None:
                self._throttled_log.warning("invalid order", entry_id=name)
                continue
            age = max(0, now - read_position(name)[0]) / 1000
            await carry_out(order, answered_at - age)
        return len(entries) == _BATCH


def _read_order(words: list[bytes]) -> Order | None:
    """The order in an entry; None if somebody else has added it."""
    fields = dict(zip(words[::2], words[1::2], strict=False))
    try:
        number, giver, kind = (fields[key].decode() for key in (b"id", b"giver", b"kind"))
        return Order(number, giver, kind, fields[b"request"])
    except (KeyError, UnicodeDecodeError):
        return None
