"""Receipts: what is known about who has received an event.

A client that was sent a tracked event has a receipt of it. Its states follow each other: the event
waits for its socket to take it, was written to it, was delivered, the application has seen it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import NamedTuple

import msgspec

from .audiences import BranchId, Endpoint, Principal
from .event_ids import Position, Stream, read_event_id


class State(IntEnum):
    """How far an event has come to one client; each state includes those before it."""

    SENT = 0  # the kernel has not taken it for any connection of the client yet
    WRITTEN = 1
    DELIVERED = 2
    SEEN = 3

    @property
    def label(self) -> str:
        return self.name.lower()


class Recipient(NamedTuple):
    """A user on an endpoint, or a session of diners: its connections share their receipts."""

    endpoint: str  # its label
    id: str

    @classmethod
    def of(cls, principal: Principal) -> "Recipient":
        """The one that a connection belongs to."""
        named = principal.session if principal.endpoint is Endpoint.DINER else principal.user
        return cls(principal.endpoint.label, str(named))

    @property
    def user_id(self) -> str | msgspec.UnsetType:
        """As answers tell it; unset of a session."""
        return msgspec.UNSET if self.endpoint == Endpoint.DINER.label else self.id

    @property
    def session_id(self) -> int | msgspec.UnsetType:
        """As answers tell it; unset of a user."""
        return int(self.id) if self.endpoint == Endpoint.DINER.label else msgspec.UNSET


class Place(NamedTuple):
    """An entry of a stream: what an event id names."""

    stream: Stream
    position: Position


class TrackedEvent(msgspec.Struct, frozen=True):
    """A tracked event: its type, and whom it concerns. ``at`` is in unix ms."""

    type: str
    tenant_id: int
    branch_id: int
    at: int


def read_place(event_id: str) -> Place | None:
    """The place that the id of one event names; None if it is not such an id."""
    try:
        return Place(*read_event_id(event_id))
    except ValueError:
        return None


@dataclass(slots=True)
class Receipt:
    """When a client reached each state, in unix ms; None if it has not.

    ``steps`` is a bit mask: in the audience of which steps (:class:`~.routing.Step`) it was.
    ``branches`` are those of the client, if that of the event (0: the whole tenant) is not one of
    them; else none. ``step`` is the first one that brought it the event. If it is not ``sent``, see
    :class:`ReceiptChange`, it is the last one before the place in the stream that the client named.
    """

    steps: int = 0
    sent: int | None = None
    written: int | None = None
    delivered: int | None = None
    seen: int | None = None
    branches: frozenset[BranchId] = frozenset()
    step: int = 0

    @property
    def state(self) -> State:
        """The last state that it has reached."""
        if self.seen is not None:
            return State.SEEN
        if self.delivered is not None:
            return State.DELIVERED
        return State.SENT if self.written is None else State.WRITTEN

    @property
    def at(self) -> int | None:
        """When it reached that."""
        return (self.sent, self.written, self.delivered, self.seen)[self.state]

    def is_in_step(self, number: int) -> bool:
        """Whether it was in the audience of this step."""
        return bool(self.steps >> number & 1)

    def joined(self, other: "Receipt") -> "Receipt":
        """What two receipts of one client say together: of each state the first time.

        A confirmation is not of what a later step brought. The script that writes receipts
        (:mod:`..broker.receipt_store`) has the same rule.
        """
        one, two = (self, other) if self.step <= other.step else (other, self)
        if one.sent is None and one.step < two.step:
            return two
        return Receipt(
            one.steps | two.steps,
            _first(one.sent, two.sent),
            _first(one.written, two.written),
            _first(one.delivered, two.delivered),
            _first(one.seen, two.seen),
            one.branches or two.branches,
            one.step,
        )

    def reach(self, state: State, now: int) -> bool:
        """Note a state, and those before it; return whether it is a new one."""
        if self.sent is not None and state <= self.state:
            return False
        if self.sent is None:
            self.sent = now
        if state >= State.WRITTEN and self.written is None:
            self.written = now
        if state >= State.DELIVERED and self.delivered is None:
            self.delivered = now
        if state >= State.SEEN and self.seen is None:
            self.seen = now
        return True


def count_in(state: State, receipts: Iterable[Receipt]) -> int:
    """How many clients have come to this state, or further."""
    return sum(receipt.state >= state for receipt in receipts)


def _first(one: int | None, other: int | None) -> int | None:
    return min((each for each in (one, other) if each is not None), default=None)


class ReceiptChange(NamedTuple):
    """What is to be written of an event: receipts, each with all that is known of it.

    A receipt that is not ``sent`` is of a client that was sent the event by another process, if at
    all: it counts as soon as that process writes so, unless a later step brought the event.
    """

    event: TrackedEvent
    expires: int  # unix ms
    by: Mapping[Recipient, Receipt]


@dataclass
class Receipts:
    """All that is known of the receipts of one event."""

    event: TrackedEvent
    by: dict[Recipient, Receipt] = field(default_factory=dict)
    confirmed: dict[int, int] = field(default_factory=dict)  # by step, when (ms)
    steps: dict[int, int] = field(default_factory=dict)  # that are over, when (ms)
