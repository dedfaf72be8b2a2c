"""Duplicates: the same content on several channels is one event."""

from array import array
from collections import deque
from collections.abc import Iterator, Sequence
from math import inf
from typing import Final, NamedTuple

from .events import WHITE_SPACE, Event, payload_of, ts_of

CONTENT_WINDOW: Final = 5.0  # seconds
ID_WINDOW: Final = 300.0
_NEVER: Final = (-inf, 0)
_TS: Final = b'"ts"'
_FORGETS_EVERY: Final = 0.1  # seconds
MOST_REMEMBERED: Final = 500_000  # ids, and as many contents; beyond that the oldest are forgotten
MOST_WAITING_BYTES: Final = (
    67_108_864  # of payloads that wait; those of durable events are the history's
)
_FREED_AT_ONCE: Final = 300  # payloads and lanes
_LONG: Final = 100  # characters of an id; of a longer one only a hash is kept
# How many occurrences that were received long after an event are searched for it. There are such
# only while one source lags behind another by more than the window.
_MOST_SKIPPED: Final = 64
_FEW: Final = 16

_STORED: Final = 1  # the lowest bit of an occurrence's state; the others are its mark
_Occurrence = tuple[float, int]  # when it was first received, its state
_Once = tuple[float, str, int]  # time, channel and state of a content that was received once
_Branch = tuple[int, int]  # tenant and branch


class Found(NamedTuple):
    """An event that was received before."""

    mark: int  # that it was given when it was first received
    was_stored: bool  # whether a durable copy of it was received before


class _Content:
    """The occurrences of one content, the oldest first, and which channels have carried them.

    An event costs the same however often its content was received: each channel carries the
    occurrences in order, so one number per channel says which ones it has not carried yet.
    """

    __slots__ = ("_channels", "_first", "_occurrences", "_prune_at", "_skipped")

    def __init__(self, once: _Once) -> None:
        received_at, channel, state = once
        self._occurrences: deque[_Occurrence] = deque([(received_at, state)])
        self._first = 0  # the number of the oldest; they are numbered in order
        self._channels = {channel: 1}  # the next number that each channel has not carried
        self._skipped: dict[str, deque[int]] = {}  # earlier ones that it has not carried
        self._prune_at = _FEW

    @property
    def size(self) -> int:
        """What counts against :data:`MOST_REMEMBERED`."""
        return len(self._occurrences) + len(self._channels)

    def join(self, now: float, channel: str, durable: bool) -> int | None:
        """Let the channel carry the oldest occurrence in the window that it has not carried.

        Returns the state that this occurrence had, or None if there is none.
        """
        for number in self._skipped.get(channel, ()):
            if number >= self._first:
                received_at, _ = self._occurrences[number - self._first]
                if abs(now - received_at) <= CONTENT_WINDOW:
                    self._skipped[channel].remove(number)
                    return self._note(number, durable)
        end = self._first + len(self._occurrences)
        number = max(self._channels.get(channel, 0), self._first)
        skipped: list[int] = []
        while number < end and len(skipped) < _MOST_SKIPPED:
            received_at, _ = self._occurrences[number - self._first]
            number += 1
            if abs(now - received_at) <= CONTENT_WINDOW:
                self._carry(channel, number, skipped)
                return self._note(number - 1, durable)
            if received_at > now:
                skipped.append(number - 1)
        return None

    def _note(self, number: int, durable: bool) -> int:
        """Return the state of an occurrence; note in it that a durable copy was received."""
        received_at, state = self._occurrences[number - self._first]
        if durable:
            self._occurrences[number - self._first] = received_at, state | _STORED
        return state

    def add(self, now: float, channel: str, state: int) -> None:
        """Add an occurrence that this channel is the first to carry."""
        number = max(self._channels.get(channel, 0), self._first)
        end = self._first + len(self._occurrences)
        skipped = []
        if number < end:
            later = range(number, min(end, number + _MOST_SKIPPED))
            skipped = [n for n in later if self._occurrences[n - self._first][0] > now]
        self._occurrences.append((now, state))
        self._carry(channel, end + 1, skipped)

    def forget_first(self) -> bool:
        """Forget the oldest occurrence; return whether none is left."""
        self._occurrences.popleft()
        self._first += 1
        return not self._occurrences

    def _carry(self, channel: str, number: int, skipped: list[int]) -> None:
        self._channels[channel] = number
        if skipped:
            left = self._skipped.setdefault(channel, deque(maxlen=_MOST_SKIPPED))
            left.extend(skipped)
        if len(self._channels) > self._prune_at:
            # A channel that has carried none of them is like one that was never seen.
            first = self._first
            self._channels = {c: n for c, n in self._channels.items() if n > first}
            self._skipped = {c: s for c, s in self._skipped.items() if s and s[-1] >= first}
            self._prune_at = max(_FEW, 2 * len(self._channels))


