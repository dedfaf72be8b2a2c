"""Limits: how much a client may say, and how many dropped events are an alarm."""

from collections import deque


class RateLimit:
    """At most ``limit`` messages in any ``window`` seconds."""

    __slots__ = ("_times", "_window")

    def __init__(self, limit: int, window: float) -> None:
        self._times: deque[float] = deque(maxlen=limit)
        self._window = window

    def exceeded(self, now: float) -> bool:
        """Count a message; whether it is one too many."""
        over = self.is_full(now)
        self._times.append(now)
        return over

    def is_full(self, now: float) -> bool:
        """Whether one more message would be one too many."""
        times = self._times
        return len(times) == times.maxlen and now - times[0] < self._window


class DropAlarm:
    """Raised when more than ``threshold`` (a share) of the events of the last ``window`` seconds
    were dropped; at most once per ``cooldown`` seconds.
    """

    def __init__(self, window: float, threshold: float, cooldown: float) -> None:
        self._window = window
        self._threshold = threshold
        self._cooldown = cooldown
        self._seconds: deque[list[float]] = deque()  # [when, heard, dropped], one a second
        self._raised_at = float("-inf")
        self.heard = 0  # within the window
        self.dropped = 0

    def note(self, now: float, *, dropped: bool) -> bool:
        """Count an event; whether it is time to raise the alarm."""
        seconds = self._seconds
        if not seconds or now - seconds[-1][0] >= 1.0:
            seconds.append([now, 0, 0])
            while seconds[0][0] + self._window < now:
                _, old_heard, old_dropped = seconds.popleft()
                self.heard -= int(old_heard)
                self.dropped -= int(old_dropped)
        seconds[-1][1] += 1
        self.heard += 1
        if not dropped:
            return False
        seconds[-1][2] += 1
        self.dropped += 1
        if self.dropped <= self.heard * self._threshold:
            return False
        if now - self._raised_at < self._cooldown:
            return False
        self._raised_at = now
        return True


class LogLimit:
    """Lets one log line of a kind through per ``interval`` seconds, and counts the others."""

    def __init__(self, interval: float = 1.0) -> None:
        self._interval = interval
        self._logged_at: dict[str, float] = {}
        self._held_back: dict[str, int] = {}

    def allows(self, kind: str, now: float) -> int | None:
        """None if this line is one too many, else how many of its kind were held back before it.

        ``kind`` must be one of a few: it is remembered.
        """
        if now - self._logged_at.get(kind, float("-inf")) < self._interval:
            self._held_back[kind] = self._held_back.get(kind, 0) + 1
            return None
        self._logged_at[kind] = now
        return self._held_back.pop(kind, 0)
