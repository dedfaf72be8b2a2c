"""Routing: a table from event type to audiences. It alone decides who receives an event."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Flag, auto
from functools import cached_property
from typing import Final

from . import audiences
from .audiences import Audience
from .events import Event


class To(Flag):
    """Who an event goes to."""

    ADMINS = auto()
    WAITERS = auto()  # of the event's sector, or of the whole branch if it names none
    FLOOR = auto()  # every waiter of the branch, whatever the sector
    KITCHEN = auto()
    DINERS = auto()  # of the event's session
    BRANCH_DINERS = auto()  # every diner of the branch


_BY_NAME: Final = {each.name.lower(): each for each in To if each.name is not None}


def names_of(to: To) -> list[str]:
    """The names of audiences, as in the routes file."""
    return [name for name, each in _BY_NAME.items() if each in to]


@dataclass(frozen=True)
class Step:
    """An audience that must receive an event, and within how many seconds."""

    to: To
    within: float

    @property
    def name(self) -> str:
        """The name of the audience, as in the routes file."""
        return names_of(self.to)[0]


@dataclass(frozen=True)
class Route:
    """Where events of one type go, and what is promised of them.

    ``durable``: they are replayed after a disconnect. ``receipt``: it is known who has received
    them. ``steps``: who must have, one after another until somebody has.
    """

    to: To
    durable: bool
    receipt: bool = False
    steps: tuple[Step, ...] = ()

    @cached_property
    def of_branch(self) -> tuple[str, ...]:
        """The kinds of its audiences that are of the branch as a whole."""
        return tuple(kind for to, kind in _OF_BRANCH.items() if to in self.to)

    @cached_property
    def of_branch_without_sector(self) -> tuple[str, ...]:
        """The same for events that name no sector."""
        if self.has_waiters:
            return Route(self.to & ~To.WAITERS | To.FLOOR, self.durable).of_branch
        return self.of_branch

    @cached_property
    def longest(self) -> float:
        """Seconds that all its steps take."""
        return sum(step.within for step in self.steps)

    @cached_property
    def has_waiters(self) -> bool:
        return To.WAITERS in self.to

    @cached_property
    def has_diners(self) -> bool:
        return To.DINERS in self.to


_OF_BRANCH: Mapping[To, str] = {
    To.ADMINS: "admins",
    To.FLOOR: "floor",
    To.KITCHEN: "kitchen",
    To.BRANCH_DINERS: "branch_diners",
}

_WAD = To.WAITERS | To.ADMINS | To.DINERS
_FAD = To.FLOOR | To.ADMINS | To.DINERS

UNHEARD: Final = "EVENT_UNHEARD"  # made by the gateway: nobody has confirmed an event in time
UNKNOWN: Final = Route(To.ADMINS, False)  # of a type that the table does not have


class Routing(Mapping[str, Route]):
    """An immutable routing table, by event type.

    As a mapping it holds the types that it knows; the methods also take types that it does not
    know, which have the route :data:`UNKNOWN`.
    """

    __slots__ = ("_table", "durable_types", "tracked_types")

    def __init__(self, table: Mapping[str, Route]) -> None:
        self._table = dict(table)
        #: The types of events that must not be lost.
        self.durable_types = frozenset(name for name, each in table.items() if each.durable)
        #: The types of events of which it is known who has received them.
        self.tracked_types = frozenset(name for name, each in table.items() if each.receipt)

    def __getitem__(self, event_type: str) -> Route:
        return self._table[event_type]

    def __contains__(self, event_type: object) -> bool:
        return event_type in self._table

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def route_of(self, event_type: str) -> Route:
        """The route of a type, whether the table knows it or not."""
        return self._table.get(event_type, UNKNOWN)

    def is_durable(self, event_type: str) -> bool:
        """Whether events of this type must not be lost."""
        return self.route_of(event_type).durable

    def audiences(self, event: Event) -> list[Audience]:
        """Who may receive this event. Used alike for live delivery, replay and catch-up."""
        if event.escalation is not None:
            return audiences_by(_route_to(event.escalation.to), event)
        return audiences_by(self._table.get(event.type, UNKNOWN), event)

    def excluded(self, event: Event) -> frozenset[Audience]:
        """The audiences that an escalated event does not go to: they were sent it before."""
        if event.escalation is None:
            return frozenset()
        return frozenset(audiences_by(_route_to(*event.escalation.unless), event))

    def audiences_of_steps(self, type_: str, event: Event) -> tuple[frozenset[Audience], ...]:
        """The audiences of each step of a type (see :attr:`Route.steps`), for what this event
        concerns.
        """
        return tuple(
            frozenset(audiences_by(Route(step.to, True), event))
            for step in self.route_of(type_).steps
        )


def _route_to(*names: str) -> Route:
    """The route to audiences of these names; unknown ones, of a newer version, are nobody."""
    to = To(0)
    for name in names:
        to |= _BY_NAME.get(name, To(0))
    return Route(to, True)


def audiences_by(route: Route, event: Event) -> list[Audience]:
    """Who may receive an event that has this route."""
    tenant, branch = event.tenant, event.branch
    if branch == 0:  # the whole tenant: its admins, if the type goes to admins at all
        return [audiences.tenant_admins(tenant)] if To.ADMINS in route.to else []
    if (sector := event.sector) is None:
        found = audiences.of_branch(route.of_branch_without_sector, tenant, branch)
    else:
        found = audiences.of_branch(route.of_branch, tenant, branch)
        if route.has_waiters:
            found.insert(1, audiences.waiters(tenant, branch, sector))  # behind the admins
    if route.has_diners and (session := event.session) is not None:
        found.append(audiences.diners(tenant, session))
    return found


ROUTES: Final = Routing(
    {
        "ROUND_PENDING": Route(_FAD, True),
        "ROUND_CONFIRMED": Route(_WAD, True),
        # An admin sends a round to the kitchen, so ROUND_SUBMITTED stops short of it.
        "ROUND_SUBMITTED": Route(_WAD, True),
        "ROUND_IN_KITCHEN": Route(_WAD | To.KITCHEN, True),
        "ROUND_READY": Route(_WAD | To.KITCHEN, True),
        "ROUND_CANCELED": Route(_WAD | To.KITCHEN, True),
        "ROUND_ITEM_VOIDED": Route(_WAD | To.KITCHEN, True),
        "ROUND_ITEM_DELETED": Route(_WAD | To.KITCHEN, True),
        "ROUND_SERVED": Route(_WAD, True),
        "SERVICE_CALL_CREATED": Route(To.WAITERS | To.ADMINS, True),
        "SERVICE_CALL_ACKED": Route(_WAD, True),
        "SERVICE_CALL_CLOSED": Route(_WAD, True),
        "CHECK_REQUESTED": Route(_WAD, True),
        "CHECK_PAID": Route(_WAD, True),
        "PAYMENT_APPROVED": Route(_WAD, True),
        "PAYMENT_REJECTED": Route(_WAD, True),
        "PAYMENT_FAILED": Route(_WAD, True),
        "TABLE_SESSION_STARTED": Route(_FAD, True),
        "TABLE_CLEARED": Route(_WAD, True),
        "TABLE_STATUS_CHANGED": Route(_WAD, True),
        "TABLE_TRANSFERRED": Route(_WAD, True),
        "TICKET_IN_PROGRESS": Route(To.WAITERS | To.KITCHEN | To.ADMINS, True),
        "TICKET_READY": Route(To.WAITERS | To.KITCHEN | To.ADMINS, True),
        "TICKET_DELIVERED": Route(To.WAITERS | To.KITCHEN | To.ADMINS, True),
        "PRODUCT_AVAILABILITY_CHANGED": Route(
            To.FLOOR | To.KITCHEN | To.ADMINS | To.BRANCH_DINERS, True
        ),
        "CART_ITEM_ADDED": Route(To.DINERS, False),
        "CART_ITEM_UPDATED": Route(To.DINERS, False),
        "CART_ITEM_REMOVED": Route(To.DINERS, False),
        "CART_CLEARED": Route(To.DINERS, False),
        "CART_SYNC": Route(To.DINERS, False),
        "ENTITY_CREATED": Route(To.ADMINS, True),
        "ENTITY_UPDATED": Route(To.ADMINS, True),
        "ENTITY_DELETED": Route(To.ADMINS, True),
        "CASCADE_DELETE": Route(To.ADMINS, True),
        UNHEARD: Route(To.ADMINS, True),
    }
)


def channel_for(event: Event, routes: Routing = ROUTES) -> str:
    """The Pub/Sub channel to publish an event on that is not durable."""
    if event.session is not None and routes.route_of(event.type).to == To.DINERS:
        return f"channel:session:{event.session}"
    if event.branch == 0:
        return f"channel:tenant:{event.tenant}:admin"
    return f"channel:branch:{event.branch}:admin"
