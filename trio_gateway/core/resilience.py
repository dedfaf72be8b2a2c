"""Circuit breaker and back-off: when to stop calling a failing dependency, and for how long."""

import random
from enum import IntEnum
from typing import Final

SOON: Final = 1.0  # seconds


class State(IntEnum):
    """The state of a circuit breaker; the numbers are the values of the metric."""

    CLOSED = 0
    OPEN = 1
    HALF_OPEN = 2


class Breaker:
    """A circuit breaker.

    It opens after ``threshold`` failures in a row. After ``recovery`` seconds it allows one
    attempt, which closes it or opens it again. After a failure that was reported as ``soon``, that
    is after :data:`SOON` seconds at most. Times are seconds on the runtime's clock.
    """

    def __init__(self, threshold: int, recovery: float) -> None:
        self._threshold = threshold
        self._recovery = recovery
        self._opened_at = 0.0
        self.state = State.CLOSED
        self.failures = 0  # in a row

    def wait(self, now: float) -> float:
        """Seconds until the next attempt is allowed; 0 means now."""
        if self.state is not State.OPEN:
            return 0.0
        return max(0.0, self._opened_at + self._recovery - now)

    def try_now(self, now: float) -> bool:
        """Whether an attempt is allowed now.

        The first attempt after the recovery time half-opens the breaker; no other is allowed until
        that one has ended.
        """
        if self.state is State.HALF_OPEN:
            return False
        if self.wait(now) > 0:
            return False
        if self.state is State.OPEN:
            self.state = State.HALF_OPEN
        return True

    def succeeded(self) -> None:
        """An attempt succeeded: close the breaker."""
        self.state = State.CLOSED
        self.failures = 0

    def failed(self, now: float, *, soon: bool = False) -> None:
        """An attempt failed. ``soon``: it failed at once, so a long wait would save nothing."""
        self.failures += 1
        if self.state is State.HALF_OPEN or self.failures >= self._threshold:
            self.state = State.OPEN
            self._opened_at = now - max(0.0, self._recovery - SOON) if soon else now

    def retry(self, now: float) -> None:
        """There is reason to believe that it works again: the next attempt is allowed at once."""
        if self.state is State.OPEN:
            self._opened_at = now - self._recovery

    def abandoned(self, now: float) -> None:
        """The attempt was cancelled before it had an outcome: the next one is allowed at once."""
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
        """Seconds to wait after this number of failures in a row."""
        bound = min(self.most, self._first * 2 ** min(failures, 30))
        return self._random.uniform(0, bound)
