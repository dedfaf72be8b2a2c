"""The queue: drop or wait when it is full, and no tenant behind the flood of another."""

import json
import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import TenantId
from trio_gateway.core.event_ids import Position, Stream
from trio_gateway.core.events import Event
from trio_gateway.core.limits import DropAlarm, TenantRate
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.testing import make_event


def numbered(n: int, **keys: Any) -> Event:
    return make_event(data=n, **keys)


def numbers(events: Sequence[Event]) -> list[int]:
    return [json.loads(event.payload)["data"] for event in events]


async def test_offer_drops_the_oldest(autojump_clock: MockClock) -> None:
    queue = EventQueue(3)
    for n in range(5):
        queue.offer(numbered(n))

    assert (queue.depth, queue.dropped, queue.capacity) == (3, 2, 3)
    assert numbers(queue.take(9)) == [2, 3, 4]


async def test_part_of_what_was_read_is_added_as_soon_as_there_is_room(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue, rooms = EventQueue(3), []

    async def fill() -> None:
        left = [of_stream("a", n) for n in range(7)]
        while left:
            rooms.append(await queue.wait_for_room())
            queue.extend(left[: rooms[-1]])
            del left[: rooms[-1]]

    nursery.start_soon(fill)
    await wait_all_tasks_blocked()
    found = []
    for most in (1, 2, 9):
        found.append(numbers(queue.take(most)))
        await wait_all_tasks_blocked()

    assert rooms == [3, 1, 2, 3]
    assert found == [[0], [1, 2], [3, 4, 5]]
    assert (numbers(queue.take(9)), queue.undelivered) == ([6], 7)


async def test_take_returns_what_waits_and_never_waits_for_more(
    autojump_clock: MockClock,
) -> None:
    queue = EventQueue(9)
    for n in range(5):
        queue.offer(numbered(n))

    assert numbers(queue.take(3)) == [0, 1, 2]
    assert numbers(queue.take(3)) == [3, 4]
    assert trio.current_time() == 0


async def test_wait_ends_with_the_first_event(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue = EventQueue(9)
    took: list[tuple[float, list[int]]] = []

    async def take() -> None:
        await queue.wait()
        took.append((trio.current_time(), numbers(queue.take(9))))

    nursery.start_soon(take)
    await trio.sleep(7)
    queue.offer(numbered(0))
    await wait_all_tasks_blocked()

    assert took == [(7, [0])]


async def test_queue_is_idle_when_all_is_delivered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue = EventQueue(9)
    idle: list[float] = []

    async def wait() -> None:
        await queue.wait_idle()
        idle.append(trio.current_time())

    await wait()  # nothing was added yet
    queue.extend([numbered(0)])
    queue.offer(numbered(1))
    for _ in range(3):  # each task that waits
        nursery.start_soon(wait)
    await trio.sleep(1)
    queue.take(1)
    await trio.sleep(1)
    queue.done(1)
    await trio.sleep(1)
    queue.take(1)
    await trio.sleep(1)
    assert idle == [0]
    queue.done(1)
    await wait_all_tasks_blocked()
    assert idle == [0, 4, 4, 4]


async def test_queue_is_not_idle_while_an_event_is_on_its_way(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue = EventQueue(9)
    delivered: list[int] = []

    async def deliver() -> None:
        while True:
            await queue.wait()
            batch = queue.take(9)
            delivered.extend(numbers(batch))
            queue.done(len(batch))

    for n in range(20):  # Trio runs the tasks that are ready in random order
        queue.offer(numbered(n))  # taken from the buffer
        if not n % 10:
            nursery.start_soon(deliver)
        await queue.wait_idle()
        assert delivered[-1] == n
        await wait_all_tasks_blocked()
        queue.extend([numbered(-n)])  # handed to the task that waits
        await queue.wait_idle()
        assert delivered[-1] == -n
        await wait_all_tasks_blocked()


async def test_queue_is_not_idle_until_all_that_a_reader_adds_in_parts_is_delivered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue, added = EventQueue(1), []

    async def read() -> None:
        for n in range(3):
            await queue.wait_for_room()
            queue.extend([of_stream("a", n)])
            added.append(n)
        await queue.wait_idle()  # as a source does after its entries
        added.append(3)

    nursery.start_soon(read)
    for n in range(3):
        await trio.sleep(1)
        assert added == list(range(n + 1))
        queue.take(1)
        await wait_all_tasks_blocked()
        queue.done(1)
    await wait_all_tasks_blocked()
    assert added == [0, 1, 2, 3]


async def test_reader_that_gives_up_waiting_for_room_leaves_the_queue_as_it_was(
    autojump_clock: MockClock,
) -> None:
    queue = EventQueue(1)
    queue.extend([of_stream("a", 0)])
    with trio.move_on_after(1) as scope:
        await queue.wait_for_room()
    assert scope.cancelled_caught

    assert (queue.depth, queue.undelivered) == (1, 1)
    queue.done(len(queue.take(9)))
    await queue.wait_idle()
    assert (await queue.wait_for_room(), trio.current_time()) == (1, 1)


async def test_too_many_drops_raise_an_alarm(autojump_clock: MockClock) -> None:
    queue = EventQueue(100, DropAlarm(window=60, threshold=0.05, cooldown=300))

    with capture_logs() as logs:
        for n in range(105):
            queue.offer(numbered(n, received_at=1.0))
        assert logs == []
        for n in range(105, 200):
            queue.offer(numbered(n, received_at=2.0))

    assert [log["event"] for log in logs] == ["dropping events"]
    assert logs[0]["capacity"] == 100


# Fairness


def tenants(events: Sequence[Event]) -> list[int]:
    return [event.tenant for event in events]


def of_stream(stream: str, n: int, **keys: Any) -> Event:
    return numbered(n, stream=Stream(stream), position=Position((n, 0)), **keys)


def test_flood_of_one_tenant_does_not_delay_another() -> None:
    queue = EventQueue(1000)
    for n in range(900):
        queue.offer(numbered(n))
    for n in range(2):
        queue.offer(numbered(n, tenant_id=2))
    queue.offer(numbered(0, tenant_id=3))

    assert tenants(queue.take(4)) == [1, 2, 3, 1]
    assert tenants(queue.take(3)) == [2, 1, 1]  # in turn, across batches


def test_single_tenant_may_fill_the_queue() -> None:
    queue = EventQueue(100)
    for n in range(100):
        queue.offer(numbered(n))

    assert (queue.depth, queue.dropped) == (100, 0)


def test_flood_of_one_tenant_drops_no_event_of_another() -> None:
    queue = EventQueue(100)
    for n in range(1000):
        queue.offer(numbered(n))
        if n % 100 == 50:
            queue.offer(numbered(n, tenant_id=2))
    taken = queue.take(1000)

    assert numbers([e for e in taken if e.tenant == 2]) == list(range(50, 1000, 100))
    assert numbers([e for e in taken if e.tenant == 1]) == list(range(910, 1000))
    assert queue.dropped == 910


_some_tenant = st.sampled_from([1, 1, 1, 1, 2, 2, 3, 4, 5])
_happenings = st.lists(st.one_of(_some_tenant, st.integers(-9, -1)), max_size=200)


@given(_happenings, st.integers(1, 12))
def test_tenants_take_turns_and_lose_nothing_of_their_share(
    happenings: list[int], capacity: int
) -> None:
    queue = EventQueue(capacity)
    waiting: dict[int, list[int]] = {}
    for n, what in enumerate(happenings):
        if what > 0:
            before = Counter({tenant: len(events) for tenant, events in waiting.items()})
            queue.offer(numbered(n, tenant_id=what))
            waiting.setdefault(what, []).append(n)
            if before.total() == capacity:
                left = Counter(tenants([e for lane in queue._lanes.values() for e in lane]))
                [loser] = before + Counter([what]) - left
                del waiting[loser][0]
                assert before[loser] >= capacity / len(+before)
                assert loser == what or before[what] < capacity / len(+before)
            continue
        batch = queue.take(-what)
        assert len(batch) == min(-what, sum(map(len, waiting.values())))
        for event in batch:
            assert numbers([event]) == [waiting[event.tenant].pop(0)]
        got = Counter(tenants(batch))
        for tenant in waiting:  # one that still has events had as many as any other
            assert not waiting[tenant] or got[tenant] >= max(got.values()) - 1
    assert queue.depth == sum(map(len, waiting.values()))


@given(st.lists(st.lists(_some_tenant, max_size=9), max_size=9), st.booleans())
def test_events_offered_together_are_queued_as_one_by_one(
    chunks: list[list[int]], takes: bool
) -> None:
    one_by_one, together = (EventQueue(20, DropAlarm(60, 0.05, 300)) for _ in range(2))
    for second, chunk in enumerate(chunks):
        events = [
            numbered(n, tenant_id=tenant, received_at=second) for n, tenant in enumerate(chunk)
        ]
        together.offer_all(events)
        for event in events:
            one_by_one.offer(event)
        if takes:
            assert together.take(4) == one_by_one.take(4)
    for name in ("depth", "undelivered", "dropped"):
        assert getattr(together, name) == getattr(one_by_one, name)
    assert together._alarm is not None
    assert one_by_one._alarm is not None
    assert together._alarm.heard == one_by_one._alarm.heard
    assert together.take(99) == one_by_one.take(99)


def test_tenant_over_its_share_now_loses_events_and_not_one_that_was_over_it_before() -> None:
    queue = EventQueue(20)

    def offer(tenant: int, events: int) -> None:
        for n in range(events):
            queue.offer(numbered(n, tenant_id=tenant))

    offer(1, 20)
    offer(2, 1)  # an event of tenant 1 is dropped
    queue.take(19)
    offer(2, 30)
    offer(3, 3)

    left = Counter(tenants(queue.take(20)))
    assert left == {1: 1, 2: 16, 3: 3}


@given(
    st.lists(
        st.one_of(st.tuples(st.sampled_from("ab"), st.integers(1, 3)), st.integers(1, 9)),
        max_size=60,
    ),
    st.integers(1, 9),
)
def test_stream_keeps_its_order_whatever_the_tenants_of_its_events(
    happenings: list[tuple[str, int] | int], capacity: int
) -> None:
    async def scenario() -> None:
        queue = EventQueue(capacity)
        put: dict[str, list[int]] = {"a": [], "b": []}
        taken: dict[str, list[int]] = {"a": [], "b": []}

        def take(most: int) -> None:
            for event in queue.take(most):
                assert event.stream
                taken[event.stream] += numbers([event])

        async def read(stream: str) -> None:
            waiting = put[stream]
            added = 0
            while True:
                room = await queue.wait_for_room()
                part = waiting[added : added + min(room, 2)]
                queue.extend([of_stream(stream, n, tenant_id=of[n]) for n in part])
                assert queue.depth <= capacity
                added += len(part)
                if added == len(waiting):
                    await more.park()

        more, of = trio.lowlevel.ParkingLot(), dict[int, int]()
        async with trio.open_nursery() as nursery:
            for stream in put:
                nursery.start_soon(read, stream)
            for n, what in enumerate(happenings):
                if isinstance(what, int):
                    take(what)
                else:
                    stream, of[n] = what
                    put[stream].append(n)
                    more.unpark_all()
                await wait_all_tasks_blocked()  # added, or waiting for room
            while queue.depth:
                take(5)
                await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
        assert taken == put

    trio.run(scenario, clock=MockClock(autojump_threshold=0))


async def test_events_of_a_paused_tenant_wait_and_count(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    queue = EventQueue(5)
    queue.pause(TenantId(2))
    for n in range(4):
        queue.offer(numbered(n, tenant_id=1 + n % 2))
    assert (numbers(queue.take(9)), queue.depth) == ([0, 2], 2)
    with trio.move_on_after(1) as scope:
        await queue.wait()
    assert scope.cancelled_caught
    for n in range(4, 8):
        queue.offer(numbered(n, tenant_id=2))
    assert (queue.depth, queue.dropped) == (5, 1)

    nursery.start_soon(queue.wait)
    await wait_all_tasks_blocked()
    queue.unpause(TenantId(2))
    await queue.wait()
    assert numbers(queue.take(9)) == [3, 4, 5, 6, 7]
    queue.pause(TenantId(2))
    queue.offer(numbered(8, tenant_id=2))
    queue.unpause(TenantId(2))
    assert numbers(queue.take(9)) == [8]
    assert (queue.depth, queue.undelivered) == (0, 8)


async def test_streams_take_turns(autojump_clock: MockClock) -> None:
    queue = EventQueue(100)
    for n in range(60):
        queue.extend([of_stream("a", n, tenant_id=1 + n // 20)])
    queue.extend([of_stream("b", 100 + n) for n in range(5)])

    assert numbers(queue.take(6)) == [0, 100, 1, 101, 2, 102]


def test_oldest_is_the_time_at_which_the_first_waiting_event_was_received() -> None:
    queue = EventQueue(3)
    assert queue.oldest == math.inf
    queue.offer(numbered(0, tenant_id=1, received_at=5.0))
    queue.offer(numbered(1, tenant_id=2, received_at=4.0))
    queue.offer(numbered(2, tenant_id=2, received_at=6.0))

    assert queue.oldest == 4.0
    assert numbers(queue.take(2)) == [0, 1]
    assert queue.oldest == 6.0


async def test_tenant_over_its_rate_loses_only_events_of_its_own(
    autojump_clock: MockClock,
) -> None:
    queue = EventQueue(1000, rate=TenantRate(10))
    with capture_logs() as logs:
        for n in range(300):  # 100 a second
            queue.offer(numbered(n, received_at=n / 100))
            if n % 20 == 0:
                queue.offer(numbered(n, received_at=n / 100, tenant_id=2))
            await trio.sleep(1 / 100)
    taken = queue.take(1000)

    assert len([event for event in taken if event.tenant == 2]) == 15
    assert len([event for event in taken if event.tenant == 1]) == 10 + 29
    assert queue.over_rate == 300 - 39
    assert queue.dropped == 0
    assert {log["event"] for log in logs} == {"tenant over its event rate"}
    assert len(logs) == 3  # one a second
    assert logs[-1]["tenant"] == 1
    assert logs[-1]["held_back"] > 80


async def test_event_over_the_rate_is_not_delivered_at_once_either() -> None:
    queue, delivered = EventQueue(9, rate=TenantRate(1)), list[Event]()

    def deliver(events: Sequence[Event]) -> bool:
        delivered.extend(events)
        return True

    queue.try_deliver = deliver
    queue.offer_all([numbered(n) for n in range(3)])
    assert (numbers(delivered), queue.over_rate, queue.undelivered) == ([0], 2, 0)
