"""Steps of events that must reach somebody: each is taken once, in one script.

What the script changes is in the slot of the event's stream: the hash of its receipts
(:mod:`.receipt_store`), and the stream itself.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec
import structlog

from ..core.escalation import ESCALATED
from ..core.event_ids import Stream, entry_id, event_id
from ..core.receipts import Place
from ..core.routing import UNHEARD
from ..runtime.reach import Due
from ..runtime.throttled_log import ThrottledLog
from .commands import Unavailable
from .receipt_store import ReceiptStore

log = structlog.get_logger()

_PATIENCE: Final = 1.0  # seconds: it must not wait for another server to become the primary
_LATE: Final = 1000  # ms after its deadline from which on a step that is taken is late

# KEYS: for each step the hash and the stream of its event. ARGV for each: the number of the step,
# its deadline and when the hash expires (unix ms), the event as JSON, its entry id, the begin of
# the wrapper for the next audience ('' if there is none), and the parts of the report before and
# after the number of those to whom it was written. Returns for each in how many ms it is to be
# asked again, and for each that is taken now how many ms after its deadline that is, and whether
# its event goes on (0 or 1).
_TAKE: Final = """
local t = redis.call('TIME')
local now = t[1] * 1000 + math.floor(t[2] / 1000)
local n, found, taken = 0, {}, {}
local function next_one()
  n = n + 1
  return ARGV[n]
end
for i = 1, #KEYS / 2 do
  local key, stream = KEYS[2 * i - 1], KEYS[2 * i]
  local step, deadline = tonumber(next_one()), tonumber(next_one())
  local expires = next_one()
  local event, id, wrapper, head, tail = next_one(), next_one(), next_one(), next_one(), next_one()
  local is_over = redis.call('HEXISTS', key, 'step:' .. step) == 1
  for earlier = 0, step do
    is_over = is_over or redis.call('HEXISTS', key, 'confirmed:' .. earlier) == 1
  end
  if is_over then
    found[i] = 0
  elseif now < deadline then
    found[i] = deadline - now
  else
    found[i] = 0
    local written, fields = 0, redis.call('HGETALL', key)
    for f = 1, #fields, 2 do
      if string.sub(fields[f], 1, 3) == 'by:' then
        local steps, at = string.match(fields[f + 1], '^(%d*):(%d*):')
        if at ~= '' and bit.band(tonumber(steps), bit.lshift(1, step)) ~= 0 then
          written = written + 1
        end
      end
    end
    redis.call('HSETNX', key, 'event', event)
    redis.call('HSET', key, 'step:' .. step, now)
    redis.call('PEXPIREAT', key, expires)
    local goes_on = 0
    local entry = wrapper ~= '' and redis.call('XRANGE', stream, id, id)[1]
    if entry then
      for f = 1, #entry[2], 2 do
        if entry[2][f] == 'data' then
          redis.call('XADD', stream, '*', 'data', wrapper .. entry[2][f + 1] .. '}')
          goes_on = 1
        end
      end
    end
    redis.call('XADD', stream, '*', 'data', head .. written .. tail)
    taken[#taken + 1] = {now - deadline, goes_on}
  end
end
return {found, taken}
"""


#: What becomes of a step, and whether it is late: a report alone, or also an escalation, by which
#: the event goes to the next audience.
OUTCOMES: Final = ("report,no", "report,yes", "escalation,no", "escalation,yes")


class Steps:
    """Takes the steps of events. ``names`` are those of the streams, by their tags."""

    def __init__(self, store: ReceiptStore, names: Mapping[Stream, str]) -> None:
        self._store = store
        self._names = names
        self._throttled_log = ThrottledLog(log)
        # Those that were taken here, by outcome and whether they were late; not those of which
        # Redis' answer was lost.
        self.taken: Counter[str] = Counter(dict.fromkeys(OUTCOMES, 0))

    async def take(self, dues: Sequence[Due]) -> Sequence[int] | None:
        """Take those that are not taken yet and whose events nobody has confirmed.

        Returns for each in how many ms it is to be asked about again, 0 for never; None if Redis is
        unavailable: asking again is safe. In a Cluster, all are of events of one stream.
        """
        keys: list[str] = []
        for due in dues:
            keys += [self._store.key(due.place), self._names[due.place.stream]]
        arguments = [each for due in dues for each in _arguments(due)]
        try:
            reply = await self._store.evaluate(
                _TAKE,
                keys,
                arguments,
                fits=lambda reply: (
                    isinstance(reply, list) and len(reply) == 2 and len(reply[0]) == len(dues)
                ),
                seconds=_PATIENCE,
            )
        except Unavailable as error:
            self._throttled_log.warning("deadlines not checked yet", error=str(error))
            return None
        found, taken = reply
        for late, goes_on in taken:
            outcome = "escalation" if goes_on else "report"
            self.taken[f"{outcome},{'yes' if late > _LATE else 'no'}"] += 1
        return [int(left) for left in found]

    async def answers(self, place: Place) -> bool:
        """Whether Redis answers about the event at this place now."""
        try:
            await self._store.evaluate("return 1", [self._store.key(place)], seconds=_PATIENCE)
        except Unavailable:
            return False
        return True


def _arguments(due: Due) -> list[Any]:
    head, tail = _report(due)
    return [
        due.number,
        due.deadline,
        due.expires,
        msgspec.json.encode(due.event),
        entry_id(due.place.position),
        _wrapper(due),
        head,
        tail,
    ]


def _concerns(due: Due) -> dict[str, Any]:
    """Whom the event concerns, as keys of an event."""
    found = {"tenant_id": due.event.tenant_id, "branch_id": due.event.branch_id}
    if due.sector is not None:
        found["sector_id"] = due.sector
    return found


def _wrapper(due: Due) -> bytes:
    """The begin of the wrapper that takes the event to the next audience; empty at the end."""
    if due.number + 1 == len(due.steps):
        return b""
    named = event_id(*due.place)
    session = {} if due.session is None else {"session_id": due.session}
    wrapper = {
        "type": ESCALATED,
        **_concerns(due),
        **session,
        "id": f"escalated:{named}:{due.number + 1}",
        "event_id": named,
        "of": due.event.type,
        "to": due.steps[due.number + 1].name,
        "unless": due.unless,
        "step": due.number + 1,
    }
    return msgspec.json.encode(wrapper)[:-1] + b',"event":'


def _report(due: Due) -> tuple[bytes, bytes]:
    """The event that tells of the step, before and after the number of those it was written to."""
    step, named = due.steps[due.number], event_id(*due.place)
    within = int(step.within) if step.within.is_integer() else step.within
    entity = {
        "event_id": named,
        "type": due.event.type,
        "to": step.name,
        "within": within,
    }
    report = {"type": UNHEARD, **_concerns(due), "id": f"unheard:{named}:{due.number}"}
    begin = msgspec.json.encode(report)[:-1] + b',"entity":'
    return begin + msgspec.json.encode(entity)[:-1] + b',"written":', b',"delivered":0}}'
