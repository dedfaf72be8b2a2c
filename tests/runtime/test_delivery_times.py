"""Which deliveries are counted in the delivery times, and when."""

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, World, at, bounded, escalated, place
from trio_gateway.core.audiences import Endpoint, SectorId
from trio_gateway.core.routes_file import read_routes
from trio_gateway.core.time_counts import Window, quantiles, summary
from trio_gateway.testing import FakeSocket, make_event, make_principal

ROUTES = read_routes("[routes.ROUND_READY]\nreceipt = true\n")
DINER = make_principal(Endpoint.DINER, session=456)


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    world = World(nursery, routes=ROUTES)
    world.dispatch.times.set_clock([A], 0)
    return world


def figures(world: World) -> Window:
    return summary(world.dispatch.times.figures(1, trio.current_time()).last_5_minutes)


async def test_event_counts_once_however_many_clients_get_it(
    autojump_clock: MockClock, world: World
) -> None:
    for _ in range(3):
        await world.live()
    await trio.sleep_until(5)
    await world.publish(2000, 4990, session_id=456)
    found = figures(world).written
    assert (found.count, found.over) == (2, 1)
    assert found.p50 == pytest.approx(0.010, rel=0.2)
    assert found.p99 == pytest.approx(3.0, rel=0.2)


async def test_event_that_nobody_here_is_sent_now_does_not_count_as_written(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1, session_id=456)
    await world.connect(principal=DINER)  # it may still ask to resume
    await world.publish(2, session_id=456)
    assert figures(world).written.count == 0
    await world.live()
    await world.publish(3, 4, session_id=999)
    await world.publish(5, session_id=456, stream=None)
    assert figures(world).written.count == 2


class TlsSocket(FakeSocket):
    is_plain = False


@pytest.mark.parametrize("kind", [FakeSocket, TlsSocket])
async def test_event_is_written_when_the_last_client_that_lags_has_taken_it(
    autojump_clock: MockClock, world: World, kind: type[FakeSocket]
) -> None:
    terms = bounded(outbox_messages=10, write_timeout=math.inf)
    slow = [await world.live(principal=DINER, terms=terms, socket=kind(room=0)) for _ in range(2)]
    await world.live()
    await trio.sleep_until(10)
    for n in range(100):
        await world.publish(10_000 + n, session_id=456)
    assert all(each.connection in world.hub.lagging for each in slow)
    assert (figures(world).written.count, figures(world).written.over) == (100, 0)
    for client, seconds in zip(slow, (3, 90), strict=True):
        await trio.sleep_until(10 + seconds)
        client.socket.read(math.inf)
        await wait_all_tasks_blocked()
        assert len(client.heard) == 100
        found = figures(world).written
        assert (found.count, found.over) == (100, 100)
        assert found.p50 == found.p99 == pytest.approx(seconds, rel=0.2)


async def test_event_that_waits_for_its_only_client_is_written_when_that_takes_it(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER, socket=FakeSocket(room=0))
    await trio.sleep_until(10)
    await world.publish(10_000, session_id=456)
    await trio.sleep(0.5)
    await world.publish(10_500, session_id=456)
    assert figures(world).written.count == 0
    await trio.sleep(0.7)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    found = figures(world).written
    assert (found.count, found.over) == (2, 1)
    assert found.p50 == pytest.approx(0.7, rel=0.2)
    assert found.p99 == pytest.approx(1.2, rel=0.2)


async def test_client_that_is_always_a_little_behind_makes_no_event_late(
    autojump_clock: MockClock, world: World
) -> None:
    """Its outbox is never empty: what counts is how long each event waits there."""
    client = await world.live(principal=DINER, socket=FakeSocket(room=0))
    await trio.sleep_until(10)
    await world.publish(10_000, session_id=456)
    size = client.connection.waiting_bytes
    for n in range(10_400, 20_000, 400):
        await trio.sleep_until(n / 1000)
        await world.publish(n, session_id=456)
        client.socket.read(size)
        await wait_all_tasks_blocked()
        assert client.connection.waiting_bytes
    found = figures(world).written
    assert (found.count, found.over) == (24, 0)
    assert found.p50 == found.p99 == pytest.approx(0.4, rel=0.2)


