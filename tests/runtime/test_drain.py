"""The drain, with a queue that nobody empties."""

import pytest
import trio
from trio.testing import MockClock

from trio_gateway.core.capacity import CapacityLimits
from trio_gateway.runtime.drain import PATIENCE, Drain
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.testing import make_event


@pytest.mark.parametrize("after_bug", [False, True])
async def test_after_a_bug_it_waits_for_nobody(after_bug: bool, autojump_clock: MockClock) -> None:
    told = []

    async def tell_others() -> None:
        await trio.lowlevel.checkpoint()
        told.append("others")

    queue = EventQueue(10)
    queue.offer(make_event())
    hub = Hub(CapacityLimits(total=1, per_user=1, per_session=1))
    await Drain(hub, [queue], lambda: None, tell_others).run(after_bug=after_bug)

    assert trio.current_time() == (0 if after_bug else PATIENCE * 0.4)
    assert told == ([] if after_bug else ["others"])
