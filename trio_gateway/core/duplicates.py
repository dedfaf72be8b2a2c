"""Duplicates: one content on several channels is one event."""

import math
from collections import deque
from collections.abc import Iterator
from typing import Final

from .events import Event

CONTENT_WINDOW: Final = 5.0  # seconds
ID_WINDOW: Final = 300.0
_NEVER: Final = (float("-inf"), 0)
MOST_REMEMBERED: Final = 500_000  # of either kind; past it the oldest are forgotten

# A content's recent occurrences: when each was first heard, on which channels since, its mark.
_Occurrence = tuple[float, set[str], int]


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
        self.oldest = math.inf
        self._ids: dict[int, tuple[float, int]] = {}
        self._contents: dict[int, list[_Occurrence]] = {}
        self._order: deque[tuple[float, int]] = deque()  # by first hearing

    def __len__(self) -> int:
        return len(self._ids) + len(self._contents)

    def is_duplicate(self, event: Event) -> bool:
        """Whether this event has been heard before; if not, it is remembered from now on."""
        return self.first(event) is not None

    def first(self, event: Event, mark: int = 0) -> int | None:
        """The mark with which this event was remembered when it was first heard, or None if it is
        now: then it is remembered with this one.
        """
        self._forget(min(event.heard_at, self.oldest))
        if event.id is not None:
            key = hash((event.tenant, event.id))
            heard_at, before = self._ids.get(key, _NEVER)
            if heard_at + ID_WINDOW >= event.heard_at:
                return before
            self._ids.pop(key, None)  # so that it moves to the end
            self._ids[key] = event.heard_at, mark
            return None
        key = hash(tuple(_content(event)))
        occurrences = self._contents.get(key)
        if occurrences is None:
            self._contents[key] = [(event.heard_at, {event.channel}, mark)]
        else:
            for heard_at, channels, before in occurrences:
                if abs(event.heard_at - heard_at) <= CONTENT_WINDOW and (
                    event.channel not in channels
                ):
                    channels.add(event.channel)
                    return before
            occurrences.append((event.heard_at, {event.channel}, mark))
        self._order.append((event.heard_at, key))
        return None

    def _forget(self, now: float) -> None:
        while self._order and (
            self._order[0][0] + CONTENT_WINDOW < now or len(self._order) > MOST_REMEMBERED
        ):
            _, key = self._order.popleft()
            occurrences = self._contents[key]
            del occurrences[0]
            if not occurrences:
                del self._contents[key]
        while self._ids and (
            (oldest := next(iter(self._ids.items())))[1][0] + ID_WINDOW < now
            or len(self._ids) > MOST_REMEMBERED
        ):
            del self._ids[oldest[0]]


def _content(event: Event) -> Iterator[bytes]:
    """The payload without the value of its own, outermost ``ts``."""
    payload, ts = event.payload, event.ts
    if not ts:
        yield payload
        return
    # Few events hold the four characters "ts" with quotes more than once: then the one value
    # behind them is the one msgspec found. If there are more, find the one at depth one.
    start = payload.index(b'"ts"') if payload.count(b'"ts"') == 1 else _outermost_ts(payload)
    value = payload.find(ts, start + 4) if start >= 0 else -1
    if value < 0 or payload[start + 4 : value].strip() != b":":
        # Written with escapes, or twice: then copies must agree to the byte.
        yield payload
        return
    yield payload[:start]
    yield payload[value + len(ts) :]


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