async def test_what_a_client_missed_while_it_was_away_is_no_late_write(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER)
    await trio.sleep_until(10)
    await world.publish(10_000, session_id=456)
    await client.leave()
    await trio.sleep_until(20)
    await world.publish(*range(20_000, 21_000), session_id=456)
    await trio.sleep_until(3600)
    again = await world.connect(place(10_000), principal=DINER)
    await wait_all_tasks_blocked()
    assert len(again.heard) == 1000
    assert world.dispatch.times.figures(1, 3600).last_hour.written.count == 1


async def test_what_comes_while_a_client_is_sent_what_it_missed_counts(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(*range(1, 1001), session_id=456)
    await trio.sleep_until(60)
    client = await world.connect(place(0), principal=DINER, socket=FakeSocket(room=0))
    await trio.sleep_until(61)
    await world.publish(61_000, session_id=456)
    await trio.sleep_until(65)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    found = figures(world).written
    assert len(client.heard) == 1001
    assert (found.count, found.over) == (1, 1)
    assert found.p50 == pytest.approx(4, rel=0.2)


async def test_event_that_a_step_brings_counts_from_that_step(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=make_principal(sectors=[SectorId(6)]))
    await trio.sleep_until(10)
    await world.publish(10_000, sector_id=5)
    await trio.sleep_until(20)
    event = escalated(world, 10_000, 20_000)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    assert client.heard == [10_000]
    assert (figures(world).written.count, figures(world).written.over) == (1, 0)


async def test_event_whose_delivery_takes_too_long_counts_with_the_time_until_it_is_given_up(
    autojump_clock: MockClock, world: World
) -> None:
    for _ in range(2):
        await world.live()
    await trio.sleep_until(30)
    event = make_event(stream=A, position=at(1), session_id=456)
    with pytest.raises(trio.TooSlowError):
        await world.dispatch.deliver([event], deadline=trio.current_time())
    assert (figures(world).written.count, figures(world).written.over) == (1, 1)


async def test_client_that_does_not_read_is_unconfirmed_and_delays_no_figure_of_others(
    autojump_clock: MockClock, world: World
) -> None:
    terms = bounded(outbox_messages=10, write_timeout=math.inf)
    await world.live(principal=DINER, terms=terms, socket=FakeSocket(room=0))
    reader = await world.live()
    for n in range(1, 101):
        await world.publish(n, session_id=456)
    await reader.say({"type": "ack", "last_event_id": place(100)})
    found = figures(world)
    assert (found.written.count, found.written.over) == (100, 0)
    assert (found.delivered.count, found.delivered.unconfirmed) == (100, 100)


async def test_each_client_counts_as_delivered_when_it_confirms_first(
    autojump_clock: MockClock, world: World
) -> None:
    quick, slow = [await world.live(principal=make_principal(user=n)) for n in (1, 2)]
    await trio.sleep_until(10)
    await world.publish(10_000)
    await trio.sleep(0.1)
    await quick.say({"type": "ack", "last_event_id": place(10_000)})
    assert figures(world).delivered.unconfirmed == 1
    await trio.sleep(5)
    await slow.say({"type": "seen", "event_id": place(10_000)})
    await slow.say({"type": "ack", "last_event_id": place(10_000)})
    await quick.say({"type": "seen", "event_id": place(10_000)})
    found = figures(world).delivered
    assert (found.count, found.over, found.unconfirmed) == (2, 1, 0)
    assert found.p50 == pytest.approx(0.1, rel=0.2)
    assert found.p99 == pytest.approx(5.1, rel=0.2)


async def test_client_that_comes_back_counts_with_the_time_it_was_away(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER)
    await world.publish(1, session_id=456)
    await client.leave()
    await world.publish(2, session_id=456)
    await trio.sleep_until(60)
    again = await world.connect(place(1), principal=DINER)
    await wait_all_tasks_blocked()
    await again.say({"type": "ack", "last_event_id": place(2)})
    times = world.dispatch.times.figures(1, trio.current_time()).last_5_minutes
    assert quantiles(times.delivered)[0] == pytest.approx(60, rel=0.2)
    assert (times.delivered.over, times.unconfirmed) == (2, 0)
