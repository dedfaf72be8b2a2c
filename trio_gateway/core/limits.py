"""Limits: how much a client or a tenant may send, and when dropped events are an alarm."""

from collections import deque
from collections.abc import Hashable
from typing import Final

_FEW: Final = 1000  # tenants below which no sweep is needed
_ROUNDING: Final = 1e-9  # seconds


class RateLimit:
    """At most ``limit`` messages in any ``window`` seconds."""

    __slots__ = ("_limit", "_oldest", "_times", "_window")

    def __init__(self, limit: int, window: float) -> None:
        self._limit = limit
        self._window = window
        # A ring of the last messages once it is full. A deque has room for 64 from the start, and
        # every client has one of these.
        self._times: list[float] = []
        self._oldest = 0  # in the ring

    def exceeded(self, now: float) -> bool:
        """Count a message; return whether it exceeds the limit."""
        times = self._times
        if times and now - times[self._oldest - 1] >= self._window:  # the last is too long ago
            times.clear()
            self._oldest = 0
        if len(times) < self._limit:
            times.append(now)
            return False
        over = now - times[self._oldest] < self._window
        times[self._oldest] = now
        self._oldest = (self._oldest + 1) % self._limit
        return over

    def is_full(self, now: float) -> bool:
        """Whether one more message would exceed the limit."""
        times = self._times
        return len(times) == self._limit and now - times[self._oldest] < self._window


class TenantRate:
    """At most ``rate`` events per second of each tenant.

    A token bucket per tenant holds the events of one second, and at least one event. Only tenants
    that were active recently are remembered.
    """

    def __init__(self, rate: float) -> None:
        self._interval = 1 / rate
        self._depth = max(1.0, self._interval) - self._interval  # seconds ahead of its rate
        self._ahead: dict[int, float] = {}  # the time at which each tenant's bucket is full again
        self._sweep_at = _FEW

    def __len__(self) -> int:
        return len(self._ahead)

    def exceeded(self, tenant: int, now: float) -> bool:
        """Count an event; return True, and do not count it, if it exceeds the rate."""
        until = self._ahead.get(tenant, now)
        if until - now > self._depth + _ROUNDING:
            return True
        self._ahead[tenant] = max(until, now) + self._interval
        if len(self._ahead) > self._sweep_at:
            self._ahead = {who: until for who, until in self._ahead.items() if until > now}
            self._sweep_at = max(_FEW, 2 * len(self._ahead))
        return False


class Allowance:
    """For each user or tenant, up to ``most`` of something, which grows back at a rate a second."""

    def __init__(self, most: float, rate: float) -> None:
        self._most = most
        self._rate = rate
        self._whole_at: dict[Hashable, float] = {}
        self._sweep_at = _FEW

    def left(self, who: Hashable, now: float) -> float:
        """What can still be used; at most 0 if it is used up."""
        return self._most - self._rate * max(0.0, self._whole_at.get(who, now) - now)

    def use(self, who: Hashable, amount: float, now: float) -> None:
        """Use some of it, also if less is left."""
        self._whole_at[who] = max(now, self._whole_at.get(who, now)) + amount / self._rate
        if len(self._whole_at) > self._sweep_at:
            self._whole_at = {who: at for who, at in self._whole_at.items() if at > now}
            self._sweep_at = max(_FEW, 2 * len(self._whole_at))


class DropAlarm:
    """Raised when more than ``threshold`` (a share) of the events of the last ``window`` seconds
    were dropped; at most once per ``cooldown`` seconds, and once a second.
    """

    def __init__(self, window: float, threshold: float, cooldown: float) -> None:
        self._window = window
        self._threshold = threshold
        self._cooldown = max(1.0, cooldown)
        self._seconds: deque[list[float]] = deque()  # [when, heard, dropped], one a second
        self._raised_at = float("-inf")
        self.heard = 0  # within the window
        self.dropped = 0

    def note(self, now: float, *, dropped: bool, events: int = 1) -> bool:
        """Count events; return whether to raise the alarm now."""
        seconds = self._seconds
        if not seconds or now - seconds[-1][0] >= 1.0:
            seconds.append([now, 0, 0])
            while seconds[0][0] + self._window < now:
                _, old_heard, old_dropped = seconds.popleft()
                self.heard -= int(old_heard)
                self.dropped -= int(old_dropped)
        seconds[-1][1] += events
        self.heard += events
        if not dropped:
            return False
        seconds[-1][2] += events
        self.dropped += events
        if self.dropped <= self.heard * self._threshold:
            return False
        if now - self._raised_at < self._cooldown:
            return False
        self._raised_at = now
        return True
