"""Addresses: limits on the connections and on the failed logins of one IP address."""

from collections import Counter, OrderedDict
from collections.abc import Callable
from ipaddress import IPv6Address, ip_address, ip_network
from typing import Final

from ..core.close_codes import Close, Rejected
from ..core.limits import RateLimit
from ..core.origins import host_of

_FAILURE_WINDOW: Final = 60.0  # seconds
_MOST_REMEMBERED: Final = 10_000  # addresses with failed logins; past it the oldest is forgotten


def client_address(peer: str, forwarded_for: str | None, hops: int) -> str:
    """Return the client's address: the peer's, or the one that our proxies report.

    ``hops`` is the number of our proxies. Each appends the address it saw to ``X-Forwarded-For``;
    whatever precedes those entries was written by the client and is ignored. If the entry is not
    an address, the peer's address is returned.
    """
    if not hops or not forwarded_for:
        return _owner(peer) or peer
    addresses = [each.strip() for each in forwarded_for.split(",")]
    return _owner(addresses[-min(hops, len(addresses))]) or _owner(peer) or peer


def _owner(text: str) -> str | None:
    """Return an address in its normal form without a port, or None if it is not an address.

    For IPv6 this is the /64 network: a client that has one of its addresses has all of them.
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
    """Limits by address; 0 is no limit. ``hops`` is the number of our proxies in front."""

    def __init__(self, *, connections: int = 0, failures: int = 0, hops: int = 0) -> None:
        self._most_connections = connections
        self._most_failures = failures
        self._hops = hops
        self._connected: Counter[str] = Counter()
        self._failures: OrderedDict[str, RateLimit] = OrderedDict()

    def __len__(self) -> int:
        return len(self._connected) + len(self._failures)

    def of(self, peer: Callable[[], str], forwarded_for: str | None) -> str:
        """As :func:`client_address`. Without a limit it is empty, and ``peer`` is not called."""
        if not self._most_connections and not self._most_failures:
            return ""
        return client_address(peer(), forwarded_for, self._hops)

    def enter(self, address: str, now: float) -> None:
        """Count a connection until :meth:`leave`. ``now`` is on Trio's clock.

        Raises :exc:`Rejected` if the address has too many connections or failed logins.
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
        """Return the address of a connection that has sent nothing, and how many such it may have.

        The number is None if there is no limit. Behind proxies of ours the client's address is not
        known yet, so there is no limit.
        """
        if not self._most_connections or self._hops:
            return "", None
        address = client_address(peer(), None, 0)
        return address, self._most_connections - self._connected[address]

    def leave(self, address: str) -> None:
        """Stop counting a connection."""
        if not self._most_connections:
            return
        self._connected[address] -= 1
        if not self._connected[address]:
            del self._connected[address]

    def check(self, address: str, now: float) -> None:
        """Raise :exc:`Rejected` if the address had too many failed logins, with any credential."""
        failures = self._failures.get(address)
        if failures is not None and failures.is_full(now):
            raise Rejected(Close.RATE_LIMITED, "too many failed logins", "failed_logins")

    def failed(self, address: str, now: float) -> None:
        """Count a failed login: the client sent an invalid credential."""
        if not self._most_failures:
            return
        if (failures := self._failures.pop(address, None)) is None:
            failures = RateLimit(self._most_failures, _FAILURE_WINDOW)
        failures.exceeded(now)
        self._failures[address] = failures
        if len(self._failures) > _MOST_REMEMBERED:
            self._failures.popitem(last=False)
