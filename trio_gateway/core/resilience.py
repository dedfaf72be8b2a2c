"""Resilience: when to leave a failing dependency alone, and for how long."""

import random
from enum import IntEnum
from typing import Final

SOON: Final = 1.0  # seconds


class State(IntEnum):
    """Of a breaker; the numbers are those of the metric."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Breaker:
    """Opens after ``threshold`` failures in a row; ``recovery`` seconds later one try is let
    through, which closes it or opens it again; :data:`SOON` later, where that is sooner, after a
    failure that says so. Times are seconds on the runtime's clock.
    """

    def __init__(self, threshold: int, recovery: float) -> None:
        self._threshold = threshold
        self._recovery = recovery
        self._opened_at = 0.0
        self.state = State.CLOSED
        self.failures = 0  # in a row

    def wait(self, now: float) -> float:
        """Seconds until the next try is allowed; 0 means now."""
        if self.state is not State.OPEN:
            return 0.0
        return max(0.0, self._opened_at + self._recovery - now)

    def try_now(self, now: float) -> bool:
        """Whether a try is allowed now. The first one after the recovery time half-opens it, and
        until that one has ended no other is.
        """
        if self.state is State.HALF_OPEN:
            return False
        if self.wait(now) > 0:
            return False
        if self.state is State.OPEN:
            self.state = State.HALF_OPEN
        return True

    def succeeded(self) -> None:
        self.state = State.CLOSED
        self.failures = 0

    def failed(self, now: float, *, soon: bool = False) -> None:
        """A try failed; ``soon`` if it was answered at once and nothing is spared by waiting."""
        self.failures += 1
        if self.state is State.HALF_OPEN or self.failures >= self._threshold:
            self.state = State.OPEN
            self._opened_at = now - max(0.0, self._recovery - SOON) if soon else now

    def abandoned(self, now: float) -> None:
        """The try was cancelled before it had an outcome: the next one may try at once."""
        if self.state is State.HALF_OPEN:
            self.state = State.OPEN
            self._opened_at = now - self._recovery


class Backoff:
    """Full jitter: a random time up to a bound that doubles with each failure.

    See https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/.
    """

    def __init__(self, first: float = 0.1, most: float = 5.0) -> None:
        self._first = first
        self.most = most
        self._random = random.Random()  # noqa: S311 - spreads load, keeps no secret

    def after(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row."""
        bound = min(self.most, self._first * 2 ** min(failures, 30))
        return self._random.uniform(0, bound)
