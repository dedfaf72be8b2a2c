"""The queue: events that were heard and wait for dispatch, taken from tenant after tenant."""

import math
from collections import deque
from typing import Final

import structlog
import trio

from ..core.audiences import TenantId
from ..core.event_ids import Stream
from ..core.events import Event
from ..core.limits import DropAlarm, TenantRate
from .throttled_log import ThrottledLog

log = structlog.get_logger()

MAX_BATCH_BYTES: Final = 262_144  # of payloads, about


class EventQueue:
    """Events that were heard and wait to be delivered, ``capacity`` of them at most.

    :meth:`offer` drops when full and is for what is lost anyhow if nobody listens (Pub/Sub);
    :meth:`put` waits, and is for what Redis keeps meanwhile (streams). One queue is filled by one
    of them only, or a drop could take what was to wait.

    Each tenant's events wait in a lane of their own, and the lanes are taken from in turn, so
    that nobody waits behind another's flood. A stream is one lane, whoever its events are for:
    its order is what clients resume by.
    """

    def __init__(
        self, capacity: int, alarm: DropAlarm | None = None, rate: TenantRate | None = None
    ) -> None:
        self._lanes: dict[Stream | TenantId, deque[Event]] = {}
        self._turns: deque[Stream | TenantId] = deque()  # the lanes; the next one comes first
        self._largest: deque[Event] = deque()  # a lane that had most waiting when it was looked for
        self._blocked: dict[trio.lowlevel.Task, Event] = {}  # who waits for room, with what
        self._news = trio.Event()
        self._alarm = alarm
        self._rate = rate
        self._throttled_log = ThrottledLog(log)
        self.undelivered = 0  # that wait, or are being delivered
        self._idle = trio.Event()
        self.capacity = capacity
        self.depth = 0
        self.dropped = 0  # because it was full
        self.over_rate = 0  # dropped because their tenant has more than its rate

    @property
    def oldest(self) -> float:
        """When the first of those that wait was heard; infinity if none does."""
        waiting = [lane[0].received_at for lane in self._lanes.values() if lane]
        waiting += [event.received_at for event in self._blocked.values()]
        return min(waiting, default=math.inf)

    def offer(self, event: Event) -> None:
        """Add an event; when full, an older one makes room. Never waits."""
        if self._rate is not None and self._rate.exceeded(event.tenant, event.received_at):
            self._refuse(event)
            return
        dropped = self.depth >= self.capacity
        if dropped:
            loser = self._make_room(event)
        self.undelivered += 1
        self._add(event)
        if (alarm := self._alarm) is not None and alarm.note(event.received_at, dropped=dropped):
            log.error(
                "dropping events", dropped=alarm.dropped, heard=alarm.heard,
                capacity=self.capacity, tenant=loser.tenant,
            )  # fmt: skip

    async def put(self, event: Event) -> None:
        """Add an event, waiting for room."""
        self.undelivered += 1
        if self.depth < self.capacity:  # then nobody waits
            self._add(event)
            return
        task = trio.lowlevel.current_task()
        self._blocked[task] = event

        def give_up(_: object) -> trio.lowlevel.Abort:
            del self._blocked[task]
            self.done(1)  # it was not added
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(give_up)

    async def wait(self) -> None:
        """Wait until there is something to take."""
        while not self.depth:
            if self._news.is_set():
                self._news = trio.Event()
            await self._news.wait()

    def take(self, most: int) -> list[Event]:
        """What is there, from each lane in turn: up to ``most``, and to what one write may hold,
        since whoever gets it all must not be over its outbox's bound by that.
        """
        batch: list[Event] = []
        lanes, turns = self._lanes, self._turns
        left, size = self.depth, 0
        while left and len(batch) < most and size < MAX_BATCH_BYTES:
            lane = lanes[turns[0]]
            if lane:  # else it has lost its only one to a newcomer
                event = lane.popleft()
                batch.append(event)
                size += len(event.payload)
                left -= 1
            if lane:
                turns.rotate(-1)
            else:
                del lanes[turns.popleft()]
        self.depth = left
        while self._blocked and self.depth < self.capacity:
            task = next(iter(self._blocked))
            self._add(self._blocked.pop(task))
            trio.lowlevel.reschedule(task)
        return batch

    def done(self, events: int) -> None:
        """So many of those that were taken are delivered."""
        self.undelivered -= events
        if not self.undelivered:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until everything that was added is delivered."""
        while self.undelivered:
            if self._idle.is_set():
                self._idle = trio.Event()
            await self._idle.wait()

    def _add(self, event: Event) -> None:
        key = event.stream or event.tenant
        if (lane := self._lanes.get(key)) is None:
            lane = self._lanes[key] = deque()
            self._turns.append(key)
        lane.append(event)
        if not self.depth:
            self._news.set()
        self.depth += 1

    def _make_room(self, newcomer: Event) -> Event:
        """Drop the oldest event of whoever has as many waiting as its share of the room, or more:
        the newcomer's tenant if it has, else one that had most. Who has less loses nothing.
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

    def _refuse(self, event: Event) -> None:
        self.over_rate += 1
        self._throttled_log.warning("tenant over its event rate", tenant=event.tenant)
