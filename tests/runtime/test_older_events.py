"""Older events: an id that memory no longer holds is resumed from the stream, as if it did."""

import math
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import A, B, Client, World, at, bounded, place
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.close_codes import Close
from trio_gateway.core.event_ids import LAST, Position, event_id
from trio_gateway.runtime.older_events import DEADLINE
from trio_gateway.testing import FakeSocket, make_principal

DINER = make_principal(Endpoint.DINER, session=456)


def make_world(nursery: trio.Nursery, *, events: int = 100, most_scanned: int = 10_000) -> World:
    return World(nursery, events=events, most_scanned=most_scanned)


def outcome(client: Client) -> tuple[bool, int, list[int]]:
    """Recovered or not, the count in the answer, and the events it got."""
    (answer,) = client.resumed
    return answer["recovered"], answer["count"], client.heard


async def connect(world: World, last_event_id: str, **options: Any) -> Client:
    client = await world.connect(last_event_id, **options)
    with trio.move_on_after(DEADLINE + 3):
        while not client.resumed:
            await trio.sleep(0.01)
    await wait_all_tasks_blocked()
    return client


@pytest.mark.parametrize("last", [1, 499, 850, 899, 900, 901, 1000])
async def test_missed_events_come_from_the_stream_then_from_memory_then_live(
    autojump_clock: MockClock, nursery: trio.Nursery, last: int
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    client = await connect(world, place(last))
    await world.publish(1001)

    assert outcome(client) == (True, 1000 - last, list(range(last + 1, 1002)))
    assert world.older.scans == (last < 900)
    assert not world.hub.held


async def test_scan_reaches_back_as_far_as_the_bound_and_no_further(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery, most_scanned=500)
    await world.publish(*range(1, 5001))

    assert outcome(await connect(world, place(4400)))[:2] == (True, 600)
    assert outcome(await connect(world, place(4399)))[:2] == (False, 0)
    assert outcome(await connect(world, place(7)))[:2] == (False, 0)
    assert world.redis.entries_read <= 2 * (500 + 1000) + 2


async def test_id_between_known_entries_that_names_none_is_not_recovered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """As one of an entry that a new primary lacks: it lacks others, too, maybe."""
    world = make_world(nursery)
    await world.publish(*range(1, 10), 11)
    assert outcome(await connect(world, place(10))) == (False, 0, [])
    assert outcome(await connect(world, place(9))) == (True, 1, [11])
    world.redis.fails = True
    assert outcome(await connect(world, event_id(A, Position((9, 1))))) == (False, 0, [])
    assert outcome(await connect(world, place(11))) == (True, 0, [])


async def test_entry_that_is_no_event_is_looked_up_once_for_all_who_name_it(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(1)
    world.redis.entries[A].append((at(2), None))
    world.redis.seconds = 1
    await world.publish(3)
    async with trio.open_nursery() as together:

        async def resume() -> None:
            assert outcome(await connect(world, place(2))) == (True, 1, [3])

        for _ in range(20):
            together.start_soon(resume)
    assert world.redis.pages == 1


async def test_nothing_is_scanned_if_scans_are_switched_off(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery, most_scanned=0)
    await world.publish(*range(1, 1001))
    assert outcome(await connect(world, place(500)))[:2] == (False, 0)
    assert world.redis.pages == 0


async def test_one_scan_serves_all_clients_with_ids_in_its_range(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    world.redis.seconds = 0.1
    await world.publish(*range(1, 3001))
    clients = [await world.connect(place(100 + 35 * n)) for n in range(40)]
    await trio.sleep(2)

    for n, client in enumerate(clients):
        assert outcome(client) == (True, 2900 - 35 * n, list(range(101 + 35 * n, 3001)))
    assert world.older.scans == 1
    late = await connect(world, place(150))
    assert outcome(late)[:2] == (True, 2850)
    assert world.older.scans == 1


async def test_clients_with_ids_that_are_too_old_share_a_scan_too(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery, most_scanned=1000)
    world.redis.seconds = 0.01
    await world.publish(*range(1, 4001))
    clients = [await world.connect(place(10 + n)) for n in range(50)]
    await trio.sleep(2)

    assert [outcome(client)[:2] for client in clients] == [(False, 0)] * 50
    assert world.older.scans == 1


async def test_client_that_leaves_during_the_scan_it_leads_delays_no_other(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    world.redis.seconds = 0.1
    await world.publish(*range(1, 3001))
    first = await world.connect(place(10))
    second = await world.connect(place(20))
    await first.leave()
    await trio.sleep(2)

    assert outcome(second) == (True, 2980, list(range(21, 3001)))


@pytest.mark.parametrize("last", [500, 501])
async def test_id_that_was_trimmed_from_the_stream_is_not_recovered(
    autojump_clock: MockClock, nursery: trio.Nursery, last: int
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    del world.redis.entries[A][:500]

    assert outcome(await connect(world, place(last)))[0] is (last == 501)


@pytest.mark.parametrize("is_trimmed", [False, True])
async def test_place_in_an_empty_stream_is_recovered_if_nothing_was_trimmed(
    autojump_clock: MockClock, nursery: trio.Nursery, is_trimmed: bool
) -> None:
    world = make_world(nursery)
    (answer,) = (await world.connect("")).resumed
    await world.publish(*range(1, 1001))
    world.redis.is_trimmed = is_trimmed
    client = await connect(world, answer["last_event_id"])

    assert outcome(client)[:2] == ((False, 0) if is_trimmed else (True, 1000))
    assert (await connect(world, place(1))).heard == list(range(2, 1001))


@pytest.mark.parametrize("trimmed", [0, 499, 500])
async def test_end_of_a_millisecond_is_recovered_if_an_entry_before_it_is_there(
    autojump_clock: MockClock, nursery: trio.Nursery, trimmed: int
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 501), *range(601, 1001))
    del world.redis.entries[A][:trimmed]
    world.redis.is_trimmed = trimmed > 0
    client = await connect(world, event_id(A, Position((550, LAST[1]))))

    assert outcome(client)[:2] == ((True, 400) if trimmed < 500 else (False, 0))


async def test_stream_that_is_trimmed_while_it_is_read_is_not_recovered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    world.redis.seconds = 0.1
    await world.publish(*range(1, 4001))
    client = await world.connect(place(10))
    await trio.sleep(0.15)
    del world.redis.entries[A][:500]
    await trio.sleep(2)

    assert outcome(client)[:2] == (False, 0)


async def test_id_of_a_recreated_stream_is_not_recovered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    del world.redis.entries[A][600:]  # Redis came back with a part of it
    world.history.restart(A, since=at(1001), end=at(600))
    world.replays.tell_of_gap(A)
    await world.publish(*range(1002, 1202))

    assert outcome(await connect(world, place(500)))[:2] == (False, 0)
    assert outcome(await connect(world, place(1050)))[:2] == (True, 151)


@pytest.mark.parametrize("after", [0.0, 0.15, 2.0])
async def test_gap_that_comes_before_during_or_after_the_scan_is_not_read_across(
    autojump_clock: MockClock, nursery: trio.Nursery, after: float
) -> None:
    world = make_world(nursery)
    world.redis.seconds = 0.1
    await world.publish(*range(1, 3001))
    first = await world.connect(place(10))
    await trio.sleep(after)
    world.history.restart(A, since=at(3001), end=at(3000))  # 3001 was lost unread
    world.replays.tell_of_gap(A)
    await world.publish(*range(3002, 3102))
    await trio.sleep(3)
    late = await connect(world, place(3050))
    again = await connect(world, place(20))

    assert first.resumed[0]["recovered"] is (after == 2.0)
    assert outcome(late)[:2] == (True, 51)
    assert outcome(again)[:2] == (False, 0)


async def test_process_that_has_not_seen_the_old_stream_does_not_take_its_ids(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1001, 1201))
    assert outcome(await connect(world, place(500)))[:2] == (False, 0)
    assert outcome(await connect(world, place(1050, B)))[:2] == (False, 0)


@pytest.mark.parametrize("how", ["refuses", "hangs"])
async def test_redis_that_is_away_is_waited_for_in_bounded_time(
    autojump_clock: MockClock, nursery: trio.Nursery, how: str
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    world.redis.fails = how == "refuses"
    world.redis.seconds = math.inf if how == "hangs" else 0
    client = await world.connect(place(500))
    other = await world.connect(place(950))
    await world.publish(1001)
    await trio.sleep(DEADLINE + 0.1)

    assert outcome(client) == (False, 0, [1001])
    assert outcome(other) == (True, 50, list(range(951, 1002)))


async def test_restarted_process_reads_what_it_did_not_warm(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    before = make_world(nursery, events=10**6)
    await before.publish(*range(1, 1001))
    world = World(nursery, begun=False, events=100, most_scanned=10_000)
    world.redis = before.redis
    world.older._stream_reader = before.redis
    world.history.extent.begin(A, at(900))
    world.history.extent.advance(A, at(1000))
    await world.publish(1001)

    assert outcome(await connect(world, place(400))) == (
        True, 601, list(range(401, 1002)),
    )  # fmt: skip


async def test_events_during_the_scan_are_live_or_replayed_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    world.redis.seconds = 0.05
    await world.publish(*range(1, 3001))
    client = await world.connect(place(10))
    for n in range(3001, 3400):
        await world.publish(n)
        await trio.sleep(0.001)
    await trio.sleep(1)

    assert client.heard == list(range(11, 3400))
    assert client.resumed[0]["recovered"]


async def test_history_that_moves_on_is_followed_without_a_new_scan(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    assert outcome(await connect(world, place(500)))[:2] == (True, 500)
    for first in range(1001, 6001, 1000):
        await world.publish(*range(first, first + 1000))
        last = first + 999
        assert outcome(await connect(world, place(600))) == (
            True, last - 600, list(range(601, last + 1)),
        )  # fmt: skip
    assert world.older.scans == 1


async def test_slow_client_reads_on_when_the_history_has_moved_past_the_scan(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 2001))
    client = await connect(world, place(0 + 1), socket=FakeSocket(room=500))
    await world.publish(*range(2001, 5001))
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert client.heard == list(range(2, 5001))
    assert client.connection.waiting_bytes == 0
    assert not client.connection.ending


async def test_lagging_client_that_was_closed_gets_the_rest_from_the_stream(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    limits = bounded(outbox_messages=10, write_timeout=math.inf)
    client = await world.live(terms=limits, socket=FakeSocket(room=0))
    await world.publish(*range(1, 51))
    await world.publish(*range(51, 1001))
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    assert client.connection.code == Close.SLOW_CONSUMER

    again = await connect(world, place(client.heard[-1]))

    assert [*client.heard, *again.heard] == list(range(1, 1001))


async def test_range_that_is_not_used_is_dropped_and_its_memory_freed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    await world.publish(*range(1, 1001))
    slow = await connect(world, place(100), socket=FakeSocket(room=500))
    await trio.sleep(40)
    world.older.trim(trio.current_time())
    assert not world.older._ranges
    slow.socket.read(math.inf)
    await wait_all_tasks_blocked()  # it reads the stream again

    assert slow.heard == list(range(101, 1001))
    assert world.older.scans == 2


@pytest.mark.parametrize("again", [False, True])
async def test_range_that_is_dropped_while_memory_holds_the_rest_ends_no_client(
    autojump_clock: MockClock, nursery: trio.Nursery, again: bool
) -> None:
    world = make_world(nursery, events=2000)
    await world.publish(*range(1, 3001))
    slow = await connect(world, place(999), socket=FakeSocket(room=500))  # memory begins at 1000
    slow.socket.read(30_000)  # to an event that memory holds, too
    await wait_all_tasks_blocked()
    assert slow.connection.resume_state.older
    await trio.sleep(40)
    world.older.trim(trio.current_time())
    assert not world.older._ranges
    if again:  # there is another range, which ends before that event
        world.redis.entries[A], rest = world.redis.entries[A][:1005], world.redis.entries[A][1005:]
        await connect(world, place(990))
        world.redis.entries[A] += rest
    slow.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert slow.heard == list(range(1000, 3001))
    assert not slow.connection.ending


async def test_ranges_of_too_many_bytes_are_not_stored(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = make_world(nursery)
    world.older._most_bytes = 100_000
    await world.publish(*range(1, 2001))
    assert outcome(await connect(world, place(1500)))[:2] == (True, 500)
    assert outcome(await connect(world, place(10)))[:2] == (False, 0)
    assert 0 < sum(each.bytes for each in world.older._ranges.values()) <= 150_000


KINDS: tuple[dict[str, Any], ...] = (
    {"type": "ROUND_READY", "session_id": 456},
    {"type": "ROUND_SUBMITTED", "sector_id": 5},
    {"type": "ENTITY_UPDATED"},
    {"type": "ROUND_READY", "tenant_id": 2},
    {"type": "CART_SYNC", "session_id": 456},
    {"type": "ROUND_READY", "id": "one"},
    {"type": "ENTITY_UPDATED", "branch_id": 0},
    {"type": "NO_SUCH_TYPE"},
)
PRINCIPALS = (
    make_principal(Endpoint.WAITER, sectors=[5]),
    make_principal(Endpoint.KITCHEN),
    make_principal(Endpoint.ADMIN),
    DINER,
)


@given(
    st.lists(st.tuples(st.integers(0, 7), st.integers(1, 20)), min_size=1, max_size=12),
    st.integers(1, 20),
    st.data(),
)
def test_answer_equals_that_of_a_big_history(
    runs: list[tuple[int, int]], events: int, data: st.DataObject
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            worlds = [World(nursery, events=10**6), make_world(nursery, events=events)]
            n = 1
            for world in worlds:
                await world.publish(n)
            for kind, count in runs:
                numbers = range(n + 1, n + count + 1)
                n += count
                for world in worlds:
                    await world.publish(*numbers, **KINDS[kind])
            for principal in PRINCIPALS:
                last = data.draw(st.integers(1, n))
                clients = [
                    await connect(world, place(last), principal=principal) for world in worlds
                ]
                big, small = map(outcome, clients)
                if any(KINDS[kind].get("id") for kind, _ in runs):  # its first may be before this
                    assert small[2][-len(big[2]) or len(small[2]) :] == big[2] or small[0]
                else:
                    assert small == big
                for client in clients:
                    await client.leave()
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))
