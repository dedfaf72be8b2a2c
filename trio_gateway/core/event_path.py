"""The path of an event: when it entered, whom it was sent to, who has it, and what follows.

It is made of what Redis knows: the entry in the stream, and the receipts. Its times are seconds
after the event entered Redis. Redis' clock tells when that was and when a step was taken, the clock
of each process what its clients did: where these differ, nothing is earlier than the entry.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from .event_ids import event_id
from .events import Event
from .explanation import describe
from .receipts import Place, Receipt, Receipts, Recipient, State, TrackedEvent, count_in
from .routing import Routing, Step


@dataclass(frozen=True)
class Known:
    """What Redis knows of an event; ``now`` is in unix ms.

    ``event`` is None if its entry is not in the stream, ``receipts`` if there are none. ``asked``
    is the event that was asked for, and that tells of this one.
    """

    place: Place
    now: int
    event: Event | None = None
    receipts: Receipts | None = None
    is_trimmed: bool = False  # the stream has nothing that is as old
    asked: Event | None = None

    @property
    def about(self) -> TrackedEvent | None:
        """Its type, and whom it concerns; None if nothing is known."""
        if (event := self.event) is not None:
            return TrackedEvent(event.type, event.tenant, event.branch, self.place.position[0])
        return None if self.receipts is None else self.receipts.event


class StepState(StrEnum):
    """How a step stands."""

    NOT_BEGUN = "not_begun"
    RUNNING = "running"
    OVERDUE = "overdue"  # its time is over, and nothing has followed yet
    CONFIRMED = "confirmed"  # by somebody in this audience, or in one before it
    UNHEARD = "unheard"  # nobody had confirmed when its time was over


class PathClient(msgspec.Struct, kw_only=True):
    """A user on an endpoint, or a session of diners, that the event was sent to.

    ``must_reach`` are the audiences of the steps that it is in.
    """

    endpoint: str
    user_id: str | msgspec.UnsetType = msgspec.UNSET
    session_id: int | msgspec.UnsetType = msgspec.UNSET
    state: str
    sent: float | None
    written: float | None
    delivered: float | None
    seen: float | None
    must_reach: list[str]

    @property
    def name(self) -> str:
        """Words for people, for example ``user 21 (waiter)``."""
        if self.user_id is msgspec.UNSET:
            return f"session {self.session_id}"
        return f"user {self.user_id} ({self.endpoint})"


class PathStep(msgspec.Struct, kw_only=True):
    """An audience that must receive the event.

    ``begun`` and ``deadline`` are null before its time. ``ended`` is when somebody had confirmed,
    or the time was over. ``sent``, ``written`` and ``delivered`` count the clients in the audience.
    """

    to: str
    within: float
    state: StepState
    begun: float | None
    deadline: float | None
    ended: float | None
    sent: int
    written: int
    delivered: int


class Moment(msgspec.Struct):
    """Something that happened to the event, or that will if nothing else does."""

    after: float
    text: str
    lies_ahead: bool = False


class EventPath(msgspec.Struct, kw_only=True):
    """The path of an event. ``at`` is unix time, all other times are seconds after that.

    ``receipts``: whether it is known who was sent it. ``clients`` are those whose names the asker
    may know; the numbers are of all. ``summary`` and ``timeline`` are for people. ``missing`` are
    processes whose receipts may not be counted.
    """

    event_id: str
    type: str
    at: float
    now: float
    tenant_id: int
    branch_id: int
    sector_id: int | msgspec.UnsetType = msgspec.UNSET
    session_id: int | msgspec.UnsetType = msgspec.UNSET
    durable: bool
    receipts: bool
    sent: int
    written: int
    delivered: int
    seen: int
    audiences: list[dict[str, Any]]
    clients: list[PathClient]
    steps: list[PathStep]
    summary: list[str]
    timeline: list[Moment]
    complete: bool
    missing: list[str]


def trace(
    known: Known,
    routes: Routing,
    ttl: float,
    missing: Sequence[str] = (),
    may_name: Callable[[Receipt], bool] = lambda receipt: True,
) -> EventPath:
    """The path of an event of which something is known, without its words for people.

    ``ttl`` is for how many seconds receipts are kept, ``may_name`` says whose are named.
    """
    about, event = known.about, known.event
    assert about is not None
    at, route = about.at, routes.route_of(about.type)
    audiences = [] if event is None else dict.fromkeys(routes.audiences(event))
    receipts = known.receipts or Receipts(about)
    is_young = known.now < at + (route.longest + ttl) * 1000
    is_kept = known.receipts is not None or (route.receipt and is_young)
    return EventPath(
        event_id=event_id(*known.place),
        type=about.type,
        at=at / 1000,
        now=max(0, known.now - at) / 1000,
        tenant_id=about.tenant_id,
        branch_id=about.branch_id,
        sector_id=_given(None if event is None else event.sector),
        session_id=_given(None if event is None else event.session),
        durable=routes.is_durable(about.type),
        receipts=is_kept,
        sent=len(receipts.by),
        written=count_in(State.WRITTEN, receipts.by.values()),
        delivered=count_in(State.DELIVERED, receipts.by.values()),
        seen=count_in(State.SEEN, receipts.by.values()),
        audiences=[describe(each) for each in audiences],
        clients=[
            _client(who, receipt, at, route.steps)
            for who, receipt in sorted(receipts.by.items(), key=lambda item: item[0])
            if may_name(receipt)
        ],
        steps=_steps(receipts, route.steps, known.now) if is_kept else [],
        summary=[],
        timeline=[],
        complete=not missing,
        missing=list(missing),
    )


def _after(at: int, time: int | None) -> float | None:
    """Seconds from the entry until a time; both are in unix ms."""
    return None if time is None else max(0, time - at) / 1000


def _given(number: int | None) -> int | msgspec.UnsetType:
    return msgspec.UNSET if number is None else number


def _client(who: Recipient, receipt: Receipt, at: int, steps: Sequence[Step]) -> PathClient:
    return PathClient(
        endpoint=who.endpoint,
        user_id=who.user_id,
        session_id=who.session_id,
        state=receipt.state.label,
        sent=_after(at, receipt.sent),
        written=_after(at, receipt.written),
        delivered=_after(at, receipt.delivered),
        seen=_after(at, receipt.seen),
        must_reach=[step.name for number, step in enumerate(steps) if receipt.is_in_step(number)],
    )


def _steps(receipts: Receipts, steps: Sequence[Step], now: int) -> list[PathStep]:
    at, found = receipts.event.at, list[PathStep]()
    begun: int | None = at
    confirmed: int | None = None  # by somebody in the audiences so far
    for number, step in enumerate(steps):
        mine = [each for each in receipts.by.values() if each.is_in_step(number)]
        times = (confirmed, receipts.confirmed.get(number))
        confirmed = min((time for time in times if time is not None), default=None)
        over, deadline, ended = receipts.steps.get(number), None, None
        if begun is None:
            state = StepState.NOT_BEGUN
        else:
            deadline = begun + int(step.within * 1000)
            if over is not None:
                state, ended = StepState.UNHEARD, over
            elif confirmed is not None:
                state, ended = StepState.CONFIRMED, max(begun, confirmed)
            else:
                state = StepState.RUNNING if now < deadline else StepState.OVERDUE
        found.append(
            PathStep(
                to=step.name,
                within=step.within,
                state=state,
                begun=_after(at, begun),
                deadline=_after(at, deadline),
                ended=_after(at, ended),
                sent=len(mine),
                written=count_in(State.WRITTEN, mine),
                delivered=count_in(State.DELIVERED, mine),
            )
        )
        begun = over
    return found
