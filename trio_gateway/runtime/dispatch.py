"""Dispatch: from the queue to whoever may hear it, in one write a connection."""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import NoReturn

import structlog
import trio

from ..core.audiences import Audience, floor, waiters
from ..core.duplicates import Duplicates
from ..core.events import Event
from ..core.histogram import Histogram
from ..core.limits import DropAlarm
from ..core.routing import ROUTES, Route, route
from .hub import Hub

log = structlog.get_logger()


class EventQueue:
    """Events that were heard and wait to be delivered: a bounded memory channel.

    :meth:`offer` drops the oldest when full and is for what is lost anyhow if nobody listens
    (Pub/Sub); :meth:`put` waits, and is for what Redis keeps meanwhile (streams). One queue is
    filled by one of them only, or a drop could take what was to wait.
    """

    def __init__(self, capacity: int, alarm: DropAlarm | None = None) -> None:
        self._put, self._take = trio.open_memory_channel[Event](capacity)
        self._alarm = alarm
        self._undelivered = 0
        self._idle = trio.Event()
        self.capacity = capacity
        self.dropped = 0

    @property
    def depth(self) -> int:
        return self._put.statistics().current_buffer_used

    def offer(self, event: Event) -> None:
        """Add an event; when full, the oldest one makes room. Never waits."""
        dropped = False
        self._undelivered += 1
        while True:
            try:
                self._put.send_nowait(event)
                break
            except trio.WouldBlock:
                self._take.receive_nowait()
                self._undelivered -= 1
                self.dropped += 1
                dropped = True
        if self._alarm is not None and self._alarm.note(event.heard_at, dropped=dropped):
            log.error(
                "dropping events", dropped=self._alarm.dropped, heard=self._alarm.heard,
                capacity=self.capacity,
            )  # fmt: skip

    async def put(self, event: Event) -> None:
        """Add an event, waiting for room."""
        self._undelivered += 1
        try:
            self._put.send_nowait(event)
        except trio.WouldBlock:
            try:
                await self._put.send(event)
            except trio.Cancelled:
                self.done(1)  # it was not added
                raise

    async def take(self, most: int) -> list[Event]:
        """Wait for one event; return it and what is there besides, up to ``most``."""
        batch = [await self._take.receive()]
        try:
            while len(batch) < most:
                batch.append(self._take.receive_nowait())
        except trio.WouldBlock:
            pass
        return batch

    def done(self, events: int) -> None:
        """So many of those that were taken are delivered."""
        self._undelivered -= events
        if not self._undelivered:
            self._idle.set()

    async def wait_idle(self) -> None:
        """Wait until everything that was added is delivered."""
        while self._undelivered:
            if self._idle.is_set():
                self._idle = trio.Event()
            await self._idle.wait()


class Dispatch:
    """Delivers batches of events to the hub's connections, and counts."""

    def __init__(
        self,
        hub: Hub,
        routes: Mapping[str, Route] = ROUTES,
        *,
        uncovered_to_branch: bool = False,
        writes_per_checkpoint: int = 50,
        timeout: float = math.inf,
    ) -> None:
        self._hub = hub
        self._routes = routes
        self._uncovered_to_branch = uncovered_to_branch
        self._writes_per_checkpoint = writes_per_checkpoint
        self._timeout = timeout
        self._duplicates = Duplicates()
        self.processed = self.broadcasts = self.failed = self.deliveries = 0
        self.duplicate = self.unheard = self.unknown_type = 0
        self.duration = Histogram()  # of one batch
        self.latency = Histogram()  # of each event, from hearing it to its last write

    async def run(self, queue: EventQueue, batch_size: int) -> NoReturn:
        """Deliver what comes; return only when cancelled."""
        while True:
            batch = await queue.take(batch_size)
            started = trio.current_time()
            # Not at hearing: a copy that the queue then drops must not count as the first.
            fresh = [event for event in batch if not self._duplicates.is_duplicate(event)]
            self.duplicate += len(batch) - len(fresh)
            with trio.move_on_after(self._timeout) as scope:
                await self.deliver(fresh)
            ended = trio.current_time()
            self.processed += len(fresh)
            if scope.cancelled_caught:
                self.failed += len(fresh)
                log.error("delivery took too long", events=len(fresh), seconds=self._timeout)
            if fresh:
                self.duration.observe(ended - started)
            for event in fresh:
                self.latency.observe(ended - event.heard_at)
            queue.done(len(batch))

    async def deliver(self, batch: Sequence[Event]) -> None:
        """Hand each event to whoever may hear it: each connection once, in one write."""
        if len(batch) == 1:
            await self._deliver_one(batch[0])
        elif batch:
            await self._deliver_many(batch)

    async def _deliver_one(self, event: Event) -> None:
        members = self._hub.members(self.audiences(event))
        if not members:
            return
        frame, now = event.frame, trio.current_time()
        for n, connection in enumerate(members, 1):
            connection.write(frame, 1, now)
            self.deliveries += 1
            if n % self._writes_per_checkpoint == 0:
                await trio.lowlevel.checkpoint()

    async def _deliver_many(self, batch: Sequence[Event]) -> None:
        """As one bit mask per audience (bit i: the i-th event), so that the work per connection
        is to or the masks of its own audiences, and equal masks share one joined byte string.
        """
        heard: defaultdict[Audience, int] = defaultdict(int)
        for i, event in enumerate(batch):
            for audience in self.audiences(event):
                heard[audience] |= 1 << i
        joined: dict[int, tuple[bytes, int]] = {}  # few masks, many connections
        now = trio.current_time()
        for n, connection in enumerate(self._hub.members(heard), 1):
            if not (mask := connection.mask(heard)):  # it moved since the last checkpoint
                continue
            if (found := joined.get(mask)) is None:
                found = joined[mask] = join(batch, mask)
            data, frames = found
            connection.write(data, frames, now)
            self.deliveries += frames
            if n % self._writes_per_checkpoint == 0:
                await trio.lowlevel.checkpoint()

    def audiences(self, event: Event) -> list[Audience]:
        """Who hears it live: :func:`route`, and what an uncovered sector falls back to."""
        found = route(event, self._routes)
        if event.type not in self._routes:
            self.unknown_type += 1
        heard = any(map(self._hub.hears, found))
        if event.sector is not None:
            covering = waiters(event.tenant, event.branch, event.sector)
            if covering in found and not self._hub.hears(covering):
                self.unheard += 1
                if self._uncovered_to_branch:
                    found.append(floor(event.tenant, event.branch))
                    heard = heard or self._hub.hears(found[-1])
                self.broadcasts += heard
                return found
        if heard:
            self.broadcasts += 1
        else:
            self.unheard += 1
        return found


def join(batch: Sequence[Event], mask: int) -> tuple[bytes, int]:
    """The frames of the events whose bits are set, in order, and how many they are."""
    frames = [event.frame for i, event in enumerate(batch) if mask >> i & 1]
    return b"".join(frames), len(frames)
