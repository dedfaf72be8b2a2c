"""How far the clock of another machine is ahead of ours."""

import math
from typing import Final

_WHILE: Final = 60.0  # seconds


class ClockOffset:
    """The offset of another clock, from what it showed when it was asked.

    An answer is always read later than the clock was: (its time - ours then) is less than the
    offset, by what the way and our own loop took. So the largest is the closest one. Clocks drift,
    and are set, so it is the largest of the last one to two minutes.
    """

    def __init__(self) -> None:
        self._since = self._before = self._largest = -math.inf

    def note(self, ahead: float, now: float) -> float:
        """Note (its time - ours) of an answer that was read ``now``; return the offset."""
        if now - self._since >= _WHILE:
            self._since, self._before, self._largest = now, self._largest, ahead
        self._largest = max(self._largest, ahead)
        return max(self._before, self._largest)
