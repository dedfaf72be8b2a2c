"""Receipts: what is known of a client whose connection does not take what it is sent."""

import math
from collections.abc import Mapping

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, Client, World, at, bounded, escalated, place
from trio_gateway.core.audiences import Endpoint, Principal, SectorId, audiences_of
from trio_gateway.core.receipts import Place, Receipt, ReceiptChange, Recipient, State
from trio_gateway.core.routes_file import read_routes
from trio_gateway.runtime import receipts
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.receipt_writing import ReceiptWriting
from trio_gateway.runtime.tracked import Tracked
from trio_gateway.testing import FakeSocket, make_event, make_principal

ROUTES = read_routes("[routes.ROUND_READY]\nreceipt = true\n")
DINER = make_principal(Endpoint.DINER, session=456)
SMALL = bounded(outbox_messages=10, write_timeout=math.inf)


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    return World(nursery, routes=ROUTES)


async def diner(world: World, room: float = 0) -> Client:
    return await world.live(principal=DINER, terms=SMALL, socket=FakeSocket(room=room))


async def publish(world: World, *numbers: int) -> None:
    await world.publish(*numbers, session_id=456)


def tracked(world: World, number: int) -> Tracked:
    found = world.tracked_events.find(Place(A, at(number)))
    assert found is not None
    return found.tracked


def receipt(world: World, number: int, principal: Principal = DINER) -> Receipt:
    return tracked(world, number).by[Recipient.of(principal)]


def states(world: World, *numbers: int) -> list[State]:
    return [receipt(world, number).state for number in numbers]


