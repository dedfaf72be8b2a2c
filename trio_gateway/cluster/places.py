"""Places: how many connections of a user, session or tenant each process has, kept in Redis.

Each process has a hash of its own: absolute counts, so a script may run twice, and what a process
wrote is worth nothing when it is no longer live.
"""

from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Final

import msgspec

from ..core.capacity import Owner
from .liveness import NAMES

MOST_ASKS: Final = 100  # in one script
MOST_COUNTS: Final = 500  # in one script, besides those that are asked about
_KEPT: Final = 60_000  # ms that the hash of a process that has ended is kept

# Needs the keys of NAMES and the hash of this process. Its field "#" is the number of the script
# that wrote last: Redis may run an old one late, whose caller gave up when Redis was frozen. It
# must not overwrite what is newer.
TAKE: Final = (
    NAMES
    + """
local beat = redis.call('ZSCORE', KEYS[1], ARGV[1])
if not beat or tonumber(beat) <= horizon then return {0, 0, ''} end
local before = tonumber(redis.call('HGET', KEYS[3], '#') or 0)
if tonumber(ARGV[2]) < before then return {2, before, ''} end

local asked, counted = tonumber(ARGV[4]), tonumber(ARGV[5])
local fields, mine, left, at = {}, {}, {}, 5
for i = 1, counted do
  fields[i], mine[i] = ARGV[at + 1], tonumber(ARGV[at + 2])
  at = at + 2
end
for i = 1, asked do left[i] = ARGV[at + i] - mine[i] end
at = at + asked
if asked > 0 then
  local places = string.sub(KEYS[3], 1, -1 - #ARGV[1])
  for _, name in ipairs(names) do
    if name ~= ARGV[1] then
      local theirs = redis.call('HMGET', places .. name, unpack(fields, 1, asked))
      for i = 1, asked do left[i] = left[i] - (theirs[i] or 0) end
    end
  end
end
local answers = {}
for i = at + 1, #ARGV, 2 do
  local owner, tenant = tonumber(ARGV[i]), tonumber(ARGV[i + 1])
  local answer = '1'
  if tenant > 0 and left[tenant] <= 0 then answer = 't' end
  if left[owner] <= 0 then answer = 'o' end
  if answer == '1' then
    for _, n in ipairs({owner, tenant}) do
      if n > 0 then left[n], mine[n] = left[n] - 1, mine[n] + 1 end
    end
  end
  answers[#answers + 1] = answer
end

local set, gone = {'#', ARGV[2]}, {}
for i = 1, counted do
  if mine[i] > 0 then
    set[#set + 1] = fields[i]
    set[#set + 1] = mine[i]
  else
    gone[#gone + 1] = fields[i]
  end
end
redis.call('HSET', KEYS[3], unpack(set))
if #gone > 0 then redis.call('HDEL', KEYS[3], unpack(gone)) end
redis.call('PEXPIRE', KEYS[3], ARGV[3])
return {1, before, table.concat(answers)}
"""
)


class Answer(Enum):
    """What is answered to somebody who asks for a place."""

    GRANTED = "1"
    OWNER_IS_FULL = "o"
    TENANT_IS_FULL = "t"


class Outcome(Enum):
    """What became of a script."""

    NOT_LIVE = 0  # Redis does not count this process as live: nothing was written
    WRITTEN = 1
    LATE = 2  # a newer script was faster: nothing was written


class Written(msgspec.Struct, frozen=True):
    """The reply of the script."""

    outcome: Outcome
    before: int  # the number of the script that wrote before this one; 0: none that Redis knows
    answers: Sequence[Answer]


def arguments(
    name: str,
    number: int,
    limits: Mapping[Owner, int],
    counts: Mapping[Owner, int],
    asks: Sequence[tuple[Owner, Owner | None]],
) -> list[str | int]:
    """The arguments of :data:`TAKE`.

    ``limits`` has those that ``asks`` (for a place of the first and of the second) are about.
    ``counts`` are the places of this process, without those that are asked for; it has all that
    ``limits`` has.
    """
    keys = [*limits, *(key for key in counts if key not in limits)]
    index = {key: n for n, key in enumerate(limits, 1)}
    found: list[str | int] = [name, number, _KEPT, len(limits), len(keys)]
    for key in keys:
        found += (_field(key), counts[key])
    found += limits.values()
    for owner, tenant in asks:
        found += (index[owner], 0 if tenant is None else index[tenant])
    return found


def read_reply(reply: Any) -> Written:
    """Read the reply of :data:`TAKE`.

    Raises :exc:`ValueError`, :exc:`TypeError` or :exc:`AttributeError` if it is something else.
    """
    outcome, before, answers = reply
    return Written(Outcome(outcome), before, [Answer(each) for each in answers.decode()])


def _field(key: Owner) -> str:
    kind, tenant, who = key
    return f"{kind[0]}:{tenant}" if who is None else f"{kind[0]}:{tenant}:{who}"
