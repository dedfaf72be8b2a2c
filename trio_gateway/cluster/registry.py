"""The registry: which processes of this service are alive, and the state of each.

Every process writes its beat every read seconds. Times are those of Redis, so the clocks of the
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
from ..broker.probe import Probe
from ..core.control_messages import Left, Node
from ..runtime.throttled_log import ThrottledLog
from .keys import Keys
from .liveness import HORIZON, NOTE_GAP, is_list_of

log = structlog.get_logger()

EVERY: Final = 3.0  # seconds from one beat to the next
_RETRY: Final = 1.0  # seconds from a beat that failed to the next
_FORGET: Final = 60_000  # milliseconds for which the state of a dead process is kept

_STATES: Final = """
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. horizon, '+inf')
local states = {}
if #names > 0 then states = redis.call('HMGET', KEYS[3], unpack(names)) end
"""
# A clock that was set back, or is that of another server, must not keep the dead alive.
_BEAT: Final = (
    NOTE_GAP
    + """
local beat = redis.call('ZSCORE', KEYS[1], ARGV[3])
local known = beat and tonumber(beat) > horizon
for _, name in ipairs(redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. now, '+inf')) do
  redis.call('ZADD', KEYS[1], now, name)
end
local lost = redis.call('ZRANGEBYSCORE', KEYS[1], '-inf', horizon - ARGV[2])
for _, name in ipairs(lost) do
  redis.call('ZREM', KEYS[1], name)
  redis.call('HDEL', KEYS[3], name)
  redis.call('HDEL', KEYS[4], name)
end
redis.call('ZADD', KEYS[1], now, ARGV[3])
redis.call('HSET', KEYS[3], ARGV[3], ARGV[4])
redis.call('HSET', KEYS[4], ARGV[3], ARGV[5])
if ARGV[6] ~= '' then redis.call('PUBLISH', ARGV[6], ARGV[7]) end
"""
    + _STATES
    + """
return {known and 1 or 0, redis.call('EXISTS', KEYS[2]), #lost, names, states}
"""
)
_READ: Final = HORIZON + _STATES + "return {names, states}"
_LEAVE: Final = """
redis.call('ZREM', KEYS[1], ARGV[1])
redis.call('HDEL', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('PUBLISH', ARGV[2], ARGV[3])
return redis.status_reply('OK')
"""


def make_name() -> str:
    """A name for this process: where it runs, and a part that tells it from an earlier one."""
    host = re.sub(r"[^A-Za-z0-9._-]", "-", socket.gethostname())[:63] or "host"
    return f"{host}-{os.getpid()}-{secrets.token_hex(2)}"


class Registry:
    """Writes the beats of this process, and knows the live processes.

    ``describe`` returns the state of this process; ``settings`` are those that all processes should
    have in common. The ``probe`` is published with each beat.

    The functions in ``on_forgotten`` are called when Redis did not know this process, or not any
    more: at the first beat, after Redis has lost its data, and when this process was paused for
    longer than :data:`~.liveness.LIVE`. Then everything that this process has in Redis must be
    written again.
    """

    def __init__(
        self,
        name: str,
        commands: Commands,
        keys: Keys,
        describe: Callable[[], Node],
        *,
        settings: Mapping[str, Any] | None = None,
        probe: Probe | None = None,
    ) -> None:
        self.name = name
        self._commands = commands
        self._keys = keys
        self._describe = describe
        self._settings = msgspec.json.encode(settings or {})
        self._probe = probe
        self._others: dict[str, Node] = {}
        self._wake = trio.Event()
        self._failed = False  # the last beat could not be written
        self._beating = trio.Lock()
        self._has_left = False
        self._throttled_log = ThrottledLog(log)
        self.lost = 0  # processes that ended without a word; each is counted by one of the others
        self.on_forgotten: list[Callable[[], None]] = []

    @property
    def nodes(self) -> Mapping[str, Node]:
        """The live processes by the last beat, this one included."""
        return {**self._others, self.name: self._describe()}

    async def read(self) -> dict[str, Node]:
        """Read the live processes. Raises :exc:`Unavailable`."""
        return {**await read_nodes(self._commands, self._keys), self.name: self._describe()}

    async def run(self) -> NoReturn:
        """Write the beats; returns only when cancelled."""
        while True:
            pause = EVERY
            try:
                await self.beat()
                self._failed = False
            except Unavailable as error:
                self._throttled_log.warning("beat not written", error=str(error))
                pause, self._failed = _RETRY, True
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
        async with self._beating:  # Redis would take a beat that comes later for a live process
            await self._leave()

    async def _leave(self) -> None:
        left = msgspec.json.encode(Left(self.name))
        keys = [self._keys.nodes, self._keys.states, self._keys.settings]
        await self._commands.evaluate(_LEAVE, keys, [self.name, self._keys.control, left])

    async def beat(self) -> None:
        """Write a beat, unless this process has left. Raises :exc:`Unavailable`."""
        async with self._beating:
            if not self._has_left:
                await self._beat()

    async def _beat(self) -> None:
        channel, number = b"", 0
        if self._probe is not None:
            _, channel, number = self._probe.next_command()
        state = msgspec.json.encode(self._describe())
        keys = self._keys
        known, gap, lost, names, states = await self._commands.evaluate(
            _BEAT,
            [keys.nodes, keys.gap, keys.states, keys.settings],
            [int(self._failed), _FORGET, self.name, state, self._settings, channel, number],
            fits=is_list_of(5),
        )
        self.lost += lost
        if self._probe is not None:
            self._probe.published(1, trio.current_time())
        others = _nodes(names, states)
        others.pop(self.name, None)
        # While Redis may have lost its data, a process that has not beaten again is alive, too.
        self._others = {**self._others, **others} if gap else others
        if not known:
            for forgotten in self.on_forgotten:
                forgotten()


async def read_nodes(commands: Commands, keys: Keys) -> dict[str, Node]:
    """Read the live processes. Raises :exc:`Unavailable`."""
    read = [keys.nodes, keys.gap, keys.states]
    found = await commands.evaluate(_READ, read, fits=is_list_of(2))
    return _nodes(*found)


async def read_settings(commands: Commands, keys: Keys) -> dict[str, dict[str, Any]]:
    """Read the settings that live processes should have in common. Raises :exc:`Unavailable`."""
    found = await commands.evaluate(
        _READ, [keys.nodes, keys.gap, keys.settings], fits=is_list_of(2)
    )
    return {
        name.decode(): msgspec.json.decode(each, type=dict[str, Any])
        for name, each in zip(*found, strict=True)
        if each is not None
    }


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
