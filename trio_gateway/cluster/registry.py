"""The registry: which processes of this service are alive, and the state of each.

Every process writes its beat every three seconds. Times are those of Redis, so the clocks of the
processes do not matter.
"""

import os
import re
import secrets
import socket
from collections.abc import Callable, Mapping
from typing import Any, Final, NoReturn

import msgspec
import structlog
import trio

from ..broker.commands import Commands, Unavailable
from ..core.control_messages import CONTROL, Left, Node
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys

log = structlog.get_logger()

EVERY: Final = 3.0  # seconds from one beat to the next
LIVE: Final = 7.0  # seconds after its last beat in which a process counts as alive
_RETRY: Final = 1.0  # seconds from a beat that failed to the next
_FORGET: Final = 60_000  # milliseconds after which the state of a process is deleted

# For scripts that need the time: milliseconds.
NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""
_LIVE_STATES: Final = """
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. (now - ARGV[1]), '+inf')
local states = {}
if #names > 0 then states = redis.call('HMGET', KEYS[2], unpack(names)) end
"""
_BEAT: Final = (
    NOW
    + """
if redis.call('EXISTS', KEYS[1]) == 0 then redis.call('SET', KEYS[3], now) end
local beat = redis.call('ZSCORE', KEYS[1], ARGV[3])
local known = beat and now - beat < tonumber(ARGV[1])
-- A clock that was set back, or is that of another server, must not keep the dead alive.
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
  redis.call('ZADD', KEYS[1], now, name)
end
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', now - ARGV[2])) do
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[2], name)
end
redis.call('ZADD', KEYS[1], now, ARGV[3])
redis.call('HSET', KEYS[2], ARGV[3], ARGV[4])
"""
    + _LIVE_STATES
    + """
return {known and 1 or 0, now - (redis.call('GET', KEYS[3]) or 0), names, states}
"""
)
_READ: Final = NOW + _LIVE_STATES + "return {names, states}"
_LEAVE: Final = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
"""


def make_name() -> str:
    """A name for this process: where it runs, and a part that tells it from an earlier one."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63] or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


class Registry:
    """Writes the beats of this process, and knows the live processes.

    ``describe`` returns the state of this process. The functions in ``on_forgotten`` are called
    when Redis did not know this process, or not any more: at the first beat, after Redis has lost
    its data, and when this process was paused for longer than :data:`LIVE`. Then everything that
    this process has in Redis must be written again.
    """

    def __init__(
        self, name: str, commands: Commands, keys: Keys, describe: Callable[[], Node]
    ) -> None:
        self.name = name
        self._commands = commands
        self._keys = keys
        self._describe = describe
        self._others: dict[str, Node] = {}
        self._wake = trio.Event()
        self._has_left = False
        self._throttled_log = ThrottledLog(log)
        self.on_forgotten: list[Callable[[], None]] = []

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The live processes by the last beat, this one included."""
        return {**self._others, self.name: self._describe()}

    async def read(self) -> dict[str, Node]:
        """Read the live processes. Raises :exc:`Unavailable`."""
        keys = [self._keys.nodes, self._keys.states]
        found = await self._commands.evaluate(_READ, keys, [int(LIVE * 1000)])
        return {**_nodes(*found), self.name: self._describe()}

    async def run(self) -> NoReturn:
        """Write the beats; returns only when cancelled."""
        while True:
            pause = EVERY
            try:
                if not self._has_left:
                    await self._beat()
            except Unavailable as error:
                self._throttled_log.warning("beat not written", error=str(error))
                pause = _RETRY
            with trio.move_on_after(pause):
                await self._wake.wait()
            self._wake = trio.Event()

    def beat_soon(self) -> None:
        """The state has changed in a way that others need to know at once."""
        self._wake.set()

    def forget(self, name: str) -> None:
        """Another process has stopped."""
        self._others.pop(name, None)

    async def leave(self) -> None:
        """Take this process out, for good. Raises :exc:`Unavailable`."""
        self._has_left = True
        left = msgspec.json.encode(Left(self.name))
        keys = [self._keys.nodes, self._keys.states]
        await self._commands.evaluate(_LEAVE, keys, [self.name, CONTROL, left])

    async def _beat(self) -> None:
        state = msgspec.json.encode(self._describe())
        known, age, names, states = await self._commands.evaluate(
            _BEAT,
            [self._keys.nodes, self._keys.states, self._keys.since],
            [int(LIVE * 1000), _FORGET, self.name, state],
        )
        others = _nodes(names, states)
        others.pop(self.name, None)
        # After Redis has lost its data, others need a moment until their next beat.
        self._others = {**self._others, **others} if age < LIVE * 1000 else others
        if not known:
            for forgotten in self.on_forgotten:
                forgotten()


def _nodes(names: list[bytes], states: list[bytes | None]) -> dict[str, Node]:
    return {
        name: _read_state(name, state)
        for name, state in zip((each.decode() for each in names), states, strict=True)
    }


def _read_state(name: str, state: Any) -> Node:
    """The state that a process wrote; its name alone if this version can't read it."""
    try:
        return msgspec.json.decode(state or b"", type=Node)
    except (msgspec.DecodeError, UnicodeError):
        return Node(name)
