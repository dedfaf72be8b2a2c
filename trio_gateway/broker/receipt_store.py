"""The receipt store: one hash in Redis for each tracked event, in the slot of its stream.

It outlives the processes that wrote it. Its fields are:

- ``event``: the type and whom it concerns, as JSON, and when it entered Redis
- ``by:<endpoint>:<user or session>``: ``steps:written:delivered:seen:sent:branches:step``, times
  in ms
- ``confirmed:<n>``: when somebody in the audience of step n confirmed delivery (ms)
- ``step:<n>``: when step n was over without that (ms)

States are only raised, so a write that comes twice, or late, changes nothing.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from time import time
from typing import Any, Final

import msgspec
import structlog

from ..core.audiences import BranchId
from ..core.event_ids import Stream, entry_id
from ..core.event_path import Known
from ..core.events import Event, InvalidEvent, parse_event
from ..core.receipts import Place, Receipt, ReceiptChange, Receipts, Recipient, TrackedEvent
from ..core.slots import hash_tag
from ..runtime.throttled_log import ThrottledLog
from .commands import TIMEOUT, Commands, Unavailable

log = structlog.get_logger()

_MOST: Final = 100  # events in one script
_BY: Final = "by:"

# KEYS: the hashes. ARGV: for each of them its event, when it expires (unix ms), how many receipts
# follow, and for each its field, steps, written, delivered, seen, sent, branches, step. Without
# ``sent``, it counts as soon as another process writes that it has sent the event, in that step or
# an earlier one: see ``Receipt.joined``.
_WRITE: Final = """
local n = 0
local function take()
  n = n + 1
  return ARGV[n]
end
local function first(old, new)
  if old == '' then return new end
  return old
end
for _, key in ipairs(KEYS) do
  local event, expires, receipts = take(), tonumber(take()), tonumber(take())
  local is_known = redis.call('HSETNX', key, 'event', event) == 0
  for _ = 1, receipts do
    local name, steps, written, delivered = take(), tonumber(take()), take(), take()
    local seen, sent, branches, step = take(), take(), take(), tonumber(take())
    local old = redis.call('HGET', key, name) or '0::::::' .. step
    local s, w, d, e, q, b, p = string.match(
      old, '^(%d*):(%d*):(%d*):(%d*):(%d*):([%d,]*):(%d*)$')
    p = tonumber(p)
    if q == '' and p < step then
      w, d, e, p = '', '', '', step
    elseif sent == '' and step < p then
      delivered, seen = '', ''
    else
      p = math.min(p, step)
    end
    steps = bit.bor(tonumber(s), steps)
    d, e, q, b = first(d, delivered), first(e, seen), first(q, sent), first(b, branches)
    w = first(first(w, written), d)  -- who has it was written it
    redis.call('HSET', key, name, table.concat({steps, w, d, e, q, b, p}, ':'))
    for each = 0, 5 do
      if q ~= '' and d ~= '' and bit.band(steps, bit.lshift(1, each)) ~= 0 then
        redis.call('HSETNX', key, 'confirmed:' .. each, d)
      end
    end
  end
  if not is_known then redis.call('PEXPIREAT', key, expires) end
end
return #KEYS
"""

# Without the right to TIME its time is empty: the clocks of all machines are to be the same then.
_LOOK_UP: Final = """
local now = redis.pcall('TIME')
if now.err then now = {} end
return {now, redis.call('HGETALL', KEYS[1])}
"""


def key_prefix(name: str) -> str:
    """What the keys of a stream's events begin with. They are in its slot."""
    return f"{{{hash_tag(name)}}}:receipts:"


