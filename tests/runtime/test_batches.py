"""Batches: who waits for a turn, what a batch holds, and how long it may take."""

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.numbered_events import connect, numbered, numbers, received
from trio_gateway.core.audiences import Endpoint, TenantId
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.testing import FakeSocket, make_principal

# In turns


class Jumping(FakeSocket):
    """Writing to it takes two seconds."""

    def __init__(self, clock: MockClock) -> None:
        super().__init__()
        self.clock = clock

    def try_write(self, data: bytes | memoryview) -> int:
        self.clock.jump(2)
        return super().try_write(data)


async def test_duplicates_are_dropped_and_counted(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queue = Hub(), EventQueue(9)
    socket = await connect(nursery, hub, make_principal())
    dispatch = Dispatch(hub)
    batches = Batches(dispatch)
    nursery.start_soon(batches.run, queue, 9)

    for channel in ("a", "b", "a"):
        queue.offer(numbered(0, channel=channel, ts=channel))
    await queue.wait_idle()
    queue.offer(numbered(0, channel="b", ts=0))
    await queue.wait_idle()

    assert received(socket) == [0, 0]  # the same content twice on "a" is two events
    assert dispatch.duplicate == 2
    assert dispatch.processed == 2
    assert sum(batches.latency.counts) == 2
    assert sum(batches.duration.counts) == 1


async def test_copy_that_waits_long_is_a_duplicate(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queue = Hub(), EventQueue(99)
    socket = await connect(nursery, hub, make_principal())
    dispatch = Dispatch(hub)
    batches = Batches(dispatch)
    queue.offer(numbered(1, received_at=0.0, channel="channel:branch:1:waiters"))
    queue.offer(numbered(1, received_at=0.1, channel="channel:branch:1:admin"))
    await trio.sleep(10)
    queue.offer(numbered(2, received_at=10.0, tenant_id=2))  # has its turn between the two
    nursery.start_soon(batches.run, queue, 50)
    await queue.wait_idle()

    assert received(socket) == [1]
    assert dispatch.duplicate == 1


async def test_slow_deliveries_are_logged_once_a_second(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queue = Hub(), EventQueue(999)
    for _ in range(60):
        await connect(nursery, hub, make_principal(), Jumping(autojump_clock))
    batches = Batches(Dispatch(hub, writes_per_checkpoint=1), timeout=0.1)
    nursery.start_soon(batches.run, queue, 1)
    with capture_logs() as logs:
        for n in range(100):
            queue.offer(numbered(n))
            await queue.wait_idle()
    seconds = trio.current_time()

    assert batches.failed == 100
    assert 1 <= len(logs) <= seconds + 1
    assert sum(log["held_back"] for log in logs) >= 100 - len(logs) - 20


@pytest.mark.parametrize(("waiting", "writes"), [(10, 1), (11, 1), (40, 1), (45, 2), (85, 3)])
async def test_one_write_carries_a_batch_or_four_batches_of_a_backlog(
    autojump_clock: MockClock, nursery: trio.Nursery, waiting: int, writes: int
) -> None:
    hub, queue = Hub(), EventQueue(99)
    socket = await connect(nursery, hub, make_principal())
    dispatch = Dispatch(hub)
    batches = Batches(dispatch)
    for n in range(waiting):
        queue.offer(numbered(n))

    nursery.start_soon(batches.run, queue, 10)
    await queue.wait_idle()

    assert received(socket) == list(range(waiting))
    assert socket.writes == writes
    assert dispatch.processed == waiting


async def test_duration_and_latency_are_observed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queue = Hub(), EventQueue(9)
    await connect(nursery, hub, make_principal(), Jumping(autojump_clock))
    batches = Batches(Dispatch(hub))
    await trio.sleep(10)
    queue.offer(numbered(0, received_at=7.0))
    queue.offer(numbered(1, received_at=9.0))

    nursery.start_soon(batches.run, queue, 9)
    await queue.wait_idle()

    assert batches.duration.sum == 2
    assert batches.latency.sum == (12 - 7) + (12 - 9)


@pytest.mark.parametrize("copies", [1, 2])
async def test_batch_that_takes_too_long_is_ended_and_the_next_is_delivered(
    autojump_clock: MockClock, nursery: trio.Nursery, copies: int
) -> None:
    hub, queue = Hub(), EventQueue(9)
    sockets = [
        await connect(nursery, hub, make_principal(), Jumping(autojump_clock)) for _ in range(9)
    ]
    kitchen = await connect(nursery, hub, make_principal(Endpoint.KITCHEN))
    dispatch = Dispatch(hub, writes_per_checkpoint=1)
    batches = Batches(dispatch, timeout=5)

    nursery.start_soon(batches.run, queue, 9)
    for n in range(copies):
        queue.offer(numbered(n, type="TABLE_SESSION_STARTED"))  # not for the kitchen
    await queue.wait_idle()
    assert sum('{"type":"gap"}' not in socket.texts for socket in sockets) == 3
    assert batches.failed == dispatch.processed == copies
    assert dispatch.deliveries == 3 * copies
    queue.offer(numbered(2, type="TICKET_READY", sector_id=1))  # for the kitchen alone
    await queue.wait_idle()

    assert received(kitchen) == [2]
    assert batches.failed == copies
    assert dispatch.processed == copies + 1


# Without a turn in the queue


async def test_event_that_comes_alone_is_delivered_in_the_step_in_which_it_is_offered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queue = Hub(), EventQueue(9)
    socket = await connect(nursery, hub, make_principal())
    dispatch = Dispatch(hub)
    batches = Batches(dispatch)
    nursery.start_soon(batches.run, queue, 9)
    await wait_all_tasks_blocked()

    queue.offer(numbered(0, received_at=-2.0))

    assert received(socket) == [0]
    assert queue.undelivered == 0
    assert dispatch.processed == dispatch.deliveries == 1
    assert batches.latency.sum == 2


@pytest.mark.parametrize("why", ["others wait", "many come", "many hear it", "a client is behind"])
async def test_event_is_not_delivered_in_the_step_in_which_it_is_offered_if(
    autojump_clock: MockClock, nursery: trio.Nursery, why: str
) -> None:
    hub, queue = Hub(), EventQueue(99)
    socket = await connect(nursery, hub, make_principal())
    batches = Batches(Dispatch(hub, writes_per_checkpoint=1))
    nursery.start_soon(batches.run, queue, 9)
    await wait_all_tasks_blocked()
    events = [numbered(0), numbered(1)]
    match why:
        case "others wait":
            await connect(nursery, hub, make_principal(tenant=2))
            queue.pause(TenantId(2))
            queue.offer_all([numbered(n, tenant_id=2) for n in range(9)])
        case "many come":
            events = [numbered(n) for n in range(9)]
        case "many hear it":
            await connect(nursery, hub, make_principal())
        case "a client is behind":
            socket.room = 0
            queue.offer(numbered(9))

    queue.offer_all(events)

    assert received(socket) == []
    assert queue.undelivered >= len(events)
    socket.read(10_000)
    await wait_all_tasks_blocked()
    assert received(socket)[-len(events) :] == numbers(events)


async def test_event_waits_for_a_batch_of_another_queue(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, queues = Hub(), [EventQueue(9), EventQueue(9)]

    class Offering(FakeSocket):
        """While it is written to, another event comes."""

        def try_write(self, data: bytes | memoryview) -> int:
            if not self.texts:
                queues[1].offer(numbered(1))
            return super().try_write(data)

    socket = await connect(nursery, hub, make_principal(), Offering())
    batches = Batches(Dispatch(hub))
    queues[0].offer(numbered(0))
    for queue in queues:
        nursery.start_soon(batches.run, queue, 9)
    await wait_all_tasks_blocked()
    assert received(socket) == [0, 1]
