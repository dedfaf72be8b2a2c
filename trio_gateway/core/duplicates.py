"""Duplicates: one content on several channels is one event."""

from collections import deque
from math import inf
from typing import Final

from .events import Event

CONTENT_WINDOW: Final = 5.0  # seconds
ID_WINDOW: Final = 300.0
_NEVER: Final = (-inf, 0)
_FORGETS_EVERY: Final = 0.1  # seconds
MOST_REMEMBERED: Final = 500_000  # of either kind; past it the oldest are forgotten

# A content's recent occurrences: when each was first heard, on which channels since, its mark.
_Occurrence = tuple[float, tuple[str, ...], int]


class Duplicates:
    """Remembers what was heard lately; times are seconds on the runtime's clock.

    Backends publish one event on several channels, with only ``ts`` differing: a content's copy
    joins the oldest occurrence within five seconds that its channel has not carried yet. The same
    content twice on one channel is two occurrences, hence two events. An event with an ``id`` is
    known by that alone, for five minutes, per tenant.

    Contents are remembered by a 64-bit hash: among 300,000 of them the odds that two share one
    are 1 in 400 million.
    """

    def __init__(self) -> None:
        # When the first of the events that are still to come was heard, if they do not come in
        # the order of their hearing: what it may be a copy of must be remembered till then.
        self.oldest = inf
        self._ids: dict[int, tuple[float, int]] = {}
        self._contents: dict[int, tuple[_Occurrence, ...]] = {}
        # By first hearing. A dictionary keeps its order, too, but to find the oldest it steps over
        # every place from which one was taken.
        self._ids_in_order: deque[tuple[float, int]] = deque()
        self._contents_in_order: deque[tuple[float, int]] = deque()
        self._forgets_at = -inf

    def __len__(self) -> int:
        return len(self._ids) + len(self._contents)

    def is_duplicate(self, event: Event) -> bool:
        """Whether this event has been heard before; if not, it is remembered from now on."""
        return self.first(event) is not None

    def first(self, event: Event, mark: int = 0) -> int | None:
        """The mark with which this event was remembered when it was first heard, or None if it is
        now: then it is remembered with this one.
        """
        now = event.heard_at
        most = len(self._contents if event.id is None else self._ids)
        if now >= self._forgets_at or most > MOST_REMEMBERED:
            self._forgets_at = now + _FORGETS_EVERY
            self._forget(min(now, self.oldest))
        if event.id is not None:
            key = hash((event.tenant, event.id))
            heard_at, before = self._ids.get(key, _NEVER)
            if heard_at + ID_WINDOW >= now:
                return before
            self._ids[key] = now, mark
            self._ids_in_order.append((now, key))
            return None
        key = hash(_content(event))
        channel = event.channel
        occurrences = self._contents.get(key, ())
        for n, (heard_at, channels, before) in enumerate(occurrences):
            if abs(now - heard_at) <= CONTENT_WINDOW and channel not in channels:
                one = heard_at, (*channels, channel), before
                self._contents[key] = (*occurrences[:n], one, *occurrences[n + 1 :])
                return before
        self._contents[key] = (*occurrences, (now, (channel,), mark))
        self._contents_in_order.append((now, key))
        return None

    def _forget(self, now: float) -> None:
        order, contents = self._contents_in_order, self._contents
        while order and (order[0][0] + CONTENT_WINDOW < now or len(order) > MOST_REMEMBERED):
            _, key = order.popleft()
            if left := contents[key][1:]:
                contents[key] = left
            else:
                del contents[key]
        order, ids = self._ids_in_order, self._ids
        while order and (order[0][0] + ID_WINDOW < now or len(order) > MOST_REMEMBERED):
            heard_at, key = order.popleft()
            if ids[key][0] == heard_at:  # it was not heard again since
                del ids[key]


def _content(event: Event) -> tuple[bytes, ...]:
    """The payload without the value of its own, outermost ``ts``."""
    payload, ts = event.payload, event.ts
    if not ts:
        return (payload,)
    # Few events hold the four characters "ts" with quotes more than once: then the one value
    # behind them is the one msgspec found. If there are more, find the one at depth one.
    start = payload.find(b'"ts"')
    if start < 0 or payload.find(b'"ts"', start + 4) >= 0:
        start = _outermost_ts(payload)
    value = payload.find(ts, start + 4) if start >= 0 else -1
    if value < 0 or ((between := payload[start + 4 : value]) != b":" and between.strip() != b":"):
        # Written with escapes, or twice: then copies must agree to the byte.
        return (payload,)
    return payload[:start], payload[value + len(ts) :]


def _outermost_ts(payload: bytes) -> int:
    """Where the key ``"ts"`` stands at depth one of a valid JSON object, or -1."""
    depth, at, found = 0, 0, -1
    while at < len(payload):
        byte = payload[at]
        if byte == 0x22:  # a string: on to its end
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
