"""Dispatch: each event once to every connection of its audiences."""

import json
import tracemalloc
from collections.abc import Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.numbered_events import connect, numbered, received
from trio_gateway.core.audiences import Endpoint, Principal, audiences_of
from trio_gateway.core.event_ids import Position, Stream
from trio_gateway.core.events import Event
from trio_gateway.core.routing import ROUTES, Route, Routing, To
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.hub import Hub
from trio_gateway.testing import FakeSocket, make_event, make_principal

# Who receives what


async def test_each_connection_receives_an_event_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    admin = make_principal(branches=(1, 2), sectors=(5,), roles=["WAITER", "ADMIN"])
    socket = await connect(nursery, hub, admin)
    events = [numbered(0, sector_id=5), numbered(1), numbered(2, branch_id=2)]
    dispatch = Dispatch(hub)

    await dispatch.deliver(events[:1])
    await dispatch.deliver(events)

    assert received(socket) == [0, 0, 1, 2]
    assert socket.writes == 2
    assert dispatch.deliveries == 4


@pytest.mark.parametrize("how", ["delivered", "remembered", "raw"])
async def test_durable_event_is_in_memory_once(
    autojump_clock: MockClock, nursery: trio.Nursery, how: str
) -> None:
    """The history and what is remembered for copies share its bytes."""
    hub, size, stream = Hub(), 20_000, Stream("events:critical")
    await connect(nursery, hub, make_principal(sectors=(5,)))
    dispatch = Dispatch(hub)
    branch = 2 if how == "raw" else 1
    tracemalloc.start()
    try:
        for n in range(1, 101):
            event = make_event(
                data="x" * size, branch_id=branch, sector_id=6, channel=stream, stream=stream,
                position=Position((n, 1)),
            )  # fmt: skip
            if how == "remembered":
                dispatch.remember(event)
            else:
                await dispatch.deliver([event])
        assert 100 * size < tracemalloc.get_traced_memory()[0] < 1.5 * 100 * size
    finally:
        tracemalloc.stop()


