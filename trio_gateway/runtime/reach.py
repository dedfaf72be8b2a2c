"""Must reach: watches until when somebody must have confirmed an event.

Every process watches the events of the streams that it reads. When time is over, each asks Redis,
where one step is taken once: by which process does not matter, and if one dies, another asks.
What a step changes is an entry of the stream, so all processes learn of it there, see
:mod:`..core.escalation`.

Nobody is asked while Redis is away or the stream is not read, nor in the moment after that: what
clients have confirmed meanwhile must be written first. A command that waits in a stopped Redis
would be carried out before that, so Redis must have answered another one right before.
"""

import heapq
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from itertools import count
from typing import Final, NamedTuple, NoReturn

import structlog
import trio

from ..core.event_ids import Stream
from ..core.events import Event
from ..core.receipts import Place, TrackedEvent, read_place
from ..core.routing import Routing, Step, names_of
from .throttled_log import ThrottledLog

log = structlog.get_logger()

#: Seconds after a deadline until Redis is asked: what was confirmed in time is written by then.
GRACE: Final = 0.4
#: Seconds after an outage until Redis is asked: what was confirmed meanwhile is written by then.
SETTLE: Final = 2.5
# Seconds from one question to the next: deadlines that are over meanwhile share it.
_TOGETHER: Final = 0.2
_TOGETHER_ALONE: Final = 0.1  # if another process must first take over when this one dies
# Seconds after an answer in which Redis is not asked first whether it answers: if it stops in them,
# what was confirmed in time is written, as the deadlines were over before.
_FRESH: Final = 0.3
_MOST_TOGETHER: Final = 100
_RETRY: Final = 1.0  # seconds
_SLOW: Final = 0.3  # seconds for an answer, that came when an outage was over
_NEAR: Final = 5.0  # seconds from now to a deadline that is near
_MOST: Final = 100_000  # deadlines; the latest are dropped
_ASKED: Final = 60.0  # seconds for which what was asked is kept: Redis may lose what was done
_MOST_ASKED: Final = 10_000


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
#: Whether Redis answers about the event at a place now.
Answers = Callable[[Place], Awaitable[bool]]


class Reach:
    """The deadlines of the events that must reach somebody.

    ``clock`` returns unix time. ``by_stream``: the streams are on several servers, each of which is
    asked on its own. ``is_alone``: maybe no other process watches the same streams.
    """

    def __init__(
        self,
        routes: Routing,
        clock: Callable[[], float],
        ttl: float,
        *,
        by_stream: bool = False,
        is_alone: bool = False,
    ) -> None:
        self._routes = routes
        self._clock = clock
        self._ttl = ttl
        self._by_stream = by_stream
        self._together = _TOGETHER_ALONE if is_alone else _TOGETHER
        self._types = frozenset(name for name, route in routes.items() if route.steps)
        self._lanes: dict[Stream | None, _Lane] = {}
        self._opened = trio.lowlevel.ParkingLot()
        self._throttled_log = ThrottledLog(log)

    def __len__(self) -> int:
        return sum(len(lane.heap) for lane in self._lanes.values())

    @property
    def watches(self) -> bool:
        """Whether the events of any type must reach somebody."""
        return bool(self._types)

    @property
    def longest(self) -> float:
        """Seconds that the steps of an event take at most."""
        return max((route.longest for route in self._routes.values()), default=0.0)

    def note(self, events: Iterable[Event]) -> None:
        """Watch those of these durable events that must reach somebody."""
        for event in events:
            if (due := self._due(event)) is not None:
                self._watch(due)

    def note_near(self, event: Event) -> None:
        """As :meth:`note`, if its deadline is near. It may be noted again."""
        due = self._due(event)
        if due is not None and abs(due.deadline / 1000 - self._clock()) < _NEAR:
            self._watch(due)

    def _due(self, event: Event) -> Due | None:
        """The step that this event begins; None if it begins none."""
        if event.stream is None or event.position is None or not event.durable:
            return None
        place: Place | None = Place(event.stream, event.position)
        type_, number = event.type, 0
        if (escalation := event.escalation) is not None:
            place, type_, number = read_place(escalation.event_id), escalation.of, escalation.step
        if type_ not in self._types or place is None or place.stream != event.stream:
            return None
        route, at = self._routes[type_], place.position[0]
        if number >= len(route.steps):
            return None
        had = route.to
        for step in route.steps[: number + 1]:
            had |= step.to
        return Due(
            place,
            TrackedEvent(type_, event.tenant, event.branch, at),
            event.sector,
            event.session,
            route.steps,
            names_of(had),
            number,
            deadline=event.position[0] + int(route.steps[number].within * 1000),
            expires=at + int((route.longest + self._ttl) * 1000),
        )

    def _watch(self, due: Due) -> None:
        now = self._clock()
        if due.expires < now * 1000:  # nothing is known of it any more
            return
        if len(self) >= _MOST:
            self._throttled_log.error("too many events to watch", most=_MOST)
            return
        # Our clock may be behind that of Redis, but no entry is from the future.
        within = min(due.steps[due.number].within, due.deadline / 1000 - now)
        self._lane_of(due.place).push(due, within + GRACE)

    def drop(self, copy: Event) -> None:
        """This durable event, which was noted, is a copy of an earlier one: nobody is sent it."""
        if copy.type in self._types and copy.escalation is None:
            assert copy.stream is not None
            assert copy.position is not None
            place = Place(copy.stream, copy.position)
            self._lane_of(place).dropped.add(place)

    def ask_again(self) -> None:
        """Redis may have lost what it had: ask again what was asked in the last while."""
        for lane in self._lanes.values():
            lane.ask_again()

    def lost(self, stream: Stream) -> None:
        """This stream is not read: ask nothing about its events meanwhile.

        Without ``by_stream``, no stream is read then.
        """
        self._lane(stream).pause_until(math.inf)

    def back(self, stream: Stream) -> None:
        """This stream is read again; maybe another server has it."""
        lane = self._lane(stream)
        if lane.paused_until == math.inf:
            lane.pause_until(trio.current_time() + SETTLE)

    def _lane_of(self, place: Place) -> "_Lane":
        return self._lane(place.stream)

    def _lane(self, stream: Stream) -> "_Lane":
        name = stream if self._by_stream else None
        if (lane := self._lanes.get(name)) is None:
            lane = self._lanes[name] = _Lane(self._together)
            self._opened.unpark_all()
        return lane

    async def run(self, take: Take, answers: Answers) -> NoReturn:
        """Ask about each step whose time is over; returns only when cancelled."""
        running: set[_Lane] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for lane in set(self._lanes.values()) - running:
                    running.add(lane)
                    nursery.start_soon(lane.run, take, answers)
                await self._opened.park()


