"""Addresses: how many connections one has, and how often it failed to get in."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from ..core.closing import Close, Rejected
from ..core.limits import RateLimit

_FAILURE_WINDOW: Final = 60.0  # seconds
_MOST_REMEMBERED: Final = 10_000  # addresses that failed lately; past it the oldest is forgotten


def client_address(peer: str, forwarded_for: str | None, hops: int) -> str:
    """Whose connection this is: the peer's, or what ``hops`` proxies of ours say.

    Each of them appends the address it saw to ``X-Forwarded-For``; what stands before that is
    the client's own word and counts for nothing.
    """
    if not hops or not forwarded_for:
        return peer
    addresses = [each.strip() for each in forwarded_for.split(",")]
    return addresses[-hops] if len(addresses) >= hops else addresses[0]


class Addresses:
    """Limits by address; 0 is no limit."""

    def __init__(self, *, connections: int = 0, failures: int = 0) -> None:
        self._most_connections = connections
        self._most_failures = failures
        self._connected: Counter[str] = Counter()
        self._failures: OrderedDict[str, RateLimit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._connected) + len(self._failures)

    @contextmanager
    def entered(self, address: str, now: float) -> Iterator[None]:
        """Count a connection while it lasts, or raise :exc:`Rejected` for one too many, or for an
        address that keeps failing. ``now`` is on Trio's clock.
        """
        if not self._most_connections and not self._most_failures:
            yield
            return
        failures = self._failures.get(address)
        if failures is not None and failures.is_full(now):
            raise Rejected(Close.RATE_LIMITED, "too many failed logins", "failed_logins")
        if self._most_connections and self._connected[address] >= self._most_connections:
            raise Rejected(
                Close.SERVER_OVERLOADED, "too many connections of this address", "address_limit"
            )
        self._connected[address] += 1
        try:
            yield
        finally:
            self._connected[address] -= 1
            if not self._connected[address]:
                del self._connected[address]

    def failed(self, address: str, now: float) -> None:
        """It brought a credential that is none."""
        if not self._most_failures:
            return
        if (failures := self._failures.pop(address, None)) is None:
            failures = RateLimit(self._most_failures, _FAILURE_WINDOW)
        failures.exceeded(now)
        self._failures[address] = failures
        if len(self._failures) > _MOST_REMEMBERED:
            self._failures.popitem(last=False)