class ReceiptStore:
    """Writes and reads receipts. ``names`` are those of the streams, by their tags."""

    def __init__(self, commands: Commands, names: Mapping[Stream, str]) -> None:
        self._commands = commands
        self._names = names
        self._throttled_log = ThrottledLog(log)

    def key(self, place: Place) -> str:
        """The key of an event's hash. Raises :exc:`KeyError` for a stream that is not ours."""
        prefix = key_prefix(self._names[place.stream])
        return f"{prefix}{place.stream}:{entry_id(place.position)}"

    async def write(self, changes: Mapping[Place, ReceiptChange]) -> bool:
        """Write receipts; False if Redis is unavailable: then some may have been written.

        In a Cluster, all are of events of one stream.
        """
        try:
            await self._write(changes)
        except Unavailable as error:
            self._throttled_log.warning("receipts not written yet", error=str(error))
            return False
        return True

    async def _write(self, changes: Mapping[Place, ReceiptChange]) -> None:
        places = list(changes)
        for n in range(0, len(places), _MOST):
            some = places[n : n + _MOST]
            arguments = [each for place in some for each in _arguments(changes[place])]
            await self.evaluate(_WRITE, [self.key(place) for place in some], arguments)

    async def evaluate(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[str | bytes | int] = (),
        fits: Callable[[Any], bool] = lambda reply: True,
        seconds: float = TIMEOUT,
    ) -> Any:
        """Run a script on keys of one server. Raises :exc:`Unavailable`.

        Neither a right that only receipts need nor, in a Cluster, a server that only some streams
        are on costs others anything: each hash tag has a breaker of its own.
        """
        return await self._commands.evaluate(
            script,
            keys,
            arguments,
            fits=fits,
            seconds=seconds,
            group=f"receipts {hash_tag(keys[0])}",
        )

    async def read(self, place: Place) -> Receipts | None:
        """What is known of an event, at least that it is in the stream; None if that is not so.

        Raises :exc:`Unavailable`, and :exc:`KeyError` for a stream that is not ours.
        """
        fields = await self.evaluate("return redis.call('HGETALL', KEYS[1])", [self.key(place)])
        if (receipts := read_hash(fields)) is not None:
            return receipts
        about = (await self.look_up_entry(place)).about
        return None if about is None else Receipts(about)

    async def look_up(self, place: Place) -> Known:
        """What Redis knows of an event, receipts and entry.

        Raises :exc:`Unavailable`, and :exc:`KeyError` for a stream that is not ours.
        """
        moment, fields = await self.evaluate(_LOOK_UP, [self.key(place)])
        now = int(moment[0]) * 1000 + int(moment[1]) // 1000 if moment else _now()
        return await self._read_entry(place, now, read_hash(fields))

    async def look_up_entry(self, place: Place) -> Known:
        """As :meth:`look_up`, where no receipts are kept: no right to their keys is needed."""
        return await self._read_entry(place, _now(), None)

    async def _read_entry(self, place: Place, now: int, receipts: Receipts | None) -> Known:
        wanted = entry_id(place.position)
        entries = await self._commands.read_back(self._names[place.stream], wanted, 1)
        if not entries:
            return Known(place, now, None, receipts, is_trimmed=True)
        [(found, fields)] = entries
        if found != wanted.encode() or fields is None:
            return Known(place, now, None, receipts)
        return Known(place, now, _event(place, fields), receipts)


def _now() -> int:
    return int(time() * 1000)


def _event(place: Place, fields: Mapping[bytes, bytes]) -> Event | None:
    """The event in an entry; None if it is not valid."""
    try:
        return parse_event(
            fields.get(b"data", b""),
            channel="",
            received_at=0.0,
            stream=place.stream,
            position=place.position,
        )
    except InvalidEvent:
        return None


def _arguments(change: ReceiptChange) -> Iterable[str | bytes | int]:
    yield msgspec.json.encode(change.event)
    yield change.expires
    yield len(change.by)
    for who, receipt in change.by.items():
        yield f"{_BY}{who.endpoint}:{who.id}"
        yield receipt.steps
        for moment in (receipt.written, receipt.delivered, receipt.seen, receipt.sent):
            yield "" if moment is None else moment
        yield ",".join(map(str, sorted(receipt.branches)))
        yield receipt.step


def read_hash(fields: Sequence[bytes]) -> Receipts | None:
    """Read the fields of a hash, each followed by its value."""
    pairs = zip(fields[::2], fields[1::2], strict=True)
    values = {name.decode(): value.decode() for name, value in pairs}
    if "event" not in values:
        return None
    found = Receipts(msgspec.json.decode(values.pop("event"), type=TrackedEvent))
    for name, value in values.items():
        kind, _, rest = name.partition(":")
        if kind == "by":
            endpoint, _, number = rest.partition(":")
            steps, *texts, branches, step = value.split(":")
            written, delivered, seen, sent = (int(text) if text else None for text in texts)
            if sent is None:  # it has confirmed what nobody has sent it, or not told us yet
                continue
            found.by[Recipient(endpoint, number)] = Receipt(
                int(steps), sent, written, delivered, seen, _read_branches(branches), int(step)
            )
        elif kind == "confirmed":
            found.confirmed[int(rest)] = int(value)
        elif kind == "step":
            found.steps[int(rest)] = int(value)
    return found


def _read_branches(text: str) -> frozenset[BranchId]:
    return frozenset(BranchId(int(each)) for each in text.split(",") if each)
