"""The demo's counters: what was published and confirmed, and who has received it."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from ..core.audiences import Endpoint, Principal, audiences_of
from ..core.events import parse_event
from ..core.routing import ROUTES
from ..testing import make_principal
from .demo_processes import ROLES

_MOST: Final = 1000  # events that are expected at the same time, but for missing ones
_LATE: Final = 5.0  # seconds after which a confirmed event that was not received is missing


@dataclass(slots=True)
class _Expected:
    """An event: the roles that have not received it, and when it was confirmed, if it is durable.

    It may have copies: the first one that a role receives counts.
    """

    roles: set[str]
    confirmed_at: float | None = None


class Tally:
    """The numbers of events; ``last_at`` is the time of the last one, on the given clock."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.published = 0
        self.confirmed = 0  # durable ones only
        self.received: Counter[str] = Counter()
        self.gaps = 0
        self.last_at = 0.0
        self._clock = clock
        self._principals = {role: _principal(role) for role in ROLES}
        self._expected: dict[str, _Expected] = {}  # by the event's id

    def publish(self, payload: bytes) -> None:
        """Count an event that is about to be published."""
        self.published += 1
        self.last_at = self._clock()
        event = parse_event(payload, channel="", received_at=0.0)
        if event.id is not None and event.id not in self._expected:
            audiences = frozenset(ROUTES.audiences(event))
            roles = {
                role
                for role, principal in self._principals.items()
                if not audiences.isdisjoint(audiences_of(principal))
            }
            self._expected[event.id] = _Expected(roles)
            if len(self._expected) > _MOST:
                self._forget_unconfirmed()

    def confirm(self, payload: bytes) -> None:
        """Count a durable event that Redis has confirmed."""
        self.confirmed += 1
        event = parse_event(payload, channel="", received_at=0.0)
        if event.id is not None and (expected := self._expected.get(event.id)) is not None:
            expected.confirmed_at = self._clock()
            self._forget_if_done(event.id, expected)

    def receive(self, role: str, id: str | None) -> None:  # noqa: A002 - the event's key
        """Count an event that a role has received."""
        self.received[role] += 1
        self.last_at = self._clock()
        if id is not None and (expected := self._expected.get(id)) is not None:
            expected.roles.discard(role)
            self._forget_if_done(id, expected)

    def _forget_if_done(self, id: str, expected: _Expected) -> None:  # noqa: A002
        if not expected.roles and expected.confirmed_at is not None:
            del self._expected[id]

    def _forget_unconfirmed(self) -> None:
        """Forget the older half, but for confirmed ones: those on Pub/Sub may get lost."""
        for id, expected in list(self._expected.items())[: _MOST // 2]:  # noqa: A001
            if expected.confirmed_at is None:
                del self._expected[id]

    @property
    def missing(self) -> int:
        """The deliveries of confirmed events that should have happened 5 s ago."""
        before = self._clock() - _LATE
        return sum(
            len(each.roles)
            for each in self._expected.values()
            if each.confirmed_at is not None and each.confirmed_at < before
        )

    @property
    def counters(self) -> str:
        """One line for the display."""
        return (
            f"published {self.published}, confirmed {self.confirmed},"
            f" delivered {self.received.total()}, missing {self.missing}, gaps {self.gaps}"
        )

    def __str__(self) -> str:
        shares = ", ".join(f"{role} {self.received[role]}" for role in ROLES)
        return f"{self.published} events published; received: {shares}. Nothing is left running."


def _principal(role: str) -> Principal:
    _, identity = ROLES[role]
    sectors = (5,) if role == "waiter" else ()  # as in the demo's database
    return make_principal(Endpoint[role.upper()], roles=identity.roles, sectors=sectors)
