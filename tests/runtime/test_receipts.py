"""Receipts: what is known of a client whose connection does not take what it is sent."""

import json
import math
from collections.abc import Mapping

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, Client, World, at, bounded, place
from trio_gateway.core.audiences import Endpoint, Principal, SectorId, audiences_of
from trio_gateway.core.escalation import ESCALATED
from trio_gateway.core.events import Event, parse_event
from trio_gateway.core.receipts import Change, Place, Receipt, State, Who
from trio_gateway.core.routes_file import read_routes
from trio_gateway.runtime.receipt_writing import ReceiptWriting
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


def receipt(world: World, number: int) -> Receipt:
    found = world.receipts.find(Place(A, at(number)))
    assert found is not None
    return found.tracked.by[Who("diner", "456")]


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
    found = world.receipts.find(named)
    assert found is not None
    await trio.sleep(2)
    world.receipts.confirm_earlier(DINER, named)
    await trio.sleep(0.05)
    world.receipts.see_earlier(DINER, named)
    if is_sent_here:
        world.receipts.sent((await diner(world)).connection, [found], waits=False)
    sent = 2050 if is_sent_here else None
    written: list[Mapping[Who, Receipt]] = [found.tracked.changed]

    async def fail(changes: Mapping[Place, Change]) -> bool:
        written.append(changes[named].by)
        world.receipts.see_earlier(DINER, named)
        return False

    writing = ReceiptWriting()
    writing.changed(found.tracked, Who("diner", "456"), Receipt(seen=9000))
    await writing.flush(fail)
    written.append(found.tracked.changed)
    for each in written:
        assert each[Who("diner", "456")] == Receipt(0, sent, sent, 2000, 2050)


async def test_waiters_of_a_branch_stand_in_for_a_sector_only_if_they_are_sent_its_event(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    routes = read_routes('[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 10\n')
    world = World(nursery, routes=routes, uncovered_to_branch=True)
    others = [await world.live(principal=waiter_of(sector)) for sector in (6, 7)]
    event = make_event(data=1, sector_id=5, stream=A, position=at(1))
    world.receipts.note([event])
    assert not world.dispatch.try_deliver([event])  # to two of them: it waits for its turn
    covering = await world.live(principal=waiter_of(5))
    await world.dispatch.deliver([event])
    assert [each.heard for each in (covering, *others)] == [[1], [], []]
    found = world.receipts.find(Place(A, at(1)))
    assert found is not None
    assert [found.tracked.steps_of(audiences_of(waiter_of(n))) for n in (5, 6)] == [1, 0]

    await covering.leave()
    await world.publish(2, sector_id=5)
    assert [each.heard for each in others] == [[2], [2]]
    found = world.receipts.find(Place(A, at(2)))
    assert found is not None
    assert [found.tracked.steps_of(audiences_of(waiter_of(n))) for n in (5, 6)] == [1, 1]


def waiter_of(sector: int) -> Principal:
    return make_principal(Endpoint.WAITER, sectors=[SectorId(sector)])


def escalated(world: World, number: int) -> Event:
    """The event of this number on its way to the floor, without the waiters of its sector."""
    payload = dict(world.redis.entries[A])[at(number)]
    assert payload is not None
    keys = {
        "type": ESCALATED, "tenant_id": 1, "branch_id": 1, "sector_id": 5, "step": 1, "to": "floor",
        "of": "ROUND_READY", "event_id": place(number), "unless": ["waiters"],
        "event": json.loads(payload),
    }  # fmt: skip
    text = json.dumps(keys, separators=(",", ":")).encode()
    return parse_event(text, channel="", received_at=0.0, stream=A, position=at(100))


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
    world.receipts.note([event])
    await world.dispatch.deliver([event])
    assert now.heard == heard


async def test_escalated_event_that_waits_for_a_connection_already_is_not_sent_to_it_again(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.live(principal=waiter_of(5), terms=SMALL, socket=FakeSocket(room=0))
    await world.publish(1, sector_id=5)
    world.hub.move(client.connection, waiter_of(6))
    event = escalated(world, 1)
    world.receipts.note([event])
    await world.dispatch.deliver([event])
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert client.heard == [1]
