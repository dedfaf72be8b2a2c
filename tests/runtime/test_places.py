"""Places of clients: in the streams of their tenant alone, and in both while the number changes."""

import math

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import World, place
from trio_gateway.core.audiences import BranchId, TenantId, admins
from trio_gateway.core.event_ids import START, Cursor, Position, Stream, tag
from trio_gateway.core.shards import Sharding
from trio_gateway.runtime.history import History
from trio_gateway.runtime.places import Places
from trio_gateway.runtime.resume import UNDECIDED
from trio_gateway.runtime.resume_state import Phase
from trio_gateway.testing import make_event

ONE, OTHER = TenantId(1), TenantId(2)
SHARDING = Sharding(("s",), shards=64)
OLD, NEW, FOREIGN = tag("s"), tag("s:{50}"), tag("s:{17}")
LAST = 2**64 - 1
AUDIENCES = [admins(ONE, BranchId(1))]


def at(milliseconds: int, sequence: int = 0) -> Position:
    return Position((milliseconds, sequence))


@pytest.fixture
def history() -> History:
    history = History(age=math.inf)
    history.ranks = SHARDING.ranks
    for stream in (OLD, NEW, FOREIGN):
        history.extent.begin(stream, START, whole=True)
        history.extent.advance(stream, START)
    return history


def add(history: History, stream: Stream, *positions: Position) -> None:
    for n, position in enumerate(positions):
        event = make_event(data=n, stream=stream, position=position, received_at=0)
        history.add(event, AUDIENCES, now=0)
        history.extent.advance(stream, position)


async def following(history: History, cursor: Cursor) -> list[tuple[Stream, Position]]:
    """What a client with this id is sent."""
    place = await Places(history.extent, SHARDING).after(cursor, ONE)
    assert place is not None
    assert history.extent.covers(place)
    missed = history.missed(place, AUDIENCES)
    assert history.following(place, AUDIENCES, 100) == missed
    return [(stored.stream, stored.position) for stored in missed]


async def test_client_has_places_in_the_streams_of_its_tenant_alone(history: History) -> None:
    add(history, FOREIGN, at(9))
    add(history, NEW, at(5))
    places = Places(history.extent, SHARDING)
    assert places.of(ONE) == {OLD: START, NEW: at(5)}
    assert places.of(OTHER, {FOREIGN: at(3), NEW: at(4)}) == {FOREIGN: at(3)}
    assert places.concern(NEW, ONE)
    assert not places.concern(NEW, OTHER)
    assert Places(history.extent).of(ONE) == history.extent.end


async def test_id_of_another_tenants_shard_names_no_place(history: History) -> None:
    places = Places(history.extent, SHARDING)
    assert await places.after({FOREIGN: START}, ONE) is None
    assert await places.after({NEW: START, FOREIGN: START}, ONE) is None


async def test_id_of_either_stream_says_what_was_sent_from_both(history: History) -> None:
    add(history, OLD, at(10), at(20, 5), at(40))
    add(history, NEW, at(20), at(20, 1), at(30))
    order = [
        (OLD, at(10)), (OLD, at(20, 5)), (NEW, at(20)), (NEW, at(20, 1)), (NEW, at(30)),
        (OLD, at(40)),
    ]  # fmt: skip
    for n, (stream, position) in enumerate(order, 1):
        assert await following(history, {stream: position}) == order[n:]
    assert await following(history, {OLD: at(20, 5), NEW: START}) == order[2:]


async def test_id_of_a_shard_is_good_if_the_stream_before_it_is_no_more(history: History) -> None:
    add(history, NEW, at(10), at(20))
    assert await following(history, {NEW: at(10)}) == [(NEW, at(20))]
    place = await Places(history.extent, SHARDING).after({NEW: at(20)}, ONE)
    assert place == {OLD: START, NEW: at(20)}


async def test_id_is_not_covered_if_the_other_stream_is_not_known_so_far_back() -> None:
    history = History(age=math.inf)
    history.ranks = SHARDING.ranks
    history.extent.begin(OLD, START, whole=True)
    history.extent.begin(NEW, at(50))
    add(history, OLD, at(10), at(60))
    history.extent.advance(NEW, at(50))
    places = Places(history.extent, SHARDING)
    early, late = await places.after({OLD: at(10)}, ONE), await places.after({OLD: at(60)}, ONE)
    assert early is not None
    assert late is not None
    assert not history.extent.covers(early)
    assert history.extent.covers(late)


async def test_both_streams_are_waited_for(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    history = History(age=math.inf)
    history.ranks = SHARDING.ranks
    history.extent.expected = {OLD, NEW}
    places, found = Places(history.extent, SHARDING), list[bool]()
    assert not await places.wait_known(ONE, 1)

    async def wait() -> None:
        found.append(await places.wait_known(ONE, 1))

    nursery.start_soon(wait)
    history.extent.begin(OLD, START)
    history.extent.advance(OLD, START)
    await wait_all_tasks_blocked()
    assert found == []
    history.extent.begin(NEW, START)
    history.extent.advance(NEW, START)
    await wait_all_tasks_blocked()
    assert found == [True]


def test_forgotten_stream_leaves_nothing_behind_and_others_alone(history: History) -> None:
    add(history, NEW, at(10), at(20))
    add(history, FOREIGN, at(15))
    end = history.extent.end
    history.forget(NEW)
    assert end[NEW] == at(20)  # a copy that was given away does not change
    assert history.extent.end == {OLD: START, FOREIGN: at(15)}
    assert len(history) == 1
    assert not history.missed({NEW: START}, AUDIENCES)
    assert not history.extent.covers({NEW: at(10)})
    assert history.extent.covers({FOREIGN: START})
    history.extent.begin(NEW, at(10))
    add(history, NEW, at(20))
    assert history.extent.covers({NEW: at(10)})
    assert not history.extent.covers({NEW: at(9)})


def test_end_is_the_same_object_until_it_moves(history: History) -> None:
    end = history.extent.end
    assert history.extent.end is end
    history.extent.advance(NEW, at(1))
    assert history.extent.end is not end
    assert end[NEW] == START


async def test_client_is_held_until_all_streams_of_its_tenant_are_read(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, OLD, sharding=SHARDING)
    nursery.start_soon(world.replays.decide)
    silent, other = await world.connect(), await world.connect()
    await other.say("x")
    await trio.sleep(2 * UNDECIDED)
    await world.publish(1, 2, stream=OLD)
    for client in (silent, other):
        assert client.heard == []
        assert client.connection.resume_state.phase is Phase.HELD
    late = await world.connect()
    world.history.extent.begin(NEW, START, whole=True)
    world.history.extent.advance(NEW, START)
    world.replays.begun(NEW)
    await wait_all_tasks_blocked()
    for client in (silent, other):
        assert client.heard == [1, 2]
        assert client.connection.resume_state.phase is Phase.LIVE
    assert late.connection.resume_state.phase is Phase.HELD  # it may still ask to resume
    await world.publish(3, stream=NEW)
    assert silent.heard == other.heard == [1, 2, 3]


async def test_client_may_still_resume_when_its_stream_was_slow_to_be_read(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, OLD, sharding=SHARDING)
    nursery.start_soon(world.replays.decide)
    await world.publish(1, 2, stream=OLD)
    client = await world.connect()
    await trio.sleep(2 * UNDECIDED)
    await client.ask(place(1, OLD))
    world.history.extent.begin(NEW, START, whole=True)
    world.history.extent.advance(NEW, START)
    world.replays.begun(NEW)
    await trio.sleep(0.1)
    assert [answer["recovered"] for answer in client.resumed] == [True]
    assert client.heard == [2]
