"""The scripts that keep presence in Redis: one truth for all processes, each change told once.

After the prefix the keys are:

- ``here:<process>``, a hash: who is connected there, with the number of connections and a record
- ``online:<tenant>``, a hash: who is present, with since when and a record
- ``leaving``, a sorted set: who has no connection in any ``here``, by when it lost the last one
  (ms)
- ``left``, a hash: when one lost those of a process (ms), who had others then
- ``presence:processes``, a hash: each process that has a ``here``, with the number of its last
  write
- ``presence:state``, a hash: the ``rev`` of the last change that was published; when the service
  ``swept`` last, and ``since`` when it does so without a pause (ms); how many are present, by
  endpoint
- ``nodes``, of the registry: the processes by their last beat (ms)

A process counts while its beat in `nodes` is younger than LIVE. All times are Redis' own. What is
told is written and published in the script that makes it true, so nothing is told twice, whichever
process dies. A write that arrives late, after a newer one of its process, is refused.
"""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Final

from .keys import Keys
from .liveness import HORIZON, LIVE

#: Runs one of the scripts, with its own arguments. Raises :exc:`~..broker.commands.Unavailable`.
Run = Callable[[str, Sequence[str | int]], Awaitable[Any]]

BEAT: Final = 3.0  # seconds between two beats: how long after its last one a process may have died
PAUSE: Final = 3.0  # seconds without a sweep: the service, or Redis, was away
STREAM_ENTRIES: Final = 100_000  # about: what the stream is trimmed to
# Users and sessions in one script, which takes about a millisecond.
CHUNK: Final = 100
WRITTEN: Final = 200


def presence_keys(keys: Keys, stream: str | None) -> list[str]:
    """The keys that every script is given. The stream, if there is one, is in their slot."""
    own = [keys.prefix + name for name in ("presence:processes", "leaving", "presence:state")]
    return [keys.nodes, keys.gap, *own, *([] if stream is None else [stream])]


def common_arguments(keys: Keys, grace: float) -> list[str]:
    """The arguments that every script is given first; ``grace`` in seconds."""
    return [keys.prefix, f"{grace * 1000:.0f}", keys.changes]


# KEYS: nodes, its gap, presence:processes, leaving, presence:state, and the stream if there is one.
# ARGV: prefix, grace in ms, the channel of changes, the process that asks, then those of the
# script.
_COMMON: Final = (
    HORIZON
    + f"""
local nodes, processes, leaving, state, stream = KEYS[1], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local prefix, grace, channel = ARGV[1], tonumber(ARGV[2]), ARGV[3]

-- The process that asks is alive, whatever its beats say.
local live, dead = {{}}, {{}}
for _, name in ipairs(redis.call('HKEYS', processes)) do
  local beat = tonumber(redis.call('ZSCORE', nodes, name) or 0)
  if beat > horizon or name == ARGV[4] then
    live[#live + 1] = name
  else
    dead[name] = beat
  end
end

local function seconds(ms) return string.format('%.3f', ms / 1000) end
local function text(ms) return string.format('%.0f', ms) end
local function online(key) return prefix .. 'online:' .. string.match(key, '^%d+') end
local function behind_line(value)
  return string.sub(value, string.find(value, '\\n', 1, true) + 1)
end

local changes, stream_error = {{}}, ''
local function tell(kind, key, record, at)
  local endpoint = string.match(key, '^%d+:(%a+)')
  redis.call('HINCRBY', state, endpoint, kind == 'ONLINE' and 1 or -1)
  if not stream then return end
  local event = string.match(record, '^{{(.*)}}\\n')
  local subject = endpoint == 'diner' and 'SESSION_' or 'USER_'
  local added = redis.pcall('XADD', stream, 'MAXLEN', '~', {STREAM_ENTRIES}, '*', 'data',
    '{{"type":"' .. subject .. kind .. '",' .. event .. ',"at":' .. seconds(at) .. '}}')
  if type(added) == 'table' and added.err then stream_error = added.err end
end
local function publish()
  if #changes == 0 then return end
  local rev = redis.call('HINCRBY', state, 'rev', 1)
  redis.call('PUBLISH', channel, cjson.encode({{rev, changes}}))
end

-- What live processes hold of it.
local function held(key)
  local found = {{}}
  for _, name in ipairs(live) do
    local value = redis.call('HGET', prefix .. 'here:' .. name, key)
    if value then found[#found + 1] = value end
  end
  return found
end

-- Whether a process holds it that is not live any more, and has not been swept: then it leaves when
-- that process is swept, or later.
local function held_by_dead(key)
  for name in pairs(dead) do
    if redis.call('HEXISTS', prefix .. 'here:' .. name, key) == 1 then return true end
  end
  return false
end

-- A process holds another record of it, or none any more: tell those who watch what all hold now.
local function update(key, since, record, values)
  redis.call('HSET', online(key), key, since .. '\\n' .. record)
  if #values > 0 then changes[#changes + 1] = {{key, since, unpack(values)}} end
end

local function finish(key, left)
  redis.call('ZREM', leaving, key)
  local value = redis.call('HGET', online(key), key)
  if not value then return end
  redis.call('HDEL', online(key), key)
  redis.call('HDEL', prefix .. 'left', key)
  tell('OFFLINE', key, behind_line(value), left)
  changes[#changes + 1] = {{key}}
end

-- A process does not hold it any more. Once no other does, it is leaving; of all ends the last
-- counts.
local function release(key, left)
  local value = redis.call('HGET', online(key), key)
  if not value then return end
  local values = held(key)
  left = math.max(left, tonumber(redis.call('HGET', prefix .. 'left', key) or 0))
  if #values == 0 and not held_by_dead(key) then
    if grace == 0 then finish(key, left)
    else redis.call('ZADD', leaving, 'GT', text(left), key) end
    return
  end
  redis.call('HSET', prefix .. 'left', key, text(left))
  if #values == 0 then return end
  update(key, string.match(value, '^[^\\n]+'), behind_line(values[1]), values)
end
"""
)

