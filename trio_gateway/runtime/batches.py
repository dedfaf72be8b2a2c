"""Batches: take events from the queues, and have them dispatched one batch at a time."""

import math
from collections.abc import Callable, Sequence
from typing import Final, NoReturn

import structlog
import trio

from ..core.events import Event
from ..core.histogram import Histogram
from .connection import Connection
from .dispatch import TO_NOBODY, Dispatch
from .pauses import Pauses
from .queue import EventQueue
from .throttled_log import ThrottledLog

log = structlog.get_logger()

LOOK_BACK: Final = 1.0  # seconds
_BATCHES_OF_A_BACKLOG: Final = 4
_FEW: Final = 8  # events that are delivered without a turn in the queue


class Batches:
    """Takes batches from queues, and counts how long they and their events take.

    A batch that takes longer than ``timeout`` seconds is broken off.
    """

    def __init__(self, dispatch: Dispatch, timeout: float = math.inf) -> None:
        self._dispatch = dispatch
        self._timeout = timeout
        # One batch at a time, from whichever queue: an event on Pub/Sub has reached every client
        # before the events that follow its copy in the stream do.
        self._turn = trio.Lock()
        self._queues: list[EventQueue] = []  # that it takes from
        self._looked_back_at = -math.inf
        self._throttled_log = ThrottledLog(log)
        self.failed = 0
        self.duration = Histogram()  # of one batch
        self.latency = Histogram()  # of each event, from hearing it to its last write
        self.observe: Callable[[Sequence[Event], float], None] | None = None  # what was delivered

    async def run(self, queue: EventQueue, batch_size: int) -> NoReturn:
        """Deliver the events of a queue; return only when cancelled.

        When more waits than one batch holds, several batches go in one write. More events share
        the cost of a write then, which is how a backlog is worked off.
        """
        self._queues.append(queue)
        queue.try_deliver = self.try_deliver
        pauses, turn = Pauses(queue), self._turn
        while True:
            is_idle = not queue.depth
            await pauses.wait()
            # A task that has just waited needs no checkpoint, which :meth:`trio.Lock.acquire` is.
            if is_idle and not turn.locked():
                turn.acquire_nowait()
            else:
                await turn.acquire()
            fresh: list[Event] = []
            behind: list[Connection] = []
            is_late = False
            try:
                started = trio.current_time()
                self._look_back(started)
                batches = _BATCHES_OF_A_BACKLOG if queue.depth > batch_size else 1
                batch = queue.take(batch_size * batches)
                fresh = await self._dispatch.deliver(batch, behind, started + self._timeout)
            except trio.TooSlowError:
                is_late = True
            finally:
                turn.release()
            ended = trio.current_time()
            if behind and batch[0].stream is None:  # what comes from a stream waits in the history
                pauses.note(behind, ended)
            if is_late:
                self.failed += len(batch)
                self._log_failure(len(batch))
            if fresh or is_late:
                self.duration.observe(ended - started)
            self._note(fresh, ended)
            queue.done(len(batch))

    def try_deliver(self, events: Sequence[Event]) -> bool:
        """Deliver events in this step if there is little or nothing to write.

        Returns False, having done nothing, if they are to wait for their turn in a queue. Events
        that were received before them in this queue must have been delivered.
        """
        dispatch = self._dispatch
        concerned = dispatch.hub.concern(events)
        if any(concerned):
            if len(events) > _FEW or self._turn.locked():
                return False
            routes = dispatch.route(events, concerned)
            groups = [members for _, found in routes for members in found]
            if sum(map(len, groups)) > dispatch.writes_per_checkpoint:
                return False
            # A client that is behind may be one to wait for, see Pauses.
            if any(connection.waiting_bytes for members in groups for connection in members):
                return False
        else:
            routes = [TO_NOBODY] * len(events)
        started = trio.current_time()
        self._look_back(started)
        plan = dispatch.plan(events, concerned, routes)
        for _ in dispatch.write(plan):
            pass  # it was little
        ended = trio.current_time()
        if fresh := plan.fresh:
            self.duration.observe(ended - started)
        self._note(fresh, ended)
        return True

    def _note(self, fresh: Sequence[Event], ended: float) -> None:
        """Note that these events, which were not duplicates, have been delivered."""
        self.latency.observe_all([ended - event.received_at for event in fresh])
        if self.observe is not None:
            self.observe(fresh, ended)

    def _look_back(self, now: float) -> None:
        """Once a second, note the receive time of the oldest waiting event.

        Its copies must be remembered until it comes; no later event was received before it.
        """
        if now - self._looked_back_at >= LOOK_BACK:
            self._looked_back_at = now
            oldest = min([now, *(queue.oldest for queue in self._queues)])
            self._dispatch.duplicates.oldest_pending = oldest

    def _log_failure(self, events: int) -> None:
        self._throttled_log.error("delivery took too long", events=events, seconds=self._timeout)
