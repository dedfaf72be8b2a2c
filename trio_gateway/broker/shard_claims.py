"""Shard claims: each shard is read by a process, also if its tenants have no client anywhere.

Its events must reach somebody. Processes claim shards in one hash in Redis, for 0.3 s, and renew
that three times in it. A process with clients of a shard takes it over, because it reads it anyway;
the former holder gives it up. The others ask again when the first claim ends, so a process that
dies is replaced within 0.3 s. Two that read a shard for a moment, after a pause of its holder, are
harmless: steps are taken once.
"""

import secrets
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final, NoReturn, Protocol

import structlog
import trio

from ..core.shards import Sharding
from ..runtime.following import Following
from ..runtime.throttled_log import ThrottledLog
from .commands import Unavailable

log = structlog.get_logger()

KEY: Final = "{gateway}:watchers"  # hash: stream, its holder and until when (Redis ms)
_HELD: Final = 300  # milliseconds
_EVERY: Final = 0.1  # seconds
_TIMEOUT: Final = 1.0  # seconds for one script
_RETRY: Final = 1.0  # seconds: the right to it may be missing, and each try takes a connection
_KEPT: Final = 60_000  # milliseconds after the last claim

# ARGV: the process, for how many ms it claims, how many of the streams that follow it has clients
# of, and all streams, those first. Returns in how many ms the first claim of another process ends,
# and the numbers of the streams that this one holds now.
_CLAIM: Final = f"""
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local known, fields, left = {{}}, redis.call('HGETALL', KEYS[1]), tonumber(ARGV[2])
local mine, claimed = {{}}, {{}}
for f = 1, #fields, 2 do known[fields[f]] = fields[f + 1] end
for n = 4, #ARGV do
  local holder, expires = string.match(known[ARGV[n]] or ':0', '^(.*):(%d+)$')
  if holder == ARGV[1] or n - 3 <= tonumber(ARGV[3]) or tonumber(expires) <= now then
    mine[#mine + 1] = n - 3
    claimed[#claimed + 1] = ARGV[n]
    claimed[#claimed + 1] = ARGV[1] .. ':' .. (now + ARGV[2])
  else
    left = math.min(left, expires - now)
  end
end
if #mine > 0 then redis.call('HSET', KEYS[1], unpack(claimed)) end
redis.call('PEXPIRE', KEYS[1], {_KEPT})
return {{left, unpack(mine)}}
"""
_GIVE_UP: Final = """
local fields = redis.call('HGETALL', KEYS[1])
for f = 1, #fields, 2 do
  if string.match(fields[f + 1], '^(.*):%d+$') == ARGV[1] then
    redis.call('HSET', KEYS[1], fields[f], ':0')
  end
end
return #fields
"""


class Evaluate(Protocol):
    """Runs a script in Redis, as :meth:`Commands.evaluate` does."""

    async def __call__(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, seconds: float
    ) -> Any: ...


class ShardClaims:
    """Claims shards for this process, and lets it read them. ``evaluate`` runs a script."""

    def __init__(self, evaluate: Evaluate, following: Following, sharding: Sharding) -> None:
        self._evaluate = evaluate
        self._following = following
        self._names = sharding.names
        self._process = secrets.token_hex(8)
        self._stopped = trio.Event()
        self._throttled_log = ThrottledLog(log)

    def stop(self) -> None:
        """Let others claim at once what this process holds: it reads no more."""
        self._stopped.set()

    async def run(self) -> NoReturn:
        """Claim, again and again, until :meth:`stop`; returns only when cancelled.

        While Redis does not answer, the process goes on to read what it held.
        """
        while not self._stopped.is_set():
            pause = await self.claim()
            with trio.move_on_after(pause):
                await self._stopped.wait()
        with suppress(Unavailable):  # soon others claim it
            await self._evaluate(_GIVE_UP, [KEY], [self._process], seconds=_TIMEOUT)
        await trio.sleep_forever()

    async def claim(self) -> float:
        """Claim what nobody else holds, and what has clients here.

        Returns in how many seconds to do it again.
        """
        names = sorted(self._names, key=lambda name: not self._following.has_clients(name))
        followed = sum(map(self._following.has_clients, names))
        arguments = [self._process, _HELD, followed, *names]
        try:
            reply = await self._evaluate(_CLAIM, [KEY], arguments, seconds=_TIMEOUT)
            left, *held = map(int, reply)
        except (Unavailable, TypeError, ValueError) as error:
            self._throttled_log.warning("shards not claimed", error=str(error))
            return _RETRY
        self._following.hold({names[number - 1] for number in held})
        return min(left / 1000, _EVERY) if held else left / 1000
