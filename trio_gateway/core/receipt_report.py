"""Who has received an event, as ``/ws/receipts`` answers it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import msgspec

from .audiences import Principal
from .event_ids import event_id
from .receipts import Place, Receipt, Receipts, Recipient, State, TrackedEvent, count_in
from .routing import Routing


def _is_named(receipt: Receipt) -> bool:
    return True


@dataclass(frozen=True)
class Asker:
    """Who asks about events.

    For it, an event that it may not know of does not exist. Clients that it may not be told the
    names of are still counted.
    """

    may_know: Callable[[TrackedEvent], bool]
    may_name: Callable[[Receipt], bool] = _is_named

    @classmethod
    def admin(cls, admin: Principal) -> Self:
        """A MANAGER or ADMIN: asks about its branches, and about its tenant as a whole."""
        tenant, branches = admin.tenant, admin.branches
        return cls(
            lambda event: event.tenant_id == tenant and event.branch_id in (0, *branches),
            lambda receipt: not receipt.branches or not receipt.branches.isdisjoint(branches),
        )


class ReceiptReply(msgspec.Struct):
    """How far an event has come to one user, or session, on an endpoint; ``at`` is unix time."""

    endpoint: str
    state: str
    at: float | None
    user_id: str | msgspec.UnsetType = msgspec.UNSET
    session_id: int | msgspec.UnsetType = msgspec.UNSET


class StepReply(msgspec.Struct):
    """An audience that the event was sent to later; ``at`` is unix time."""

    to: str
    at: float


class ReceiptsReply(msgspec.Struct):
    """Who has received an event. ``missing`` are processes whose receipts may not be counted."""

    event_id: str
    type: str
    at: float
    written: int
    delivered: int
    seen: int
    by: list[ReceiptReply]
    steps: list[StepReply]
    complete: bool
    missing: list[str]


def is_kept(event: TrackedEvent, routes: Routing, ttl: float, now: float) -> bool:
    """Whether who has received an event is still known, with a TTL in seconds at this unix time."""
    return event.type in routes.tracked_types and event.at / 1000 + ttl > now


def describe_receipts(
    place: Place,
    found: Receipts,
    routes: Routing,
    missing: list[str],
    may_name: Callable[[Receipt], bool] = _is_named,
) -> ReceiptsReply:
    """Who has received an event, of those that it was written to."""
    steps = routes.route_of(found.event.type).steps
    by = {who: each for who, each in found.by.items() if each.state >= State.WRITTEN}
    written, delivered, seen = (
        count_in(state, by.values()) for state in (State.WRITTEN, State.DELIVERED, State.SEEN)
    )
    return ReceiptsReply(
        event_id=event_id(*place),
        type=found.event.type,
        at=found.event.at / 1000,
        written=written,
        delivered=delivered,
        seen=seen,
        by=[_describe_one(who, by[who]) for who in sorted(by) if may_name(by[who])],
        steps=[
            StepReply(steps[step + 1].name, at / 1000)
            for step, at in sorted(found.steps.items())
            if step + 1 < len(steps)
        ],
        complete=not missing,
        missing=missing,
    )


def _describe_one(who: Recipient, receipt: Receipt) -> ReceiptReply:
    return ReceiptReply(
        endpoint=who.endpoint,
        state=receipt.state.label,
        at=None if receipt.at is None else receipt.at / 1000,
        user_id=who.user_id,
        session_id=who.session_id,
    )
