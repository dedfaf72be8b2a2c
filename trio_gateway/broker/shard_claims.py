"""Shard claims: each shard is read by a process, also if its tenants have no client anywhere.

Its events must reach somebody. Processes claim shards in one hash in Redis, for 0.6 s, and renew
that three times in it. A process with clients of a shard takes it over, because it reads
it anyway; the former holder gives it up. A process that dies is replaced within 0.8 s. Two that
read a shard for a moment, after a pause of its holder, are harmless: steps are taken once.
"""

import secrets
from contextlib import suppress
from typing import Final, NoReturn

import structlog
import trio

from ..core.shards import Sharding
from ..runtime.following import Following
from ..runtime.throttled_log import ThrottledLog
from .commands import Commands, Unavailable

log = structlog.get_logger()

KEY: Final = "{gateway}:watchers"  # hash: stream, its holder and until when (Redis ms)
_HELD: Final = 600  # milliseconds
_EVERY: Final = 0.2  # seconds
_GROUP: Final = "shard claims"
_KEPT: Final = 60_000  # milliseconds after the last claim

# ARGV: the process, for how many ms it claims, how many of the streams that follow it has clients
# of, and all streams, those first. Returns the numbers of those that it holds now.
_CLAIM: Final = f"""
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local known, fields, mine = {{}}, redis.call('HGETALL', KEYS[1]), {{}}
for f = 1, #fields, 2 do known[fields[f]] = fields[f + 1] end
for n = 4, #ARGV do
  local holder, expires = string.match(known[ARGV[n]] or ':0', '^(.*):(%d+)$')
  if holder == ARGV[1] or n - 3 <= tonumber(ARGV[3]) or tonumber(expires) <= now then
    redis.call('HSET', KEYS[1], ARGV[n], ARGV[1] .. ':' .. (now + ARGV[2]))
    mine[#mine + 1] = n - 3
  end
end
redis.call('PEXPIRE', KEYS[1], {_KEPT})
return mine
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


class ShardClaims:
    """Claims shards for this process, and lets it read them."""

    def __init__(self, commands: Commands, following: Following, sharding: Sharding) -> None:
        self._commands = commands
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
            await self.claim()
            with trio.move_on_after(_EVERY):
                await self._stopped.wait()
        with suppress(Unavailable):  # soon others claim it
            await self._commands.evaluate(_GIVE_UP, [KEY], [self._process], group=_GROUP)
        await trio.sleep_forever()

    async def claim(self) -> None:
        """Claim what nobody else holds, and what has clients here."""
        names = sorted(self._names, key=lambda name: not self._following.has_clients(name))
        followed = sum(map(self._following.has_clients, names))
        try:
            held = await self._commands.evaluate(
                _CLAIM,
                [KEY],
                [self._process, _HELD, followed, *names],
                fits=lambda reply: isinstance(reply, list),
                group=_GROUP,
            )
        except Unavailable as error:
            self._throttled_log.warning("shards not claimed", error=str(error))
        else:
            self._following.hold({names[int(number) - 1] for number in held})
