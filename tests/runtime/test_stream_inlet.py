"""The inlet of the streams: what it makes of a shard that comes, goes and comes back."""

import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, B, World, at
from trio_gateway.core.audiences import audiences_of
from trio_gateway.core.event_ids import START, Position, Stream
from trio_gateway.core.routes_file import read_routes
from trio_gateway.core.routing import ROUTES
from trio_gateway.core.time_counts import quantiles
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.reach import Reach
from trio_gateway.runtime.source import Entry, Past
from trio_gateway.runtime.stream_inlet import StreamInlet
from trio_gateway.testing import make_event, make_principal

AUDIENCES = audiences_of(make_principal())
ROUND_READY = read_routes('[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 10\n')


@pytest.fixture
def world(nursery: trio.Nursery) -> World:
    return World(nursery, begun=False)


@pytest.fixture
def inlet(world: World) -> StreamInlet:
    return StreamInlet(
        ingest=Ingest(), queue=EventQueue(1000), history=world.history, dispatch=world.dispatch,
        replays=world.replays, routes=ROUTES, wall_clock=lambda: 1000.0,
    )  # fmt: skip


def past(*numbers: int, **keys: Any) -> Past:
    entries = [Entry(at(n), make_event(data=n, **keys).payload) for n in numbers]
    return Past(entries, START, True, at(max(numbers)))


def positions(world: World, stream: Stream = A) -> list[Position]:
    return [stored.position for stored in world.history.missed({stream: START}, AUDIENCES)]


async def test_first_reading_that_was_cancelled_is_begun_anew(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    entries = past(*range(1, 501))
    with trio.CancelScope() as scope:
        scope.cancel()
        await inlet.begin(A, "a", entries, None)
    assert scope.cancelled_caught
    assert not world.history.extent.end
    await inlet.begin(A, "a", entries, None)
    assert positions(world) == [at(n) for n in range(1, 501)]


async def test_delivery_times_are_by_the_clock_of_the_server_or_else_by_ours(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    await inlet.begin(A, "a", past(1), 900.0)
    await inlet.begin(B, "b", past(1), None)
    await world.live()
    await trio.sleep_until(1)
    for stream, now in ((A, 901_000), (B, 1_001_000)):
        event = make_event(data=now, stream=stream, position=at(now - 10))
        await world.dispatch.deliver([event])
    found = world.dispatch.times.figures(1, trio.current_time()).last_hour.written
    assert found.count == 2
    assert quantiles(found)[2] == pytest.approx(0.010, rel=0.2)


async def test_shard_that_comes_back_is_stored_again_and_each_id_once(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    for _ in range(2):
        await inlet.begin(A, "a", past(1, 2, 3, id="same"), None)
        assert positions(world) == [at(1)]
        await inlet.settle()
        inlet.forget(A)
        assert positions(world) == []
        assert not world.history.extent.end


async def test_copy_in_the_past_of_another_stream_is_a_duplicate(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    await inlet.begin(A, "a", past(1, id="same"), None)
    await inlet.begin(B, "b", past(2, id="same"), None)
    assert positions(world) == [at(1)]
    assert positions(world, B) == []


async def test_place_of_a_client_that_came_before_the_first_reading_can_be_resumed(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    client = await world.connect("")
    found = past(8999, 9000, 9500)._replace(since=at(8999))
    await inlet.begin(A, "a", found, ahead=10.0)  # the client may have come at 9.0
    await wait_all_tasks_blocked()
    assert client.heard == [9000, 9500]
    (answer,) = client.resumed
    assert answer["count"] == 2
    again = await world.connect(answer["last_event_id"])  # the first was cut off before they came
    assert [each["recovered"] for each in again.resumed] == [True]
    assert again.heard == [9000, 9500]


async def test_shards_have_equal_shares_of_the_room_or_what_is_free(
    autojump_clock: MockClock, world: World, inlet: StreamInlet
) -> None:
    world.history.most_events, world.history.age = 100, math.inf
    world.history.extent.expected = {A, B}
    assert inlet.past_limits().entries == 100
    await inlet.begin(A, "a", past(*range(1, 91)), None)
    assert inlet.past_limits().entries == 50
    inlet.forget(A)
    assert inlet.past_limits().entries == 100


@pytest.mark.parametrize(("within", "ago"), [(10, 3600), (7200, 7200)])
async def test_past_is_read_as_far_back_as_the_deadlines_of_its_events(
    world: World, within: int, ago: int
) -> None:
    routes = read_routes(f'[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = {within}\n')
    inlet = StreamInlet(
        ingest=Ingest(), queue=EventQueue(1000), history=world.history, dispatch=world.dispatch,
        replays=world.replays, routes=routes, reach=Reach(routes, lambda: 9000.0, 3600),
        wall_clock=lambda: 9000.0,
    )  # fmt: skip
    world.history.age = 3600
    assert inlet.past_limits().since == (9000 - ago) * 1000


def watching(world: World, reach: Reach | None) -> StreamInlet:
    return StreamInlet(
        ingest=Ingest(), queue=EventQueue(1000), history=world.history, dispatch=world.dispatch,
        replays=world.replays, routes=ROUND_READY, reach=reach, wall_clock=lambda: 9000.0,
    )  # fmt: skip


def entry(seconds: float, type_: str = "ROUND_READY", **keys: Any) -> Entry:
    """That came so long before now."""
    return Entry(at(9_000_000 - int(1000 * seconds)), make_event(type=type_, **keys).payload)


async def test_deadlines_that_are_near_are_watched_before_the_past_is_read(world: World) -> None:
    reach = Reach(ROUND_READY, lambda: 9000.0, 3600)
    inlet = watching(world, reach)
    assert inlet.look_ahead_limits() == inlet.past_limits()._replace(since=(9000 - 10 - 300) * 1000)
    entries = [entry(60), entry(12), entry(10.5, "ROUND_SERVED"), entry(9), entry(2)]
    await inlet.look_ahead(A, "a", [*entries, Entry(at(9_000_000), None)])
    assert len(reach) == 2
    assert positions(world) == []


async def test_copy_of_an_event_is_not_watched_before_the_past_is_read(world: World) -> None:
    reach = Reach(ROUND_READY, lambda: 9000.0, 3600)
    await watching(world, reach).look_ahead(A, "a", [entry(309, id="a"), entry(10, id="a")])
    assert not len(reach)


async def test_nothing_is_looked_at_before_the_past_if_nothing_must_reach_anybody(
    world: World,
) -> None:
    assert watching(world, None).look_ahead_limits() is None
