"""Tracked events, and which of them a connection has yet to confirm."""

from collections.abc import Sequence

from ..core.audiences import Audience
from ..core.event_ids import Position
from ..core.receipts import Place, Receipt, TrackedEvent, Who


class Tracked:
    """A tracked event, and what this process knows of its receipts."""

    __slots__ = ("by", "changed", "event", "expires", "place", "steps")

    def __init__(
        self,
        place: Place,
        event: TrackedEvent,
        expires: int,
        steps: Sequence[frozenset[Audience]],
    ) -> None:
        self.place = place
        self.event = event
        self.expires = expires  # unix ms
        self.steps = steps  # the audiences of each
        self.by: dict[Who, Receipt] = {}
        self.changed: dict[Who, Receipt] = {}  # and not written to Redis yet


class Sent:
    """A tracked event that a connection was sent and has not confirmed.

    ``position`` is where it was in the stream; of an escalation, where that was.
    """

    __slots__ = ("position", "tracked")

    def __init__(self, position: Position, tracked: Tracked) -> None:
        self.position = position
        self.tracked = tracked
