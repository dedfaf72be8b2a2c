"""Must reach: watches until when somebody must have confirmed an event.

Every process watches the events of the streams that it reads. When time is over, each asks Redis,
where one step is taken once: by whom does not matter, and whoever dies, another one asks. What a
step changes is an entry of the stream, so all processes learn of it there, see
:mod:`..core.escalation`.
"""

import heapq
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Final, NamedTuple, NoReturn

import trio

from ..core.escalation import Escalation
from ..core.events import Event
from ..core.receipts import Place, TrackedEvent, read_place
from ..core.routing import Routing, Step, names_of

#: Seconds after a deadline until Redis is asked: what was confirmed in time is written by then.
GRACE: Final = 0.5
_TOGETHER: Final = 0.1  # seconds: deadlines that are over so soon share a script
_RETRY: Final = 1.0  # seconds
_MOST: Final = 100_000  # deadlines; the latest are dropped


class Due(NamedTuple):
    """A step of an event whose time is over. Times are unix ms."""

    place: Place
    event: TrackedEvent
    sector: int | None
    session: int | None
    steps: Sequence[Step]  # all steps of the event
    unless: Sequence[str]  # the audiences that it was sent to before
    number: int  # of this step, from 0
    deadline: int
    expires: int


#: Takes the steps that are not taken yet and whose events nobody has confirmed. Returns for each in
#: how many ms it is to be asked about again, 0 for never; None if Redis is unavailable.
Take = Callable[[Sequence[Due]], Awaitable[Sequence[int] | None]]


class Reach:
    """The deadlines of the events that must reach somebody."""

    def __init__(
        self,
        routes: Routing,
        clock: Callable[[], float],
        ttl: float,
    ) -> None:
        self._routes = routes
        self._clock = clock
        self._ttl = ttl
        self._types = frozenset(name for name, route in routes.items() if route.steps)
        self._heap: list[tuple[float, int, Due]] = []  # by when Redis is asked (unix time)
        self._numbers = count()
        self._changed = trio.Event()

    def __len__(self) -> int:
        return len(self._heap)

    @property
    def watches(self) -> bool:
        """Whether the events of any type must reach somebody."""
        return bool(self._types)

    def note(self, events: Iterable[Event]) -> None:
        """Watch those of these durable events that must reach somebody."""
        for event in events:
            if event.escalation is not None:
                self._note_step(event, event.escalation)
            elif event.type in self._types and event.durable:
                assert event.stream is not None
                assert event.position is not None
                place = Place(event.stream, event.position)
                self._watch(event, event.type, place, 0, event.position[0])

    def _note_step(self, event: Event, escalation: Escalation) -> None:
        assert event.position is not None
        if escalation.of in self._types and (place := read_place(escalation.event_id)) is not None:
            self._watch(event, escalation.of, place, escalation.step, event.position[0])

    def _watch(self, event: Event, type_: str, place: Place, number: int, begun: int) -> None:
        route, at = self._routes[type_], place.position[0]
        steps = route.steps
        if number >= len(steps) or len(self._heap) >= _MOST:
            return
        expires = at + int((sum(step.within for step in steps) + self._ttl) * 1000)
        if expires < self._clock() * 1000:  # nothing is known of it any more
            return
        deadline = begun + int(steps[number].within * 1000)
        about = TrackedEvent(type_, event.tenant, event.branch, at)
        had = route.to
        for step in steps[: number + 1]:
            had |= step.to
        due = Due(
            place,
            about,
            event.sector,
            event.session,
            steps,
            names_of(had),
            number,
            deadline,
            expires,
        )
        self._push(due, deadline / 1000 + GRACE)

    def _push(self, due: Due, at: float) -> None:
        if not self._heap or at < self._heap[0][0]:
            self._changed.set()
        heapq.heappush(self._heap, (at, next(self._numbers), due))

    async def run(self, take: Take) -> NoReturn:
        """Ask about each step whose time is over; returns only when cancelled."""
        while True:
            await self._wait()
            until, found = self._clock() + _TOGETHER, list[Due]()
            while self._heap and self._heap[0][0] <= until and len(found) < 100:
                found.append(heapq.heappop(self._heap)[2])
            if not found:
                continue
            left = await take(found)
            if left is None:
                left = [int(_RETRY * 1000)] * len(found)
                await trio.sleep(_RETRY)
            for due, milliseconds in zip(found, left, strict=True):
                if milliseconds:
                    self._push(due, self._clock() + milliseconds / 1000)

    async def _wait(self) -> None:
        """Wait until the first deadline is over."""
        while not self._heap or (pause := self._heap[0][0] - self._clock()) > 0:
            self._changed = trio.Event()
            with trio.move_on_after(pause if self._heap else float("inf")):
                await self._changed.wait()