async def test_client_whose_connection_takes_nothing_is_named_as_sent(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await trio.sleep(5)
    await publish(world, 1)
    assert states(world, 1) == [State.SENT]
    await trio.sleep(2)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert states(world, 1) == [State.WRITTEN]
    found = receipt(world, 1)
    assert (found.sent, found.written, found.delivered) == (5000, 7000, None)


async def test_client_that_lags_is_named_as_sent_until_it_comes_to_the_event(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await publish(world, *range(1, 20))
    await publish(world, 20)
    assert client.connection in world.hub.lagging
    assert states(world, 1, 20) == [State.SENT, State.SENT]
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert states(world, 1, 20) == [State.WRITTEN, State.WRITTEN]


async def test_client_that_may_still_ask_to_resume_is_named_as_sent(
    autojump_clock: MockClock, world: World
) -> None:
    await world.connect(principal=DINER)
    await publish(world, 1)
    assert states(world, 1) == [State.SENT]


async def test_confirmation_counts_as_written_too(autojump_clock: MockClock, world: World) -> None:
    """As after the connection was lost: the client has it all the same."""
    await diner(world)
    await publish(world, 1)
    again = await world.connect(place(1), principal=DINER)
    await wait_all_tasks_blocked()
    assert again.resumed[0]["recovered"]
    found = receipt(world, 1)
    assert (found.state, found.written is None) == (State.DELIVERED, False)


@pytest.mark.parametrize("is_sent_here", [False, True])
async def test_what_a_client_confirms_in_requests_is_written_together(
    autojump_clock: MockClock, world: World, is_sent_here: bool
) -> None:
    """Nobody here was sent the event: the client says twice that it has it from elsewhere."""
    await publish(world, 1)
    named = Place(A, at(1))
    found = world.tracked_events.find(named)
    assert found is not None
    await trio.sleep(2)
    world.receipts.confirm_earlier(DINER, named)
    await trio.sleep(0.05)
    world.receipts.see_earlier(DINER, named)
    if is_sent_here:
        world.receipts.sent((await diner(world)).connection, [found], waits=False)
    sent = 2050 if is_sent_here else None
    written: list[Mapping[Recipient, Receipt]] = [found.tracked.changed]

    async def fail(changes: Mapping[Place, ReceiptChange]) -> bool:
        written.append(changes[named].by)
        world.receipts.see_earlier(DINER, named)
        return False

    writing = ReceiptWriting()
    writing.changed(found.tracked, Recipient("diner", "456"), Receipt(seen=9000))
    await writing.flush(fail)
    written.append(found.tracked.changed)
    for each in written:
        assert each[Recipient("diner", "456")] == Receipt(0, sent, sent, 2000, 2050)


async def test_waiters_of_a_branch_stand_in_for_a_sector_only_if_they_are_sent_its_event(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    routes = read_routes('[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 10\n')
    world = World(nursery, routes=routes, uncovered_to_branch=True)
    others = [await world.live(principal=waiter_of(sector)) for sector in (6, 7)]
    event = make_event(data=1, sector_id=5, stream=A, position=at(1))
    world.tracked_events.note([event])
    assert not Batches(world.dispatch).try_deliver([event])  # to two of them: it waits for its turn
    covering = await world.live(principal=waiter_of(5))
    await world.dispatch.deliver([event])
    assert [each.heard for each in (covering, *others)] == [[1], [], []]
    found = world.tracked_events.find(Place(A, at(1)))
    assert found is not None
    assert [found.tracked.steps_of(audiences_of(waiter_of(n))) for n in (5, 6)] == [1, 0]

    await covering.leave()
    await world.publish(2, sector_id=5)
    assert [each.heard for each in others] == [[2], [2]]
    found = world.tracked_events.find(Place(A, at(2)))
    assert found is not None
    assert [found.tracked.steps_of(audiences_of(waiter_of(n))) for n in (5, 6)] == [1, 1]


def waiter_of(sector: int) -> Principal:
    return make_principal(Endpoint.WAITER, sectors=[SectorId(sector)])


@pytest.mark.parametrize(("upto", "state"), [(2, State.WRITTEN), (100, State.DELIVERED)])
async def test_client_that_comes_back_has_what_a_step_brought_only_if_that_was_before_its_place(
    autojump_clock: MockClock, world: World, upto: int, state: State
) -> None:
    """It had been connected before the step, and serves another sector."""
    await world.publish(1, sector_id=5)
    await world.publish(2)
    waiter = waiter_of(6)
    if upto == 2:
        world.receipts.confirm_earlier(waiter, Place(A, at(2)))
    await world.live(principal=waiter)
    event = escalated(world, 1)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    world.receipts.confirm_earlier(waiter, Place(A, at(upto)))
    assert receipt(world, 1, waiter).state is state
    changed = tracked(world, 1).changed[Recipient.of(waiter)]
    assert (changed.state, changed.step) == (state, 1)


@pytest.mark.parametrize(
    ("names_event", "state"), [(False, State.WRITTEN), (True, State.DELIVERED)]
)
async def test_client_names_an_escalated_event_in_a_request_and_its_place_when_it_comes_back(
    autojump_clock: MockClock, world: World, names_event: bool, state: State
) -> None:
    """The event was the last one when it connected: that place is no proof that it has it."""
    await world.publish(1, sector_id=5)
    waiter = waiter_of(6)
    await world.live(principal=waiter)
    event = escalated(world, 1)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    world.receipts.confirm_earlier(waiter, Place(A, at(1)), names_event=names_event)
    assert receipt(world, 1, waiter).state is state


@pytest.mark.parametrize(("room", "heard"), [(0, [1]), (math.inf, [])])
async def test_escalated_event_goes_to_a_user_only_if_it_was_not_written_to_another_connection(
    autojump_clock: MockClock, world: World, room: float, heard: list[int]
) -> None:
    """The user served the sector of the event on that connection, and serves another one now."""
    before = await world.live(principal=waiter_of(5), terms=SMALL, socket=FakeSocket(room=room))
    await world.publish(1, sector_id=5)
    before.connection.abort()
    await wait_all_tasks_blocked()
    now = await world.live(principal=waiter_of(6))

    event = escalated(world, 1)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    assert now.heard == heard


@pytest.mark.parametrize("number", [1, 1500])  # or so many that the connection forgets the first
async def test_escalated_event_that_waits_for_a_connection_already_is_not_sent_to_it_again(
    autojump_clock: MockClock, world: World, number: int
) -> None:
    terms = bounded(outbox_messages=2 * number, write_timeout=math.inf)
    client = await world.live(principal=waiter_of(5), terms=terms, socket=FakeSocket(room=0))
    await world.publish(*range(1, number + 1), sector_id=5)
    world.hub.move(client.connection, waiter_of(6))
    event = escalated(world, 1, 2000)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert client.heard == list(range(1, number + 1))


async def take_step(world: World, number: int = 1) -> None:
    """The event goes to the floor, too."""
    event = escalated(world, number)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    await wait_all_tasks_blocked()


@pytest.mark.parametrize(
    ("resume_from", "heard"),
    [(None, [1]), ("", [1]), (place(1), [2]), (place(2), [])],
    ids=["not", "from_now", "after_it", "later"],
)
async def test_escalated_event_goes_to_a_waiter_of_its_sector_who_came_after_it(
    autojump_clock: MockClock, world: World, resume_from: str | None, heard: list[int]
) -> None:
    """One that resumes had it on the connection before."""
    await world.publish(1, sector_id=5)
    await world.publish(2)
    client = await world.connect(resume_from, principal=waiter_of(5))
    await client.say("x")
    await take_step(world)
    assert client.heard == heard


async def test_escalated_event_goes_to_a_waiter_who_took_over_its_sector_after_it(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=waiter_of(6))
    other = await world.live(
        principal=make_principal(Endpoint.WAITER, user=22, sectors=[SectorId(5)])
    )
    await world.publish(1, sector_id=5)
    world.hub.move(client.connection, waiter_of(5))
    await take_step(world)
    assert (client.heard, other.heard) == ([1], [1])


@pytest.mark.parametrize("resume_from", [None, "", place(0)], ids=["not", "from_now", "before_it"])
@pytest.mark.parametrize("came_before", [False, True])
async def test_client_that_is_about_to_begin_gets_an_escalated_event_once(
    autojump_clock: MockClock, world: World, resume_from: str | None, came_before: bool
) -> None:
    """While it may still ask to resume, or is looked up, it gets events from the history."""
    await world.publish(0, session_id=456)
    if not came_before:
        await world.publish(1, sector_id=5)
    client = await world.connect(resume_from, principal=waiter_of(5))
    if came_before:
        await world.publish(1, sector_id=5)
    await take_step(world)
    await client.say("x")
    assert client.heard.count(1) == 1


@pytest.mark.parametrize("number", [1, 21], ids=["before", "while"])
async def test_waiter_who_lags_is_sent_an_escalated_event_once(
    autojump_clock: MockClock, world: World, number: int
) -> None:
    """It entered before the waiter was connected, or while it lagged."""
    await world.publish(1, sector_id=5)
    client = await world.live(principal=waiter_of(5), terms=SMALL, socket=FakeSocket(room=0))
    await world.publish(*range(2, 20), sector_id=5)
    assert client.connection in world.hub.lagging
    await world.publish(20, 21, sector_id=5)
    await take_step(world, number)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert client.heard.count(number) == 1


@pytest.mark.parametrize(("came_before", "heard"), [(False, [1]), (True, [])])
async def test_waiter_whose_connection_was_lost_with_the_step_is_sent_what_that_brought(
    autojump_clock: MockClock, world: World, came_before: bool, heard: list[int]
) -> None:
    waiter = waiter_of(5)
    first = await world.live(principal=waiter) if came_before else None
    await world.publish(1, sector_id=5)
    client = first or await world.live(principal=waiter)
    await world.publish(2, sector_id=5)
    await take_step(world)
    await client.leave()
    again = await world.connect(place(2), principal=waiter)
    await wait_all_tasks_blocked()
    assert again.resumed[0]["count"] == len(heard)
    assert again.heard == heard


@pytest.mark.parametrize(("sector", "ignored"), [(5, 0), (6, 2)])
async def test_client_confirms_no_event_that_entered_before_it_took_over_the_sector(
    autojump_clock: MockClock, world: World, sector: int, ignored: int
) -> None:
    client = await world.live(principal=waiter_of(sector))
    await world.publish(1, sector_id=5)
    world.hub.move(client.connection, waiter_of(5))
    await client.say({"type": "seen", "event_id": place(1)})
    await ack(client, 1)
    assert (world.receipts.ignored, len(tracked(world, 1).by)) == (ignored, not ignored)


# More than a connection remembers

BURST = 3000
STEPS = read_routes(
    """
    [routes.ROUND_READY]
    must_reach = "waiters"
    within = 10
    then = [{to = "floor", within = 10}]
    """
)


def unconfirmed(world: World) -> int:
    return world.dispatch.times.figures(1, trio.current_time()).last_hour.unconfirmed


async def ack(client: Client, number: int) -> None:
    await client.say({"type": "ack", "last_event_id": place(number)})


async def test_one_ack_confirms_a_burst_of_any_size(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER)
    other = await world.live(principal=make_principal(Endpoint.DINER, session=457))
    await publish(world, *range(1, BURST + 1))
    await world.publish(BURST + 1, session_id=457)
    assert (unconfirmed(world), len(client.heard)) == (BURST + 1, BURST)
    await ack(client, BURST)
    assert unconfirmed(world) == 1
    assert {receipt(world, n).state for n in range(1, BURST + 1)} == {State.DELIVERED}
    await ack(other, BURST + 1)
    assert (unconfirmed(world), world.receipts.ignored) == (0, 0)


async def test_each_ack_of_a_burst_confirms_what_came_up_to_it_and_no_more(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER)
    await publish(world, *range(1, BURST + 1))
    for number in (500, 700, 1500, 2500, BURST):
        await ack(client, number)
        assert unconfirmed(world) == BURST - number
        if number < BURST:
            assert states(world, number, number + 1) == [State.DELIVERED, State.WRITTEN]
    await publish(world, *range(BURST + 1, 2 * BURST + 1))
    await ack(client, 2 * BURST)
    assert unconfirmed(world) == 0
    assert not client.connection.forgotten


async def test_a_long_confirmation_goes_on_with_the_next_ping(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(receipts, "MOST_LOOKED_UP", 900)
    client = await world.live(principal=DINER)
    await publish(world, *range(1, BURST + 1))
    left = []
    for _ in range(3):
        await client.say({"type": "ping", "last_event_id": place(BURST)})
        left.append(unconfirmed(world))
    assert left == [1100, 200, 0]


async def test_burst_that_waited_in_the_outbox_is_written_when_the_client_has_taken_it(
    autojump_clock: MockClock, world: World
) -> None:
    terms = bounded(outbox_messages=2 * BURST, write_timeout=math.inf)
    client = await world.live(principal=DINER, terms=terms, socket=FakeSocket(room=0))
    await publish(world, *range(1, BURST + 1))
    assert set(states(world, *range(1, BURST + 1))) == {State.SENT}
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert set(states(world, *range(1, BURST + 1))) == {State.WRITTEN}


async def test_client_that_comes_back_confirms_a_burst_that_this_process_sent_it(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=DINER)
    await world.live(principal=make_principal(Endpoint.DINER, session=457))
    await publish(world, *range(1, BURST + 1))
    await world.publish(*range(BURST + 1, BURST + 10), session_id=457)
    await client.leave()
    again = await world.connect(place(BURST), principal=DINER)
    await wait_all_tasks_blocked()
    assert again.resumed[0]["recovered"]
    assert {receipt(world, n).state for n in range(1, BURST + 1)} == {State.DELIVERED}
    assert unconfirmed(world) == 9


async def test_ack_does_not_confirm_what_a_client_is_sent_only_later(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """By a step, after the event that it confirms."""
    world = World(nursery, routes=STEPS)
    client = await world.live(principal=waiter_of(6))
    await world.publish(1, sector_id=5)
    await world.publish(*range(2, 51), sector_id=6)
    event = escalated(world, 1)
    world.tracked_events.note([event])
    await world.dispatch.deliver([event])
    await world.publish(*range(101, BURST + 1), sector_id=6)
    found = world.tracked_events.find(Place(A, at(1)))
    assert found is not None
    mine = found.tracked.by[Recipient.of(client.connection.principal)]
    found_after = []
    for number in (50, 101):
        await ack(client, number)
        found_after.append(mine.state)
    assert found_after == [State.WRITTEN, State.DELIVERED]
