"""Routing of past events: those of which nobody here was told when they came.

They were stored raw, or are read from a stream later. Whether a sector had a waiter at that time is
not known, for nobody looked. They are routed as if it had none: with ``WS_UNCOVERED_SECTOR=branch``
all waiters of the branch may hear of them when they resume, rather than nobody.
"""

from collections.abc import Collection
from typing import Final

from ..core.audiences import Audience, floor, record, waiters
from ..core.event_ids import Position, Stream
from ..core.events import Event, InvalidEvent, parse_event
from ..core.routing import ROUTES, Routing, To


class PastRouting:
    """The routing table, and where events of an uncovered sector go."""

    def __init__(self, routes: Routing = ROUTES, *, uncovered_to_branch: bool = False) -> None:
        self._routes = routes
        self._uncovered_to_branch = uncovered_to_branch
        self.tracked_types = routes.tracked_types
        self._not_for_admins = frozenset(
            name for name in routes.durable_types if To.ADMINS not in routes[name].to
        )

    def audiences(self, event: Event) -> list[Audience]:
        """The audiences of an event of which nobody here was told when it came."""
        found = self._routes.audiences(event)
        if (
            self._uncovered_to_branch
            and event.sector is not None
            and waiters(event.tenant, event.branch, event.sector) in found
        ):
            found.append(floor(event.tenant, event.branch))
        return found

    def stored_for(self, event: Event, audiences: Collection[Audience]) -> tuple[Audience, ...]:
        """By which audiences a durable event is found later: these, and a backend's."""
        if event.type in self._not_for_admins:  # not in the default table
            return (*audiences, record(event.tenant, event.branch))
        return tuple(audiences)

    def excluded(self, event: Event) -> frozenset[Audience]:
        """The audiences that were sent an escalated event before; a backend has it, too."""
        return self._routes.excluded(event) | {record(event.tenant, event.branch)}

    def route(
        self, stream: Stream, position: Position, payload: bytes, received_at: float
    ) -> tuple[Event, list[Audience]] | None:
        """The durable event in a payload, and its audiences; None if there is none.

        The payload may be invalid even if it was valid when it came: how many levels of JSON can
        be parsed depends on the depth of the stack, and at the limit, of about 900, they can be too
        many here.
        """
        try:
            event = parse_event(
                payload,
                channel=stream,
                received_at=received_at,
                stream=stream,
                position=position,
                durable_types=self._routes.durable_types,
            )
        except InvalidEvent:
            return None
        return (event, self.audiences(event)) if event.durable else None


BY_DEFAULT: Final = PastRouting()