# ARGV: the number of this write, then of each user or session two: its key; and a line with its
# connections, how long ago it connected since the last write (ms; -: it did not), and how long ago
# it lost its last connection (ms; 0 if it has one), followed by its record. Each argument costs
# the caller as much as a field of a line in which it is.
# Returns the number of the last write before this one, or "late"; an error of the stream; and since
# when each is present.
WRITE: Final = (
    _COMMON
    + """
local name, number = ARGV[4], tonumber(ARGV[5])
local last = tonumber(redis.call('HGET', processes, name) or -1)
if number < last then return {'late', '', {}} end
if last == -1 then live[#live + 1] = name end
redis.call('HSET', processes, name, number)
local here = prefix .. 'here:' .. name
local found = {}
for at = 6, #ARGV, 2 do
  local key = ARGV[at]
  local connections, came, left, record = string.match(ARGV[at + 1], '^(%d+) (%S+) (%S+)\\n(.*)$')
  came, left = tonumber(came), now - left
  local since = ''
  local value = came and redis.call('HGET', online(key), key)
  -- What this process held: others may hold the same record as it does now, and the one before.
  local before = value and redis.call('HGET', here, key)
  if connections ~= '0' then redis.call('HSET', here, key, connections .. '\\n' .. record) end
  if came then
    since = value and string.match(value, '^[^\\n]+') or seconds(now - came)
    if not value then
      redis.call('HSET', online(key), key, since .. '\\n' .. record)
      tell('ONLINE', key, record, now - came)
      changes[#changes + 1] = {key, since, connections .. '\\n' .. record}
    else
      if connections ~= '0' then redis.call('ZREM', leaving, key) end
      if behind_line(before or value) ~= record then update(key, since, record, held(key)) end
    end
  end
  if connections == '0' then
    local is_repeated = redis.call('HDEL', here, key) == 0 and not came
    if not (is_repeated and redis.call('ZSCORE', leaving, key)) then release(key, left) end
  end
  found[#found + 1] = since
end
publish()
return {text(last), stream_error, found}
"""
)

# Ends graces, and lets those go that processes held which are not live any more. After a pause of
# the whole service, or of Redis, both wait until each process has had the time to beat, and to
# write what it holds. A process that could not beat during the pause may have lived until its end.
# ARGV: "1" for more of the same sweep.
# Returns the number of the last write of the process, an error of the stream, whether there is more
# to do, and the state, which has the number of those present by endpoint.
SWEEP: Final = (
    _COMMON
    + f"""
local known = redis.call('HGET', processes, ARGV[4]) or '-1'
local function answer(more)
  local present = redis.call('HGETALL', state)
  return {{known, stream_error, more, present}}
end
local swept = tonumber(redis.call('HGET', state, 'swept') or 0)
if ARGV[5] ~= '1' and swept < now and now - swept < 500 then return answer(0) end
if now - swept > {PAUSE * 1000:.0f} then redis.call('HSET', state, 'since', text(now)) end
redis.call('HSET', state, 'swept', text(now))
local since = tonumber(redis.call('HGET', state, 'since') or 0)
local waits = now - since < {LIVE * 1000:.0f}

local due = redis.call('ZRANGEBYSCORE', leaving, waits and text(since) or '-inf', text(now - grace),
  'WITHSCORES', 'LIMIT', 0, {CHUNK})
for at = 1, #due, 2 do
  local key, left = due[at], tonumber(due[at + 1])
  if #held(key) == 0 and not held_by_dead(key) then
    finish(key, left)
  else  -- written by another version
    redis.call('ZREM', leaving, key)
  end
end

local room, more = {CHUNK} - #due / 2, #due == {2 * CHUNK} and 1 or 0
if not waits then
  for name, beat in pairs(dead) do
    local here = prefix .. 'here:' .. name
    local died = now
    if beat > 0 then died = math.min(now, math.max(beat, since) + {BEAT * 1000:.0f}) end
    if room > 0 then
      for _, key in ipairs(redis.call('HRANDFIELD', here, room)) do
        redis.call('HDEL', here, key)
        release(key, died)
        room = room - 1
      end
    end
    if redis.call('EXISTS', here) == 0 then redis.call('HDEL', processes, name) else more = 1 end
  end
end
publish()
return answer(more)
"""
)

# ARGV: the tenant. Returns the number of the last change, those present, and what each live
# process holds of them, in the same order.
READ: Final = (
    _COMMON
    + """
local present = redis.call('HGETALL', prefix .. 'online:' .. ARGV[5])
local found = {redis.call('HGET', state, 'rev') or '0', present}
for _, name in ipairs(live) do
  local values = {}
  for first = 1, #present, 2000 do
    local keys = {}
    for at = first, math.min(first + 1999, #present), 2 do keys[#keys + 1] = present[at] end
    for _, value in ipairs(redis.call('HMGET', prefix .. 'here:' .. name, unpack(keys))) do
      values[#values + 1] = value or ''
    end
  end
  found[#found + 1] = values
end
return found
"""
)

# Returns whom it holds, according to Redis.
HELD: Final = _COMMON + "return redis.call('HKEYS', prefix .. 'here:' .. ARGV[4])\n"
