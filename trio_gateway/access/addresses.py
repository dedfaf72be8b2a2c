"""Addresses: how many connections one has, and how often it failed to get in."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from ..core.close_codes import Close, Rejected
from ..core.limits import RateLimit
from ..core.origins import host_of

_FAILURE_WINDOW: Final = 60.0  # seconds
_MOST_REMEMBERED: Final = 10_000  # addresses that failed lately; past it the oldest is forgotten


def client_address(peer: str, forwarded_for: str | None, hops: int) -> str:
    """Whose connection this is: the peer's, or what ``hops`` proxies of ours say.

    Each of them appends the address it saw to ``X-Forwarded-For``; what stands before that is
    the client's own word and counts for nothing. What is no address is the peer's.
    """
    if not hops or not forwarded_for:
        return _owner(peer) or peer
    addresses = [each.strip() for each in forwarded_for.split(",")]
    return _owner(addresses[-min(hops, len(addresses))]) or _owner(peer) or peer


def _owner(text: str) -> str | None:
    """An address in one form, whatever port stands behind it; None if it is none.

    Of IPv6 the network: who has one address of a /64 has them all.
    """
    try:
        address = ip_address(host_of(text))
    except ValueError:
        return None
    if not isinstance(address, IPv6Address):
        return str(address)
    if (four := address.ipv4_mapped) is not None:
        return str(four)
    return str(ip_network((int(address) >> 64 << 64, 64)))


class Addresses:
    """Limits by address; 0 is no limit. ``hops`` is how many proxies of ours stand in front."""

    def __init__(self, *, connections: int = 0, failures: int = 0, hops: int = 0) -> None:
        self._most_connections = connections
        self._most_failures = failures
        self._hops = hops
        self._connected: Counter[str] = Counter()
        self._failures: OrderedDict[str, RateLimit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._connected) + len(self._failures)

    def of(self, peer: Callable[[], str], forwarded_for: str | None) -> str:
        """As :func:`client_address`; not asked for, and empty, while there is no limit."""
        if not self._most_connections and not self._most_failures:
            return ""
        return client_address(peer(), forwarded_for, self._hops)

    def enter(self, address: str, now: float) -> None:
        """Count a connection until :meth:`leave`, or raise :exc:`Rejected` for one too many,
        or for an address that keeps failing. ``now`` is on Trio's clock.
        """
        self.check(address, now)
        if not self._most_connections:
            return
        if self._connected[address] >= self._most_connections:
            raise Rejected(
                Close.SERVER_OVERLOADED, "too many connections of this address", "address_limit"
            )
        self._connected[address] += 1

    def silent_of(self, peer: Callable[[], str]) -> tuple[str, int | None]:
        """The address of a connection that has said nothing, and how many such it may have; None
        if there is no limit. Behind proxies of ours nothing is known of it yet.
        """
        if not self._most_connections or self._hops:
            return "", None
        address = client_address(peer(), None, 0)
        return address, self._most_connections - self._connected[address]

    def leave(self, address: str) -> None:
        if not self._most_connections:
            return
        self._connected[address] -= 1
        if not self._connected[address]:
            del self._connected[address]

    def check(self, address: str, now: float) -> None:
        """Raise :exc:`Rejected` if it keeps failing, whatever it brings this time."""
        failures = self._failures.get(address)
        if failures is not None and failures.is_full(now):
            raise Rejected(Close.RATE_LIMITED, "too many failed logins", "failed_logins")

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
