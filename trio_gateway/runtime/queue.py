"""The queue: events that were heard and wait for dispatch."""

from typing import Final

import structlog
import trio

from ..core.events import Event
from ..core.limits import DropAlarm

log = structlog.get_logger()

MAX_BATCH_BYTES: Final = 262_144  # of payloads, about


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
        """Wait for one event; return it and what is there besides, up to ``most``, and to what
        one write may hold: whoever gets it all must not be over its outbox's bound by that.
        """
        batch = [await self._take.receive()]
        size = len(batch[0].payload)
        try:
            while len(batch) < most and size < MAX_BATCH_BYTES:
                batch.append(self._take.receive_nowait())
                size += len(batch[-1].payload)
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
