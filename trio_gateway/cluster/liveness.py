"""Which processes are alive: the beginning of every Lua script that needs to know it.

A process is alive for :data:`LIVE` seconds after its last beat, on the clock of Redis. When Redis
itself was away, nobody could beat. Then the processes that were alive before count as alive until
they have had as long to beat again: otherwise the first script after a pause of Redis would take
all processes for dead.
"""

from collections.abc import Callable
from typing import Any, Final

LIVE: Final = 7.0  # seconds
_MS: Final = int(LIVE * 1000)

# Defines ``now``, in milliseconds.
NOW: Final = """
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
"""

# Needs KEYS[1] = Keys.nodes and KEYS[2] = Keys.gap. Defines ``now`` and ``horizon``: a process is
# alive if its score in Keys.nodes is above it. ``last`` is the last beat of any process, or nil.
# ``doubtful``: Redis was away or has lost its data, so a live process may be missing here.
HORIZON: Final = (
    NOW
    + f"""
local horizon = now - {_MS}
local last = redis.call('ZREVRANGE', KEYS[1], 0, 0, 'WITHSCORES')[2]
local gap = redis.call('GET', KEYS[2])
local doubtful = gap or not last or now - last >= {_MS}
if last and now - last >= {_MS} then
  horizon = last - {_MS}
elseif gap then
  horizon = math.min(horizon, gap - {_MS})
end
"""
)

# Defines ``names``, those of the live processes; begins with HORIZON.
NAMES: Final = (
    HORIZON
    + """
local names = redis.call('ZRANGEBYSCORE', KEYS[1], '(' .. horizon, '+inf')
"""
)

#: After NAMES: answer with the names, and 1 if that is doubtful.
RETURN_NAMES: Final = "return {names, doubtful and 1 or 0}"

# As HORIZON, for the beat of a process. ARGV[1] is "1" if its last beat could not be written: then,
# and if nobody else has written one, Redis was away. After Redis has lost its data, too, others
# need a moment until their next beat.
NOTE_GAP: Final = (
    HORIZON
    + f"""
if not last then
  redis.call('SET', KEYS[2], now, 'PX', {_MS})
elseif now - last >= {_MS} then
  if ARGV[1] == '1' then
    redis.call('SET', KEYS[2], last, 'PX', {_MS})
  else
    horizon = now - {_MS}
  end
end
"""
)


def is_list_of(length: int) -> Callable[[Any], bool]:
    """Whether the reply of a script is a list of this length."""
    return lambda reply: isinstance(reply, list) and len(reply) == length
