"""Tracked events, and which of them a connection has yet to confirm."""

from collections.abc import Collection, Iterable, Sequence

from ..core.audiences import Audience, BranchId, TenantId, floor
from ..core.event_ids import Position
from ..core.receipts import Place, Receipt, Recipient, TrackedEvent


class Tracked:
    """A tracked event, and what this process knows of its receipts.

    ``first`` are the audiences that the original went to, ``steps`` those of each step. It
    ``is_late`` if it is only known from a step: the original may have been sent before.
    """

    __slots__ = (
        "_floor",
        "by",
        "changed",
        "escalated",
        "event",
        "expires",
        "first",
        "is_late",
        "place",
        "steps",
    )

    def __init__(
        self,
        place: Place,
        event: TrackedEvent,
        expires: int,
        first: Iterable[Audience],
        steps: Sequence[frozenset[Audience]],
        *,
        is_late: bool = False,
    ) -> None:
        self.place = place
        self.event = event
        self.expires = expires  # unix ms
        self.first = frozenset(first)
        self.steps = steps
        self.is_late = is_late
        self.escalated: dict[int, Position] = {}  # by step, where in the stream
        self._floor = floor(TenantId(event.tenant_id), BranchId(event.branch_id))
        self.by: dict[Recipient, Receipt] = {}
        self.changed: dict[Recipient, Receipt] = {}  # and not written to Redis yet

    @property
    def last_step(self) -> int:
        """The number of the last step that was taken, as far as is known here."""
        return max(self.escalated, default=0)

    def step_at(self, position: Position) -> int:
        """The number of the last step that was taken up to this place in the stream."""
        if not self.escalated:
            return 0
        return max((step for step, at in self.escalated.items() if at <= position), default=0)

    def steps_of(self, audiences: Collection[Audience]) -> int:
        """In the audience of which steps a member of these audiences is, as a bit mask."""
        found = 0
        for step, members in enumerate(self.steps):
            if not members.isdisjoint(audiences):
                found |= 1 << step
        return found

    def stand_in(self, audiences: Iterable[Audience]) -> None:
        """The original went to these audiences.

        All waiters of the branch stand in for those of a sector that nobody covers.
        """
        floors = frozenset(each for each in audiences if each[0] == "floor") - self.first
        if floors:
            self.first |= floors
            self.steps = tuple(
                step | floors if any(each[0] == "waiters" for each in step) else step
                for step in self.steps
            )

    def sent_at(self, audiences: Collection[Audience]) -> Position | None:
        """Where in the stream members of these audiences were sent it; None if nowhere yet.

        A process does not know whether all waiters of the branch stood in on another one.
        """
        if not self.first.isdisjoint(audiences):
            return self.place.position
        if not self.escalated and self._floor in audiences:
            return self.place.position
        mine = self.steps_of(audiences)
        found = [position for step, position in self.escalated.items() if mine >> step & 1]
        return min(found, default=None)


class Sent:
    """A tracked event that a connection was sent.

    ``position`` is where it was in the stream; of an escalation, where that was.
    """

    __slots__ = ("position", "tracked")

    def __init__(self, position: Position, tracked: Tracked) -> None:
        self.position = position
        self.tracked = tracked

    @property
    def step(self) -> int:
        """The number of the step that brought it."""
        return self.tracked.step_at(self.position)


class Forgotten:
    """Tracked events of one stream that a connection was sent and does not remember any more.

    They are from ``first`` to ``last``; from ``waiting`` on, if that is not None, some waited for
    the kernel to take them.
    """

    __slots__ = ("first", "last", "waiting")

    def __init__(self, first: Position) -> None:
        self.first = self.last = first
        self.waiting: Position | None = None

    def __contains__(self, position: Position) -> bool:
        return self.first <= position <= self.last

    def add(self, position: Position, *, waits: bool) -> None:
        """Add the next one."""
        self.last = position
        if waits and self.waiting is None:
            self.waiting = position