async def test_event_is_passed_on_byte_for_byte(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    socket = await connect(nursery, hub, make_principal())
    event = make_event(data={"€": 1e300, "z": [1.10, "\u2028"], "a": 12345678901234567890})

    await Dispatch(hub).deliver([event])

    assert socket.texts == [str(event.payload, "utf-8")]


async def test_batch_keeps_its_order(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    hub = Hub()
    waiter = await connect(nursery, hub, make_principal(sectors=(5,)))
    kitchen = await connect(nursery, hub, make_principal(Endpoint.KITCHEN))
    batch = [
        numbered(n, type="ROUND_READY" if n % 3 else "ROUND_PENDING", sector_id=5 if n % 2 else ...)
        for n in range(100)
    ]

    await Dispatch(hub).deliver(batch)

    assert received(waiter) == list(range(100))
    assert received(kitchen) == [n for n in range(100) if n % 3]


class Recording(FakeSocket):
    """Records the objects that it was given to write."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[object] = []

    def try_write(self, data: bytes | memoryview) -> int:
        self.given.append(data)
        return super().try_write(data)


async def test_small_groups_are_written_before_large_ones(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    order: list[int] = []

    class Noting(FakeSocket):
        def __init__(self, tenant: int) -> None:
            super().__init__()
            self.tenant = tenant

        def try_write(self, data: bytes | memoryview) -> int:
            order.append(self.tenant)
            return super().try_write(data)

    for tenant in (1, 1, 1, 2, 3, 3):
        await connect(nursery, hub, make_principal(tenant=tenant), Noting(tenant))
    await Dispatch(hub).deliver([numbered(n, tenant_id=n) for n in (1, 2, 3, 1)])

    assert order == [2, 3, 3, 1, 1, 1]


async def test_connections_with_the_same_events_share_the_same_bytes(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    waiters = [Recording() for _ in range(3)]
    kitchens = [Recording() for _ in range(3)]
    for each in waiters:
        await connect(nursery, hub, make_principal(), each)
    for each in kitchens:
        await connect(nursery, hub, make_principal(Endpoint.KITCHEN), each)
    batch = [numbered(0), numbered(1, type="ROUND_PENDING"), numbered(2)]

    await Dispatch(hub).deliver(batch)
    await Dispatch(hub).deliver(batch[:1])

    for group, first in ((waiters, batch), (kitchens, batch[::2])):
        assert group[0].given == [b"".join(event.frame for event in first), batch[0].frame]
        for each in group:
            assert [id(data) for data in each.given] == [id(data) for data in group[0].given]
        assert group[0].given[1] is batch[0].frame


@pytest.mark.parametrize("copies", [1, 2])
async def test_uncovered_sector_is_unheard(
    autojump_clock: MockClock, nursery: trio.Nursery, copies: int
) -> None:
    hub = Hub()
    waiter = await connect(nursery, hub, make_principal(sectors=(5,)))
    admin = await connect(nursery, hub, make_principal(Endpoint.ADMIN))
    dispatch = Dispatch(hub)

    await dispatch.deliver([numbered(0, sector_id=6)] * copies)

    assert received(waiter) == []
    assert received(admin) == [0] * copies
    assert dispatch.unheard == copies
    assert dispatch.broadcasts == copies


@pytest.mark.parametrize("copies", [1, 2])
async def test_uncovered_sector_can_go_to_the_branch(
    autojump_clock: MockClock, nursery: trio.Nursery, copies: int
) -> None:
    hub = Hub()
    waiter = await connect(nursery, hub, make_principal(sectors=(5,)))
    elsewhere = await connect(nursery, hub, make_principal(branches=(2,), sectors=(5,)))
    dispatch = Dispatch(hub, uncovered_to_branch=True)

    await dispatch.deliver([numbered(0, sector_id=6)] * copies)
    await dispatch.deliver([numbered(1, sector_id=5)] * copies)
    await dispatch.deliver([numbered(2, type="CART_SYNC", sector_id=6)] * copies)  # not for waiters

    assert received(waiter) == [0] * copies + [1] * copies
    assert received(elsewhere) == []
    assert dispatch.unheard == 2 * copies
    assert dispatch.broadcasts == 2 * copies


async def test_event_that_reaches_no_connection_is_unheard(autojump_clock: MockClock) -> None:
    dispatch = Dispatch(Hub(), uncovered_to_branch=True)

    await dispatch.deliver([])
    await dispatch.deliver([numbered(0)])
    await dispatch.deliver([numbered(1), numbered(2, sector_id=6)])

    assert (dispatch.unheard, dispatch.broadcasts, dispatch.deliveries) == (3, 0, 0)


async def test_unknown_type_goes_to_admins_and_is_counted(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    others = [
        await connect(nursery, hub, make_principal(endpoint, sectors=(5,)))
        for endpoint in (Endpoint.WAITER, Endpoint.KITCHEN, Endpoint.DINER)
    ]
    admin = await connect(nursery, hub, make_principal(Endpoint.ADMIN))
    dispatch = Dispatch(hub)
    unknown = numbered(0, type="NEW_THING", sector_id=5, session_id=456)

    await dispatch.deliver([unknown])
    await dispatch.deliver([unknown, numbered(1, type="NEW_THING", branch_id=0)])

    assert received(admin) == [0, 0, 1]
    assert [received(each) for each in others] == [[], [], []]
    assert dispatch.unknown_type == 3


async def test_routes_can_be_replaced(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    hub = Hub()
    kitchen = await connect(nursery, hub, make_principal(Endpoint.KITCHEN))
    dispatch = Dispatch(hub, Routing({"NEW_THING": Route(To.KITCHEN, durable=False)}))

    await dispatch.deliver([numbered(0, type="NEW_THING"), numbered(1)])

    assert received(kitchen) == [0]
    assert dispatch.unknown_type == 1


async def test_dead_connection_does_not_affect_the_others(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    sockets = [await connect(nursery, hub, make_principal()) for _ in range(9)]
    sockets[4].aborted = True

    await Dispatch(hub).deliver([numbered(0)])
    await wait_all_tasks_blocked()
    await Dispatch(hub).deliver([numbered(1), numbered(2)])

    assert len(hub) == 8
    for socket in sockets[:4] + sockets[5:]:
        assert received(socket) == [0, 1, 2]


@pytest.mark.parametrize("copies", [1, 2])
async def test_other_tasks_run_during_a_big_fan_out(
    autojump_clock: MockClock, nursery: trio.Nursery, copies: int
) -> None:
    hub = Hub()
    sockets = [await connect(nursery, hub, make_principal()) for _ in range(10)]
    seen: list[int] = []

    async def watch() -> None:
        while True:
            seen.append(sum(socket.writes for socket in sockets))
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as watchers:
        watchers.start_soon(watch)
        await Dispatch(hub, writes_per_checkpoint=3).deliver([numbered(0)] * copies)
        watchers.cancel_scope.cancel()

    assert len(seen) >= 2  # it was started with the first checkpoint
    assert set(seen) <= {3, 6, 9, 10}


async def test_connection_that_moves_during_a_big_fan_out_is_not_sent_an_empty_write(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = Hub()
    sockets = {}
    for _ in range(4):
        socket = Recording()
        await connect(nursery, hub, make_principal(sectors=(5,)), socket)
        sockets[list(hub.connections)[-1]] = socket

    async def move_all() -> None:
        for connection in sockets:
            hub.move(connection, make_principal(sectors=(6,)))
        await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as movers:
        movers.start_soon(move_all)
        await Dispatch(hub, writes_per_checkpoint=1).deliver([numbered(0, sector_id=5)] * 2)
        await trio.lowlevel.checkpoint()

    assert b"" not in [data for socket in sockets.values() for data in socket.given]


# Properties

SMALL = st.sampled_from([1, 2])
PRINCIPALS = st.builds(
    make_principal,
    st.sampled_from(Endpoint),
    tenant=st.integers(1, 3),
    branches=st.frozensets(SMALL, min_size=1),
    sectors=st.frozensets(st.integers(1, 3)),
    roles=st.frozensets(st.sampled_from(["WAITER", "MANAGER", "ADMIN"])),
    session=SMALL,
)
EVENTS = st.builds(
    make_event,
    st.sampled_from([*ROUTES, "NEW_THING"]),
    tenant_id=st.integers(1, 3),
    branch_id=st.integers(0, 2),
    sector_id=st.none() | st.integers(1, 3),
    session_id=st.none() | SMALL,
    data=st.integers(0, 9),
)


def delivered(
    principals: Sequence[Principal], batches: Sequence[Sequence[Event]], *, to_branch: bool = False
) -> tuple[list[list[str]], list[int]]:
    """What each of the clients is sent, and what is counted."""
    dispatch = Dispatch(Hub(), uncovered_to_branch=to_branch, writes_per_checkpoint=2)
    sockets: list[FakeSocket] = []

    async def scenario() -> None:
        async with trio.open_nursery() as nursery:
            for principal in principals:
                sockets.append(FakeSocket())
                client = Connection(principal, ConnectionLimits())
                nursery.start_soon(client.run, sockets[-1], dispatch.hub)
            await wait_all_tasks_blocked()
            for batch in batches:
                await dispatch.deliver(batch)
            nursery.cancel_scope.cancel()

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
    counts = [dispatch.deliveries, dispatch.broadcasts, dispatch.unheard, dispatch.unknown_type]
    return [socket.texts for socket in sockets], counts


@given(st.lists(PRINCIPALS, max_size=6), st.lists(EVENTS, max_size=6), st.booleans())
@settings(deadline=None)
def test_events_reach_the_same_clients_one_by_one_or_in_a_batch(
    principals: list[Principal], events: list[Event], to_branch: bool
) -> None:
    one_by_one = delivered(principals, [[event] for event in events], to_branch=to_branch)

    assert delivered(principals, [events], to_branch=to_branch) == one_by_one


@given(st.lists(PRINCIPALS, max_size=6), st.lists(EVENTS, max_size=9), st.booleans())
@settings(deadline=None)
def test_no_event_crosses_a_tenant(
    principals: list[Principal], events: list[Event], to_branch: bool
) -> None:
    texts, _ = delivered(principals, [events], to_branch=to_branch)

    for principal, mine in zip(principals, texts, strict=True):
        assert {json.loads(text)["tenant_id"] for text in mine} <= {principal.tenant}


@given(st.lists(PRINCIPALS, max_size=6), st.lists(EVENTS, max_size=9))
@settings(deadline=None)
def test_each_client_receives_what_the_table_says(
    principals: list[Principal], events: list[Event]
) -> None:
    texts, _ = delivered(principals, [events])

    for principal, mine in zip(principals, texts, strict=True):
        audiences = audiences_of(principal)
        expected = [event for event in events if not audiences.isdisjoint(ROUTES.audiences(event))]
        assert mine == [event.payload.decode() for event in expected]