class _Lane:
    """The events of one branch in one generation. They are not compared if they cannot be copies.

    While all events of a branch come on one channel, none of them is a copy of another: then
    they wait, and their contents need not be hashed.
    """

    __slots__ = ("channel", "compares", "several", "waiting")

    def __init__(self, channel: str, compares: bool) -> None:
        self.channel = channel  # the first
        self.several = False  # channels, in this generation
        self.compares = compares  # what comes is compared, and does not wait
        self.waiting = array("L")  # where in the generation


class _Generation:
    """The lanes of some seconds, and the events that wait in them: no object for each of these."""

    def __init__(self) -> None:
        self.lanes: dict[_Branch, _Lane] = {}
        self.newest = -inf  # receipt
        self.payloads: list[bytes] = []  # or frames
        self.times = array("d")  # of receipt
        self.states = array("q")
        self.bytes = 0  # of payloads

    def take_waiting(self, lane: _Lane) -> Iterator[tuple[bytes, float, int]]:
        """Payload, time of receipt and state of what waits in a lane, and does so no longer."""
        for n in lane.waiting:
            held, self.payloads[n] = self.payloads[n], b""
            self.bytes -= len(held)
            yield payload_of(held), self.times[n], self.states[n]
        del lane.waiting[:]


class Duplicates:
    """Remembers recent events; times are seconds on the runtime's clock.

    - Backends publish one event on several channels, and only the value of ``ts`` differs. A copy
      joins the oldest occurrence of its content within 5 seconds that its channel has not carried
      yet. The same content twice on one channel is two occurrences, so two events.
    - An event with an ``id`` is identified by that alone, for 5 minutes, per tenant.

    Contents are remembered by a 64-bit hash: the odds that two of 300,000 share one are 1 in
    400 million. Hashing is most of the cost, so it waits until a branch has events on a second
    channel: equal contents are of one branch. What waits is dropped in two generations. When one
    is dropped, the next event is received more than 5 seconds after all of it, so what a lane must
    be compared with is in its own generation and in the one before.
    """

    def __init__(self) -> None:
        # When the oldest event that is still queued was received. Fair queueing does not keep
        # the order of receipt, so entries of that age must be kept for its copies.
        self.oldest_pending = inf
        self._ids: dict[tuple[int, str | int], tuple[float, int]] = {}
        self._contents: dict[int, _Once | _Content] = {}
        # By first receipt. A dictionary keeps its order, too, but finding its oldest key steps
        # over every slot from which a key was deleted.
        self._ids_in_order: deque[tuple[float, tuple[int, str | int]]] = deque()
        self._contents_in_order: deque[tuple[float, int]] = deque()
        self._extra = 0  # what the contents hold besides one occurrence and one channel each
        self._forgets_at = -inf
        self._young, self._old = _Generation(), _Generation()
        self._dropped: list[object] = []  # freed little by little

    def __len__(self) -> int:
        waiting = sum(len(lane.waiting) for g in self._generations for lane in g.lanes.values())
        return len(self._ids) + len(self._contents) + waiting

    @property
    def _generations(self) -> tuple[_Generation, _Generation]:
        return self._old, self._young

    def is_duplicate(self, event: Event) -> bool:
        """Whether this event was received before; if not, it is remembered from now on."""
        return self.find_or_add(event) is not None

    def find_or_add(self, event: Event, mark: int = 0, held: bytes | None = None) -> Found | None:
        """Return what is known of this event if it was received before.

        Returns None if it was not received before: then it is remembered with this ``mark``.
        ``held`` is its payload or its frame, whichever others hold anyway.
        """
        return self.find_or_add_all([event], mark, [event.payload if held is None else held])[0]

    def find_or_add_all(
        self, events: Sequence[Event], mark: int, held: Sequence[bytes]
    ) -> list[Found | None]:
        """As :meth:`find_or_add`, for one event after the other."""
        found: list[Found | None] = []
        if events and (now := events[0].received_at) >= self._forgets_at:
            self._forgets_at = now + _FORGETS_EVERY
            self._forget(min(now, self.oldest_pending))
        if self._dropped:
            del self._dropped[-_FREED_AT_ONCE - 2 * len(events) :]
        states, young = (mark << 1, mark << 1 | _STORED), self._young
        payloads, times, lanes = young.payloads, young.times, young.lanes
        for event, bytes_held in zip(events, held, strict=True):
            now, state = event.received_at, states[event.durable]
            if event.id is not None:
                found.append(_found(self._first_of_id(event.tenant, event.id, now, state)))
                continue
            branch, channel = (event.tenant, event.branch), event.channel
            lane = lanes.get(branch)
            if lane is None or (lane.channel != channel and not lane.several):
                lane = self._open_lane(branch, channel)
            if now > young.newest:
                young.newest = now
            if lane.compares:
                key = _content(event.payload, bytes(event.ts))
                found.append(_found(self._compare(key, now, channel, state)))
                continue
            lane.waiting.append(len(payloads))  # nearly always
            payloads.append(bytes_held)
            times.append(now)
            young.states.append(state)
            young.bytes += len(bytes_held)
            found.append(None)
        if len(young.payloads) > MOST_REMEMBERED // 2 or young.bytes > MOST_WAITING_BYTES // 2:
            self._begin_generation()
        return found

    def _open_lane(self, branch: _Branch, channel: str) -> _Lane:
        """The lane of a branch that has none yet, or that had events on one other channel only."""
        young, old = self._young, self._old
        older = old.lanes.get(branch)
        if (lane := young.lanes.get(branch)) is None:
            compares = older is not None and (older.several or older.channel != channel)
            lane = young.lanes[branch] = _Lane(channel, compares)
        else:
            lane.several = lane.compares = True
        if lane.compares:
            for generation, each in (old, older), (young, lane):
                if each is not None:
                    for payload, received_at, state in generation.take_waiting(each):
                        key = _content(payload, ts_of(payload))
                        self._compare(key, received_at, each.channel, state)
        return lane

    def _begin_generation(self) -> None:
        """Drop the old generation, and begin another one."""
        # To free them at once would take a tenth of a second under load.
        self._dropped += self._old.payloads
        self._dropped += self._old.lanes.items()
        self._old, self._young = self._young, _Generation()

    def _compare(self, key: int, now: float, channel: str, state: int) -> int | None:
        if len(self._contents) + self._extra > MOST_REMEMBERED:
            self._forget(-inf)
        if key not in self._contents:
            self._contents[key] = now, channel, state
            self._contents_in_order.append((now, key))
            return None
        return self._first_of_content(key, now, channel, state)

    def _first_of_id(self, tenant: int, name: str, now: float, state: int) -> int | None:
        # As a tuple, since an int's hash is the int modulo 2^61-1, and tenants go beyond.
        key = tenant, name if len(name) <= _LONG else hash(name)
        received_at, before = self._ids.get(key, _NEVER)
        if received_at + ID_WINDOW >= now:
            if state & _STORED:
                self._ids[key] = received_at, before | _STORED
            return before
        self._ids[key] = now, state
        self._ids_in_order.append((now, key))
        if len(self._ids_in_order) > MOST_REMEMBERED:
            self._forget(-inf)
        return None

    def _first_of_content(self, key: int, now: float, channel: str, state: int) -> int | None:
        found = self._contents[key]
        if isinstance(found, tuple):
            found = self._contents[key] = _Content(found)
        size = found.size
        before = found.join(now, channel, bool(state & _STORED))
        if before is None:
            found.add(now, channel, state)
            self._contents_in_order.append((now, key))
        self._extra += found.size - size
        return before

    def _forget(self, now: float) -> None:
        while now > self._old.newest + CONTENT_WINDOW and (self._old.lanes or self._young.lanes):
            self._begin_generation()
        order = self._contents_in_order
        while order and (
            order[0][0] + CONTENT_WINDOW < now
            or len(self._contents) + self._extra > MOST_REMEMBERED
        ):
            _, key = order.popleft()
            found = self._contents[key]
            if isinstance(found, tuple):
                del self._contents[key]
                continue
            size = found.size
            if found.forget_first():
                del self._contents[key]
                self._extra -= size - 2
            else:
                self._extra -= 1
        ids_in_order, ids = self._ids_in_order, self._ids
        while ids_in_order and (
            ids_in_order[0][0] + ID_WINDOW < now or len(ids_in_order) > MOST_REMEMBERED
        ):
            received_at, known = ids_in_order.popleft()
            if ids[known][0] == received_at:  # it was not remembered again since
                del ids[known]


