"""Tracked events: those whose receipts are kept, by their place in the stream."""

from bisect import bisect_left
from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator
from itertools import islice
from typing import Final

from ..core.audiences import Audience
from ..core.escalation import Escalation
from ..core.event_ids import Position, Stream
from ..core.events import Event
from ..core.receipts import Place, TrackedEvent, read_place
from ..core.routing import Routing, audiences_by
from .tracked import Sent, Tracked

MOST_TRACKED: Final = 50_000  # events; the oldest are forgotten


class TrackedEvents:
    """The tracked events of this process.

    ``clock`` returns unix time. An event is kept for ``ttl`` seconds and the time that its steps
    take.
    """

    def __init__(self, routes: Routing, clock: Callable[[], float], ttl: float) -> None:
        self._routes = routes
        self.types = routes.tracked_types
        self._clock = clock
        self._ttl = ttl
        # In the order they came. A plain dict steps over what was deleted to find its first key.
        self._tracked: OrderedDict[Place, Tracked] = OrderedDict()
        self._escalated: OrderedDict[Place, Tracked] = OrderedDict()  # by where they are escalated
        # By tenant and stream, in its order: where they were added to it, and where escalated.
        self._added: dict[tuple[int, Stream], deque[Sent]] = {}

    @property
    def tracks(self) -> bool:
        """Whether any type is tracked."""
        return bool(self.types)

    def note(self, events: Iterable[Event]) -> None:
        """Track those of these durable events whose type asks for it."""
        types = self.types
        for event in events:
            if event.escalation is not None:
                self._add_escalated(event, event.escalation)
            elif event.type in types and event.durable:
                assert event.stream is not None
                assert event.position is not None
                self._add(event, event.type, Place(event.stream, event.position))

    def _add_escalated(self, event: Event, escalation: Escalation) -> None:
        assert event.stream is not None
        assert event.position is not None
        if (original := read_place(escalation.event_id)) is None:
            return
        tracked = self._tracked.get(original) or self._add(event, escalation.of, original)
        if tracked.event.tenant_id != event.tenant:
            return
        tracked.escalated.setdefault(escalation.step, event.position)
        self._append(event.stream, Sent(event.position, tracked))
        self._escalated[Place(event.stream, event.position)] = tracked
        if len(self._escalated) > MOST_TRACKED:
            self._escalated.popitem(last=False)

    def _add(self, event: Event, type_: str, place: Place) -> Tracked:
        """Track the event at this place, which concerns the same as ``event``."""
        if (known := self._tracked.get(place)) is not None:
            return known
        self._trim()
        route, at = self._routes.route_of(type_), place.position[0]
        tracked = self._tracked[place] = Tracked(
            place,
            TrackedEvent(type_, event.tenant, event.branch, at),
            at + int((route.longest + self._ttl) * 1000),
            audiences_by(route, event),
            self._routes.audiences_of_steps(type_, event),
            is_late=event.escalation is not None,
        )
        self._append(place.stream, Sent(place.position, tracked))
        if len(self._tracked) > MOST_TRACKED:
            self._forget(next(iter(self._tracked.values())))
        return tracked

    def _append(self, stream: Stream, sent: Sent) -> None:
        added = self._added.setdefault((sent.tracked.event.tenant_id, stream), deque())
        if not added or added[-1].position < sent.position:  # else it was read before
            added.append(sent)

    def drop(self, copy: Event) -> None:
        """This durable event is a copy of an earlier one: nobody is sent it."""
        if copy.escalation is None and (tracked := self._find(copy)) is not None:
            self._forget(tracked)

    def stand_in(self, event: Event, audiences: Collection[Audience]) -> None:
        """These audiences are sent an event, because nobody covers its sector."""
        if event.escalation is None and (tracked := self._find(event)) is not None:
            tracked.stand_in(audiences)

    def _find(self, event: Event) -> Tracked | None:
        if event.stream is None or event.position is None:
            return None
        return self._tracked.get(Place(event.stream, event.position))

    def find(self, place: Place) -> Sent | None:
        """The tracked event that came, or was escalated, at this place; None if there is none."""
        tracked = self._tracked.get(place) or self._escalated.get(place)
        return None if tracked is None else Sent(place.position, tracked)

    def original(self, place: Place) -> Tracked | None:
        """The tracked event that came at this place; None if there is none."""
        return self._tracked.get(place)

    def escalated(self, place: Place) -> Tracked | None:
        """The tracked event that was escalated at this place; None if there is none."""
        return self._escalated.get(place)

    def since(self, tenant: int, stream: Stream, position: Position) -> Iterator[Sent]:
        """Those of a tenant from this place of a stream on, in its order."""
        added = self._added.get((tenant, stream), ())
        return islice(added, bisect_left(added, position, key=_position), None)

    def newest(self, tenant: int, stream: Stream) -> Iterator[Sent]:
        """Those of a tenant in a stream, the newest first."""
        return reversed(self._added.get((tenant, stream), ()))

    def _trim(self) -> None:
        """Forget the events whose receipts are not kept any more."""
        now = self._clock() * 1000
        while self._tracked and (first := next(iter(self._tracked.values()))).expires < now:
            self._forget(first)
        escalated = self._escalated
        while escalated and escalated[first_one := next(iter(escalated))].expires < now:
            del escalated[first_one]

    def _forget(self, tracked: Tracked) -> None:
        place = tracked.place
        del self._tracked[place]
        key = tracked.event.tenant_id, place.stream
        if (added := self._added.get(key)) is None:
            return
        at = bisect_left(added, place.position, key=_position)  # mostly the first
        if at < len(added) and added[at].tracked is tracked:
            del added[at]
        while added and added[0].tracked.place not in self._tracked:  # it was escalated here
            added.popleft()
        if not added:
            del self._added[key]


def _position(sent: Sent) -> Position:
    return sent.position
