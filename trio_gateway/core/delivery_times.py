"""Delivery times: how long the events of each tenant take from entering Redis to its clients.

A process counts what it does itself, by Redis' clock, in parts of one minute and of five minutes.
A part is forgotten as a whole: the last five minutes are up to six, the last hour is up to 65.

An event is counted when it was written to those that take it at once. If a client that was
connected when the event entered Redis takes it later, from its outbox or from the history, the
event is counted anew, with that time. Who connects only later was away: that is no delay.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from .distinct import number_of
from .event_ids import Position, Stream
from .events import Event
from .receipts import Place, TrackedEvent
from .time_counts import Figures, TimeCounts, add, remove

MOST_TENANTS: Final = 1000
MOST_REMEMBERED: Final = 50_000  # events, of which it is known when they were written
_NOTICED: Final = 50  # ms: a client that is not further behind changes no count
_MINUTE: Final = 60_000  # ms
_HOUR: Final = 65  # minutes
_NEVER: Final = -1 << 62  # minutes


class TenantFigures(msgspec.Struct, omit_defaults=True):
    """The figures of one tenant, or of several."""

    last_5_minutes: Figures = msgspec.field(default_factory=Figures)
    last_hour: Figures = msgspec.field(default_factory=Figures)

    @property
    def is_empty(self) -> bool:
        return self.last_hour == Figures()

    def merge(self, other: "TenantFigures") -> None:
        """Add those of another process, or of other tenants."""
        self.last_5_minutes.merge(other.last_5_minutes)
        self.last_hour.merge(other.last_hour)


class DeliveryTimes:
    """Counts the delivery times of this process. ``slo`` is in seconds: what takes longer is late.

    Each of ``most`` tenants has figures of its own, the others have them together. A tenant keeps
    its place until it had no event for an hour. Only one with a late event gets a place earlier:
    then the tenant that was quiet for longest, of those without a late event in the last hour,
    joins the others. So neither a flood of another tenant nor its size hides a slow one.
    """

    def __init__(self, slo: float = 1.0, *, most: int = MOST_TENANTS) -> None:
        self.slo = slo
        self._limit = slo * 1000  # ms
        self._most = most
        self._tenants: dict[int, _TenantTimes] = {}
        self._others = _TenantTimes()
        # When events were written last (Redis' unix ms), if clients were behind then.
        self._written_at: OrderedDict[tuple[Stream, Position], int] = OrderedDict()
        self._ahead: dict[Stream, float] = {}
        self._looked_at = _NEVER  # the minute in which it was looked
        self._may_leave: list[int] = []  # who may join the others, those quiet for longest last

    def set_clock(self, streams: Iterable[Stream], ahead: float) -> None:
        """Note (Redis' unix time - the time here) of the servers that have these streams."""
        for stream in streams:
            self._ahead[stream] = ahead

    def written(
        self,
        planned: Sequence[tuple[Event, object, object]],
        written: int,
        now: float,
        *,
        is_behind: bool = False,
    ) -> None:
        """Count those of these events that were written (bit i: the i-th) to all their clients.

        ``is_behind`` says that some may be written to others later: that is :class:`Owed`. An event
        from Pub/Sub has no time at which it entered Redis.
        """
        last: Stream | None = None
        redis_now = minute = 0
        for n, (event, _, _) in enumerate(planned):
            stream, position = event.stream, event.position
            if stream is None or position is None or not written >> n & 1:
                continue
            if stream != last:
                last = stream
                redis_now = self.redis_now(stream, now)
                minute = redis_now // _MINUTE
            if is_behind:
                if (place := (stream, position)) in self._written_at:  # by a client that was quick
                    self.count_last(event.tenant, Place(*place), redis_now)
                    continue
                self._remember(place, redis_now)
            if (ms := redis_now - position[0]) < 0:
                ms = 0
            is_late = ms > self._limit
            of = self._tenants.get(event.tenant)
            if of is None or of.minute != minute or is_late:
                of = self._of(event.tenant, minute, is_late=is_late)
            add(of.written, ms, number_of(stream, position) if is_late else None)

    def count_last(self, tenant: int, place: Place, redis_now: int) -> None:
        """Count that an event was written now, instead of when it was written before."""
        ms = max(0, redis_now - place.position[0])
        is_late = ms > self._limit
        if (before := self._written_at.get(place)) is not None:
            ms_before = max(0, before - place.position[0])
            if ms < ms_before + _NOTICED and not ms_before <= self._limit < ms:
                return
        of = self._of(tenant, redis_now // _MINUTE, is_late=is_late)
        if before is not None:
            remove([each.written for each in of.at(before // _MINUTE)], ms_before)
        self._remember(place, redis_now)
        add(of.written, ms, number_of(*place) if is_late else None)

    def _remember(self, place: tuple[Stream, Position], redis_now: int) -> None:
        self._written_at[place] = redis_now
        if len(self._written_at) > MOST_REMEMBERED:
            self._written_at.popitem(last=False)

    def due(self, places: Sequence[Place], redis_now: int) -> int:
        """When these events, which were counted now, change a count if they are written again."""
        due = redis_now + max(_NOTICED, (redis_now - places[0].position[0]) // 10)
        late = (int(place.position[0] + self._limit) + 1 for place in places)
        return min((at for at in late if redis_now < at < due), default=due)

    def sent(self, place: Place, event: TrackedEvent, now: float) -> None:
        """Count a client that was sent a tracked event, and has not confirmed it yet."""
        minute = self.redis_now(place.stream, now) // _MINUTE
        of = self._of(event.tenant_id, minute, is_late=False)
        for each in of.at(event.at // _MINUTE):  # and not for this minute: so that both counts meet
            each.unconfirmed += 1

    def confirmed(self, place: Place, event: TrackedEvent, now: float) -> None:
        """Count a client that has confirmed a tracked event, after it was :meth:`sent`."""
        redis_now = self.redis_now(place.stream, now)
        ms = max(0, redis_now - event.at)
        is_late = ms > self._limit
        of = self._of(event.tenant_id, redis_now // _MINUTE, is_late=is_late)
        for each in of.at(event.at // _MINUTE):
            each.unconfirmed -= 1
        late = number_of(*place) if is_late else None
        add([each.delivered for each in of.at(of.minute)], ms, late)

    @property
    def tenants(self) -> Collection[int]:
        """Those that have figures of their own."""
        return self._tenants.keys()

    def figures(self, tenant: int | None, now: float) -> TenantFigures:
        """The figures of a tenant; with None, of those that have none of their own."""
        of = self._others if tenant is None else self._tenants.get(tenant, _TenantTimes())
        return of.figures(int((now + max(self._ahead.values(), default=0.0)) * 1000) // _MINUTE)

    def redis_now(self, stream: Stream, now: float) -> int:
        """Redis' unix time in ms."""
        return int((now + self._ahead.get(stream, 0.0)) * 1000)

    def _of(self, tenant: int, minute: int, *, is_late: bool) -> "_TenantTimes":
        """Where to count an event of this tenant."""
        if (found := self._tenants.get(tenant)) is None:
            if len(self._tenants) < self._most or self._make_room(minute, for_late=is_late):
                found = self._tenants[tenant] = _TenantTimes()
            else:
                found = self._others
        if found.minute != minute:
            found.turn(minute)
        if is_late:
            found.late_at = minute
        return found

    def _make_room(self, minute: int, *, for_late: bool) -> bool:
        """Let a tenant join the others, if there is one that may."""
        if self._looked_at != minute:  # not for each event: there may be many
            self._looked_at = minute
            punctual = (each for each, of in self._tenants.items() if of.late_at <= minute - _HOUR)
            self._may_leave = sorted(
                punctual, key=lambda each: self._tenants[each].minute, reverse=True
            )
        while self._may_leave:
            of = self._tenants[self._may_leave[-1]]
            is_punctual = of.late_at <= minute - _HOUR
            if is_punctual and not for_late and of.minute > minute - _HOUR:
                return False
            tenant = self._may_leave.pop()
            if is_punctual:  # still
                self._others.merge(self._tenants.pop(tenant))
                return True
        return False


class Owed:
    """Events of a tenant that clients get later than others, be it one client or many."""

    __slots__ = ("_due", "_places", "_tenant", "_times")

    def __init__(self, times: DeliveryTimes, tenant: int, places: Sequence[Place]) -> None:
        self._times = times
        self._tenant = tenant
        self._places = places
        self._due = 0  # when they are worth counting again

    def __bool__(self) -> bool:
        return bool(self._places)

    def written(self, now: float) -> None:
        """They were written to one of the clients."""
        if not (places := self._places):
            return
        redis_now = self._times.redis_now(places[0].stream, now)
        if redis_now >= self._due:
            for place in places:
                self._times.count_last(self._tenant, place, redis_now)
            self._due = self._times.due(places, redis_now)


class _Parts:
    """Figures in parts of this many ``minutes``, the last ``most`` of them."""

    __slots__ = ("_by_number", "_minutes", "_most")

    def __init__(self, minutes: int, most: int) -> None:
        self._minutes = minutes
        self._most = most
        self._by_number: dict[int, Figures] = {}

    def at(self, minute: int, newest: int) -> Figures | None:
        """The part of this minute; None if it is forgotten when ``newest`` is the current one."""
        number = minute // self._minutes
        if (found := self._by_number.get(number)) is None and self._holds(number, newest):
            self._by_number = {n: f for n, f in self._by_number.items() if self._holds(n, newest)}
            found = self._by_number[number] = Figures()
        return found

    def _holds(self, number: int, newest: int) -> bool:
        # Redis' servers differ a bit in their time, so a later part may exist already.
        return -1 <= newest // self._minutes - number < self._most

    def sum(self, newest: int) -> Figures:
        """All parts together."""
        found = Figures()
        for number, figures in self._by_number.items():
            if self._holds(number, newest):
                found.merge(figures)
        return found

    def merge(self, other: "_Parts") -> None:
        """Add those of another tenant."""
        for number, figures in other._by_number.items():
            self._by_number.setdefault(number, Figures()).merge(figures)


class _TenantTimes:
    """The figures of one tenant."""

    __slots__ = ("_blocks", "_now", "_single", "late_at", "minute", "written")

    def __init__(self) -> None:
        self._single = _Parts(1, 6)
        self._blocks = _Parts(5, 13)
        self.minute = _NEVER  # of the last event
        self.late_at = _NEVER  # the minute of the last late one
        self._now: Sequence[Figures] = ()  # the parts that this minute is in
        self.written: Sequence[TimeCounts] = ()  # of these

    def turn(self, minute: int) -> None:
        """Begin to count in this minute."""
        self.minute = minute
        self._now = self._parts_of(minute)
        self.written = [each.written for each in self._now]

    def at(self, minute: int) -> Sequence[Figures]:
        """The parts that a minute is in, those that are kept."""
        return self._now if minute == self.minute else self._parts_of(minute)

    def _parts_of(self, minute: int) -> Sequence[Figures]:
        found = (each.at(minute, self.minute) for each in (self._single, self._blocks))
        return [each for each in found if each is not None]

    def figures(self, minute: int) -> TenantFigures:
        """The figures in this minute."""
        return TenantFigures(self._single.sum(minute), self._blocks.sum(minute))

    def merge(self, other: "_TenantTimes") -> None:
        """Add those of another tenant."""
        self._single.merge(other._single)
        self._blocks.merge(other._blocks)