def _found(state: int | None) -> Found | None:
    return None if state is None else Found(state >> 1, bool(state & _STORED))


def _content(payload: bytes, ts: bytes) -> int:
    """A hash of a payload without ``ts``, the value of its own, outermost key of that name, and
    without white space at its end: a frame does not have that.
    """
    payload = payload.rstrip(WHITE_SPACE)
    if not ts:
        return hash(payload)
    # Few payloads contain "ts" with its quotes more than once. If it is there once, the value
    # after it is the one that msgspec found; otherwise find the one at depth one.
    if payload.count(_TS) == 1:
        before, found, after = payload.partition(b'"ts":' + ts)
        if found:
            return hash((before, after))
        start = payload.find(_TS)
    else:
        start = _outermost_ts(payload)
    value = payload.find(ts, start + 4) if start >= 0 else -1
    if value < 0 or payload[start + 4 : value].strip() != b":":
        # Written with escapes, or twice: then copies must be equal byte for byte.
        return hash(payload)
    return hash((payload[:start], payload[value + len(ts) :]))


def _outermost_ts(payload: bytes) -> int:
    """The index of the only key ``"ts"`` at depth one of a valid JSON object, or -1."""
    depth, at, found = 0, 0, -1
    while at < len(payload):
        byte = payload[at]
        if byte == 0x22:  # a string: skip to its end
            end = at + 1
            while payload[end] != 0x22:
                end += 2 if payload[end] == 0x5C else 1
            is_ts = depth == 1 and payload[at : end + 1] == b'"ts"'
            if is_ts and payload[end + 1 :].lstrip(b" \t\r\n").startswith(b":"):
                found = at if found < 0 else len(payload)
            at = end
        elif byte in b"{[":
            depth += 1
        elif byte in b"}]":
            depth -= 1
        at += 1
    return found if found < len(payload) else -1
