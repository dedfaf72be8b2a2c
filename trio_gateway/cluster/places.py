"""Places: how many connections of a user, session or tenant each process has, kept in Redis.

Each process has a hash of its own: absolute counts, so a script may run twice, and what a process
wrote is worth nothing when it is no longer live.
"""

from collections.abc import Iterable
from enum import Enum
from typing import Any, Final

import msgspec

from ..core.capacity import CapacityLimits, Owner
from .liveness import NAMES

MOST_ASKS: Final = 250  # in one script
MOST_COUNTS: Final = 500  # in one script, besides those that are asked about
_KEPT: Final = 60_000  # ms that the hash of a process that has ended is kept

#: What is answered to somebody who asks for a place.
GRANTED: Final = ord("1")
TENANT_IS_FULL: Final = ord("t")
OWNER_IS_FULL: Final = ord("o")

# Needs the keys of NAMES and the hash of this process. Its field "#" is the number of the script
# that wrote last: Redis may run an old one late, whose caller gave up when Redis was frozen. It
# must not overwrite what is newer. A process that asks is alive, also if its beats are late.
TAKE: Final = (
    NAMES
    + """
local beat = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not beat or tonumber(beat) <= horizon then return {0, 0, ''} end
local before = tonumber(redis.call('HGET', KEYS[3], '#') or 0)
if tonumber(ARGV[2]) < before then return {2, before, ''} end
redis.call('ZADD', KEYS[1], now, ARGV[1])

local most = {u = tonumber(ARGV[4]), s = tonumber(ARGV[5]), t = tonumber(ARGV[6])}
local asks = tonumber(ARGV[7])
local fields, mine, left = {}, {}, {}
for at = 8, #ARGV, 2 do
  local field = ARGV[at]
  if not mine[field] then
    fields[#fields + 1] = field
    mine[field] = tonumber(ARGV[at + 1])
  end
end

local function tenant_of(field)
  return most.t > 0 and 't' .. string.match(field, ':%d+') or nil
end
local asked = {}
local function ask(field)
  if field and not left[field] then
    asked[#asked + 1] = field
    left[field] = most[string.sub(field, 1, 1)] - mine[field]
  end
end
for at = 8, 6 + 2 * asks, 2 do
  ask(ARGV[at])
  ask(tenant_of(ARGV[at]))
end
if asks > 0 then
  local places = string.sub(KEYS[3], 1, -1 - #ARGV[1])
  for _, name in ipairs(names) do
    if name ~= ARGV[1] then
      local theirs = redis.call('HMGET', places .. name, unpack(asked))
      for i, field in ipairs(asked) do left[field] = left[field] - (theirs[i] or 0) end
    end
  end
end

local answers = {}
for at = 8, 6 + 2 * asks, 2 do
  local owner, tenant = ARGV[at], tenant_of(ARGV[at])
  if left[owner] <= 0 then
    answers[#answers + 1] = 'o'
  elseif tenant and left[tenant] <= 0 then
    answers[#answers + 1] = 't'
  else
    answers[#answers + 1] = '1'
    for _, field in ipairs({owner, tenant}) do
      left[field], mine[field] = left[field] - 1, mine[field] + 1
    end
  end
end

local set, gone = {'#', ARGV[2]}, {}
for _, field in ipairs(fields) do
  if mine[field] > 0 then
    set[#set + 1] = field
    set[#set + 1] = mine[field]
  else
    gone[#gone + 1] = field
  end
end
redis.call('HSET', KEYS[3], unpack(set))
if #gone > 0 then redis.call('HDEL', KEYS[3], unpack(gone)) end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
return {1, before, table.concat(answers)}
"""
)


class Outcome(Enum):
    """What became of a script."""

    NOT_LIVE = 0  # Redis does not count this process as live: nothing was written
    WRITTEN = 1
    LATE = 2  # a newer script was faster: nothing was written


class Written(msgspec.Struct, frozen=True):
    """The reply of the script."""

    outcome: Outcome
    before: int  # the number of the script that wrote before this one; 0: none that Redis knows
    answers: bytes  # one for each who asked; none if nothing was written


def arguments(
    name: str,
    number: int,
    limits: CapacityLimits,
    asks: Iterable[tuple[Owner, int]],
    counts: Iterable[tuple[Owner, int]],
) -> list[str | int]:
    """The arguments of :data:`TAKE`.

    ``asks`` are those who ask for a place, ``counts`` are to be written, each with the places of
    this process, without those that are asked for. With a limit of tenants, ``counts`` has the
    tenants of all who ask.
    """
    found: list[str | int] = []
    for key, places in asks:
        found += (_field(key), places)
    limit = (limits.per_user, limits.per_session, limits.per_tenant)
    head = (name, number, _KEPT, *limit, len(found) // 2)
    for key, places in counts:
        found += (_field(key), places)
    return [*head, *found]


def read_reply(reply: Any, asks: int) -> Written:
    """Read the reply of :data:`TAKE` to a number of ``asks``. Raises :exc:`ValueError`."""
    match reply:
        case [int(outcome), int(before), bytes(answers)] if outcome != 1 or len(answers) == asks:
            return Written(Outcome(outcome), before, answers)
    raise ValueError("not a reply of this script")


def _field(key: Owner) -> str:
    kind, tenant, who = key
    return f"{kind[0]}:{tenant}" if who is None else f"{kind[0]}:{tenant}:{who}"