class _Lane:
    """The deadlines about which one server is asked."""

    def __init__(self, together: float) -> None:
        self._together = together
        self.heap: list[tuple[float, int, Due]] = []  # by when Redis is asked (Trio's time)
        self.paused_until = -math.inf
        self._next_at = -math.inf  # not before this: more may share a question
        self._numbers = count()
        self._changed = trio.Event()
        self.dropped: set[Place] = set()  # events that are not watched any more
        self._asked: deque[tuple[float, Due]] = deque(maxlen=_MOST_ASKED)

    def push(self, due: Due, pause: float) -> None:
        """Ask about it after a pause."""
        at = trio.current_time() + pause
        if not self.heap or at < self.heap[0][0]:
            self._changed.set()
        heapq.heappush(self.heap, (at, next(self._numbers), due))

    def pause_until(self, moment: float) -> None:
        self.paused_until = moment
        self._changed.set()

    def ask_again(self) -> None:
        since = trio.current_time() - _ASKED
        asked, self._asked = self._asked, deque(maxlen=_MOST_ASKED)
        for at, due in asked:
            if at >= since:
                self.push(due, SETTLE)

    async def run(self, take: Take, answers: Answers) -> NoReturn:
        was_away, answered_at = False, -math.inf
        while True:
            await self._wait()
            place, began = self.heap[0][2].place, trio.current_time()
            if began - answered_at > _FRESH:
                if not await answers(place):
                    was_away = True
                    await trio.sleep(_RETRY)
                    continue
                if was_away or trio.current_time() - began > _SLOW:
                    await trio.sleep(SETTLE)
                    was_away = not await answers(place)
                    if was_away:
                        continue
            found, asked_at = self._pop(), trio.current_time()
            left = await take(found) if found else []
            if left is None:
                was_away, left, asked_at = True, [1] * len(found), -math.inf
                await trio.sleep(_RETRY)
            now, answered_at = trio.current_time(), asked_at
            for due, milliseconds in zip(found, left, strict=True):
                if milliseconds:
                    self.push(due, milliseconds / 1000)
                else:
                    self._asked.append((now, due))

    async def _wait(self) -> None:
        """Wait until the first deadline is over."""
        while (at := self._next()) > trio.current_time():
            self._changed = trio.Event()
            with trio.CancelScope(deadline=at):
                await self._changed.wait()

    def _next(self) -> float:
        if not self.heap:
            return math.inf
        return max(self.heap[0][0], self.paused_until, self._next_at)

    def _pop(self) -> list[Due]:
        """What is asked about now."""
        now, found = trio.current_time(), list[Due]()
        while self.heap and self.heap[0][0] <= now and len(found) < _MOST_TOGETHER:
            due = heapq.heappop(self.heap)[2]
            if due.place in self.dropped and not due.number:
                self.dropped.discard(due.place)
            else:
                found.append(due)
        self._next_at = now + self._together if len(found) < _MOST_TOGETHER else now
        return found
