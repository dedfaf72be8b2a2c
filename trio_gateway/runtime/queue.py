"""The queue: received events that wait for dispatch, fair among tenants."""

import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final

import structlog
import trio

from ..core.audiences import TenantId
from ..core.event_ids import Stream
from ..core.events import Event
from ..core.limits import DropAlarm, TenantRate
from .throttled_log import ThrottledLog

log = structlog.get_logger()

_LANE: Final = Stream("")
MAX_BATCH_BYTES: Final = 262_144  # of payloads, about


class EventQueue:
    """Received events that wait to be delivered, at most ``capacity`` of them.

    :meth:`offer` drops an event when the queue is full. It is for Pub/Sub, where an event that
    nobody listens to is lost anyway. :meth:`extend` follows :meth:`wait_for_room`. It is for
    streams, which Redis keeps meanwhile. One queue is filled by one of them only, or a drop could
    take an event that was to wait.

    Each tenant has a lane, a queue of its own, and the lanes are served round robin, so that no
    tenant waits behind a flood of another. A stream is one lane, for whichever tenants its events
    are: clients resume by its order. With ``is_one_lane`` all events are one lane: the order in
    which shards were read is kept, too, since a tenant's events can be in two of them.

    A tenant that is paused has no turn: its events wait, and count as others do.
    """

    def __init__(
        self,
        capacity: int,
        alarm: DropAlarm | None = None,
        rate: TenantRate | None = None,
        *,
        is_one_lane: bool = False,
    ) -> None:
        self._lanes: dict[Stream | TenantId, deque[Event]] = {}
        # The lanes that are not paused, next one first; not all of them are empty.
        self._turns: deque[Stream | TenantId] = deque()
        self._paused: set[Stream | TenantId] = set()
        self._largest: deque[Event] = deque()  # the longest lane at the last look
        self._freed = trio.lowlevel.ParkingLot()
        self._added = trio.lowlevel.ParkingLot()
        self._is_one_lane = is_one_lane
        self._alarm = alarm
        self._rate = rate
        self._throttled_log = ThrottledLog(log)
        # Delivers events at once if they are few and for few; see Batches. False: they wait here.
        self.try_deliver: Callable[[Sequence[Event]], bool] | None = None
        self.undelivered = 0  # waiting or being delivered
        self._idle = trio.lowlevel.ParkingLot()
        self.capacity = capacity
        self.depth = 0
        self.dropped = 0  # because it was full
        self.over_rate = 0  # dropped because their tenant has more than its rate

    @property
    def oldest(self) -> float:
        """Receive time of the oldest waiting event; infinity if none waits."""
        return min([lane[0].received_at for lane in self._lanes.values() if lane], default=math.inf)

    @property
    def is_full(self) -> bool:
        """Whether :meth:`offer` would drop an event."""
        return self.depth >= self.capacity

    @property
    def room(self) -> int:
        """How many events can be added before it is full."""
        return self.capacity - self.depth

    def offer(self, event: Event) -> None:
        """Add an event; when full, drop an older one. Never waits."""
        self.offer_all([event])

    def offer_all(self, events: Sequence[Event]) -> None:
        """As :meth:`offer`, for one event after the other."""
        if self._rate is not None:
            events = [event for event in events if not self._is_refused(event)]
        if self.depth + len(events) > self.capacity:
            for event in events:
                self._offer(event)
            return
        if not self._delivers(events):
            lane_of = self._lane_of
            for event in events:
                lane_of(event).append(event)
            self.undelivered += len(events)
            self.depth += len(events)
        if self._alarm is not None and events:
            self._alarm.note(events[-1].received_at, dropped=False, events=len(events))

    def _offer(self, event: Event) -> None:
        dropped = self.depth >= self.capacity
        if dropped:
            loser = self._make_room(event)
        self.undelivered += 1
        self._lane_of(event).append(event)
        self.depth += 1
        if (alarm := self._alarm) is not None and alarm.note(event.received_at, dropped=dropped):
            log.error(
                "dropping events", dropped=alarm.dropped, heard=alarm.heard,
                capacity=self.capacity, tenant=loser.tenant,
            )  # fmt: skip

    def _delivers(self, events: Sequence[Event]) -> bool:
        """Deliver events at once, if none has to wait."""
        return not self.undelivered and self.try_deliver is not None and self.try_deliver(events)

    async def wait_for_room(self) -> int:
        """Wait until there is room, and return for how many events, in the same step."""
        while self.depth >= self.capacity:
            await self._freed.park()
        return self.capacity - self.depth

    def extend(self, events: Sequence[Event]) -> None:
        """Add events of one stream, for which there must be room."""
        assert self.depth + len(events) <= self.capacity
        if not events or self._delivers(events):
            return
        self.undelivered += len(events)
        self._lane_of(events[0]).extend(events)
        self.depth += len(events)

    async def wait(self) -> None:
        """Wait until there is something to take."""
        while not self._turns:
            await self._added.park()

    def pause(self, tenant: TenantId) -> None:
        """Let a tenant's events wait until :meth:`unpause`."""
        self._paused.add(tenant)
        if tenant in self._lanes:
            self._turns.remove(tenant)

    def unpause(self, tenant: TenantId) -> None:
        """Let a tenant's events be taken again, before those of others."""
        self._paused.remove(tenant)
        if tenant in self._lanes:
            self._turns.appendleft(tenant)
            self._added.unpark_all()

    def take(self, most: int) -> list[Event]:
        """Take up to ``most`` events, round robin across the lanes. Never waits.

        Stops after :data:`MAX_BATCH_BYTES` of payload, so that a client that receives the whole
        batch does not overflow its outbox.
        """
        batch: list[Event] = []
        lanes, turns = self._lanes, self._turns
        size = 0
        if len(turns) == 1:
            lane = lanes[turns[0]]
            while lane and len(batch) < most and size < MAX_BATCH_BYTES:
                batch.append(event := lane.popleft())
                size += len(event.payload)
            if not lane:
                del lanes[turns.popleft()]
            most = 0
        while turns and len(batch) < most and size < MAX_BATCH_BYTES:
            lane = lanes[turns[0]]
            if lane:  # else its only event was dropped
                event = lane.popleft()
                batch.append(event)
                size += len(event.payload)
            if lane:
                turns.rotate(-1)
            else:
                del lanes[turns.popleft()]
        self.depth -= len(batch)
        if self.depth < self.capacity:
            self._freed.unpark_all()
        return batch

    def done(self, events: int) -> None:
        """Tell that this number of taken events has been delivered."""
        self.undelivered -= events
        if not self.undelivered:
            self._idle.unpark_all()

    async def wait_idle(self) -> None:
        """Wait until everything that was added is delivered."""
        while self.undelivered:
            await self._idle.park()

    def _lane_of(self, event: Event) -> deque[Event]:
        key = _LANE if self._is_one_lane else event.stream or event.tenant
        if (lane := self._lanes.get(key)) is None:
            lane = self._lanes[key] = deque()
            if key not in self._paused:
                if not self._turns:
                    self._added.unpark_all()
                self._turns.append(key)
        return lane

    def _make_room(self, newcomer: Event) -> Event:
        """Drop one event to make room for another, and return it.

        The fair share of a lane is the capacity divided by the number of lanes. Drops the oldest
        event of the newcomer's lane if that has reached its share, else the oldest of the longest
        lane. A lane below its share loses nothing.
        """
        lanes = self._lanes
        share = self.capacity / len(lanes)
        lane = lanes.get(newcomer.tenant)
        if lane is None or len(lane) < share:
            if len(self._largest) < share:
                self._largest = max(lanes.values(), key=len)
            lane = self._largest
        self.depth -= 1
        self.undelivered -= 1
        self.dropped += 1
        return lane.popleft()

    def _is_refused(self, event: Event) -> bool:
        if self._rate is None or not self._rate.exceeded(event.tenant, event.received_at):
            return False
        self.over_rate += 1
        self._throttled_log.warning("tenant over its event rate", tenant=event.tenant)
        return True
