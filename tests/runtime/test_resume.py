"""Resume: from what was missed to what is live, each event once and in order."""

import json
import math
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import GAP, A, B, Client, World, at, bounded, place, still_to_come
from trio_gateway.core.audiences import Endpoint, Principal, audiences_of
from trio_gateway.core.close_codes import Close
from trio_gateway.core.event_ids import START, Stream, event_id
from trio_gateway.runtime.connection import Connection
from trio_gateway.runtime.resume import PATIENCE, UNDECIDED
from trio_gateway.runtime.socket import Ping
from trio_gateway.testing import FakeSocket, make_event, make_principal


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    made = World(nursery)
    nursery.start_soon(made.replays.decide)
    return made


def resumed(count: int, last_event_id: str, *, recovered: bool = True) -> dict[str, Any]:
    return {
        "type": "resumed", "recovered": recovered, "count": count, "last_event_id": last_event_id,
    }  # fmt: skip


# What was missed


@pytest.mark.parametrize("way", ["handshake", "message"])
async def test_client_gets_what_it_missed_then_what_is_live(
    autojump_clock: MockClock, world: World, way: str
) -> None:
    await world.publish(1, 2, 3, 4)
    if way == "handshake":
        client = await world.connect(place(2))
    else:
        client = await world.connect()
        await client.ask(place(2))
    await world.publish(5)

    assert [message["type"] for message in client.said] == ["resumed"] + ["ROUND_READY"] * 3
    assert client.resumed == [resumed(2, place(2))]
    assert client.heard == [3, 4, 5]
    assert [message["event_id"] for message in client.said[1:]] == [place(3), place(4), place(5)]
    assert trio.current_time() == 0


async def test_client_that_missed_nothing_gets_the_present_position(
    autojump_clock: MockClock, world: World
) -> None:
    """Else the id of a client that gets few events would grow too old while it is connected."""
    await world.publish(1)
    await world.publish(2, branch_id=7)
    client = await world.connect(place(1))
    assert client.resumed == [resumed(0, place(2))]


async def test_client_whose_replay_breaks_off_can_resume_from_any_id_it_was_sent(
    autojump_clock: MockClock,
    world: World,
) -> None:
    """The answer comes before the missed events: its id must not be after theirs."""
    await world.publish(1, 2, 3)
    client = await world.connect(place(1), socket=FakeSocket(room=140))
    assert (client.heard, client.resumed[0]["count"]) == ([], 2)
    await client.leave()

    again = await world.connect(client.resumed[0]["last_event_id"])
    assert again.heard == [2, 3]


async def test_count_is_of_the_events_that_this_client_may_see(
    autojump_clock: MockClock, world: World
) -> None:
    principal = make_principal(sectors=[5])
    for n in range(1, 31, 5):
        await world.publish(n, sector_id=5)
        await world.publish(n + 1, sector_id=6)
        await world.publish(n + 2, tenant_id=2)
        await world.publish(n + 3, branch_id=2)
        await world.publish(n + 4, type="ENTITY_UPDATED")

    client = await world.connect(place(1), principal=principal)

    assert client.resumed == [resumed(5, place(1))]
    assert client.heard == [6, 11, 16, 21, 26]


@pytest.mark.parametrize(
    ("principal", "expected"),
    [
        (make_principal(Endpoint.WAITER), [1, 2, 5]),
        (make_principal(Endpoint.WAITER, roles=["MANAGER"]), [1, 2, 3, 4, 5, 6]),
        (make_principal(Endpoint.KITCHEN), [1, 5]),
        (make_principal(Endpoint.ADMIN), [1, 2, 3, 4, 5, 6]),
        (make_principal(Endpoint.DINER, session=456), [1, 5]),
        (make_principal(Endpoint.DINER, session=457), [5]),
        (make_principal(Endpoint.WAITER, tenant=2), []),
        (make_principal(Endpoint.ADMIN, branches=[2]), [6]),
    ],
)
async def test_replay_is_authorised_like_live_delivery(
    autojump_clock: MockClock, world: World, principal: Principal, expected: list[int]
) -> None:
    live = await world.live(principal=principal)
    await world.publish(1, session_id=456)
    await world.publish(2, type="ROUND_SUBMITTED")
    await world.publish(3, type="ENTITY_UPDATED")
    await world.publish(4, type="SERVICE_CALL_CREATED", sector_id=5)
    await world.publish(5, type="PRODUCT_AVAILABILITY_CHANGED")
    await world.publish(6, type="ENTITY_DELETED", branch_id=0)

    client = await world.connect("0-0-aaaa", principal=principal)

    assert client.heard == live.heard == expected
    assert client.resumed[0]["count"] == len(expected)


async def test_events_that_are_not_durable_are_not_replayed(
    autojump_clock: MockClock, world: World
) -> None:
    diner = make_principal(Endpoint.DINER, session=456)
    await world.publish(1, session_id=456)
    await world.publish(2, session_id=456, type="CART_SYNC")
    await world.publish(3, session_id=456, stream=None)

    client = await world.connect(place(0), principal=diner)

    assert client.heard == [1]


async def test_long_replay_is_whole_and_in_order(autojump_clock: MockClock, world: World) -> None:
    await world.publish(*range(1, 3001))
    client = await world.connect(place(1))
    assert client.resumed == [resumed(2999, place(1))]
    assert client.heard == list(range(2, 3001))
    assert world.replays.feeding.replayed == 2999


async def test_big_events_are_replayed_in_writes_of_bounded_size(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(*range(1, 21), entity="x" * 30_000)
    client = await world.connect(place(0))
    assert client.heard == list(range(1, 21))
    assert client.socket.writes >= 20 / 3


async def test_client_that_does_not_resume_gets_no_resumed_message(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1)
    client = await world.connect()
    await trio.sleep(5)
    await client.say("ping")
    await world.publish(2)
    assert [message["type"] for message in client.said] == ["pong", "ROUND_READY"]
    assert not world.replays.resumes


# The present position


async def test_empty_id_asks_for_the_present_position_from_which_a_client_can_resume(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1)
    client = await world.connect("")
    assert client.said == [resumed(0, place(1))]
    await client.leave()
    await world.publish(2, 3)

    again = await world.connect(client.resumed[0]["last_event_id"])

    assert again.heard == [2, 3]


async def test_empty_stream_has_a_present_position(autojump_clock: MockClock, world: World) -> None:
    client = await world.connect()
    await client.ask("")
    assert client.resumed == [resumed(0, place(0))]
    await client.leave()
    await world.publish(1)
    assert (await world.connect(place(0))).heard == [1]


async def test_present_position_is_that_of_the_accepted_upgrade(
    autojump_clock: MockClock, world: World
) -> None:
    """Events that arrive while the credential is checked are not missed."""
    await world.publish(1)
    accepted_at = world.history.extent.end
    await world.publish(2)
    for resume_from in (None, ""):
        client = await world.connect(resume_from, accepted_at=accepted_at)
        await trio.sleep(UNDECIDED + 0.1)
        assert client.heard == [2]
        assert client.resumed == ([] if resume_from is None else [resumed(1, place(1))])


async def test_id_of_several_streams_resumes_in_each(
    autojump_clock: MockClock, world: World, nursery: trio.Nursery
) -> None:
    world = World(nursery, A, B)
    await world.publish(1, stream=A)
    client = await world.connect("")
    assert client.resumed[0]["last_event_id"] == f"{place(1)}.{place(0, B)}"
    await client.leave()
    await world.publish(2, stream=A)
    await world.publish(3, stream=B)

    again = await world.connect(client.resumed[0]["last_event_id"])

    assert again.heard == [2, 3]
    assert again.resumed[0]["count"] == 2


async def test_client_with_an_id_of_one_stream_receives_the_others_from_now_on(
    autojump_clock: MockClock, world: World, nursery: trio.Nursery
) -> None:
    world = World(nursery, A, B)
    await world.publish(1, 2, stream=A)
    await world.publish(3, stream=B)
    client = await world.connect(place(1), socket=FakeSocket(room=0))
    await world.publish(4, stream=B)  # while it is replayed to
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    await world.publish(5, stream=B)

    assert client.heard == [2, 4, 5]


# What can't be recovered


@pytest.mark.parametrize(
    "last_event_id",
    [place(2), "garbage", "1-1", "-", place(9, B), place(2) + "." + place(9, B), "\x00", "9" * 999],
)
@pytest.mark.parametrize("way", ["handshake", "message"])
async def test_id_without_a_known_position_is_refused_with_the_present_position(
    autojump_clock: MockClock, nursery: trio.Nursery, last_event_id: str, way: str
) -> None:
    world = World(nursery, events=3)
    await world.publish(1, 2, 3, 4, 5, 6)
    if way == "handshake":
        client = await world.connect(last_event_id)
    else:
        client = await world.connect()
        await client.ask(last_event_id)
    await trio.sleep(PATIENCE + 0.1)
    await world.publish(7)

    assert client.resumed == [resumed(0, place(6), recovered=False)]
    assert client.heard == [7]
    await client.leave()
    await world.publish(8)
    assert (await world.connect(place(6))).heard == [7, 8]


@pytest.mark.parametrize("last_event_id", [None, 7, 1.5, True, [], {}, [place(1)]])
async def test_id_that_is_not_a_string_is_refused(
    autojump_clock: MockClock, world: World, last_event_id: Any
) -> None:
    await world.publish(1)
    client = await world.connect()
    await client.ask(last_event_id)
    assert client.resumed == [resumed(0, place(1), recovered=False)]


async def test_resume_without_an_id_is_refused(autojump_clock: MockClock, world: World) -> None:
    client = await world.connect()
    await client.say({"type": "resume"})
    assert client.resumed == [resumed(0, place(0), recovered=False)]


@pytest.mark.parametrize("first", ["x", "ping", '{"type":"auth"}', '{"type":"resume"}'])
async def test_resume_that_is_not_the_first_message_is_refused_and_live_events_go_on(
    autojump_clock: MockClock, world: World, first: str
) -> None:
    await world.publish(1, 2)
    client = await world.connect()
    await client.say(first)
    await world.publish(3)
    await client.ask(place(1))
    await world.publish(4)

    assert client.resumed[-1] == resumed(0, place(3), recovered=False)
    assert client.heard == [3, 4]


async def test_second_resume_after_one_in_the_handshake_is_refused(
    autojump_clock: MockClock,
    world: World,
) -> None:
    await world.publish(1, 2)
    client = await world.connect(place(1))
    await client.ask(place(1))
    assert client.said[-1] == resumed(0, place(2), recovered=False)
    assert client.heard == [2]


async def test_second_resume_that_waits_behind_the_handshake_is_refused(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1, 2)
    socket = FakeSocket()
    await socket.client.send(json.dumps({"type": "resume", "last_event_id": place(0)}))
    client = await world.connect(place(1), socket=socket)
    await world.publish(3)
    assert sorted(answer["recovered"] for answer in client.resumed) == [False, True]
    assert client.heard == [2, 3]


async def test_protocol_ping_is_not_a_first_message(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1, 2)
    client = await world.connect()
    await client.say(Ping(b""))
    await client.ask(place(1))
    assert client.heard == [2]


async def test_late_first_message_may_resume_if_no_durable_event_was_sent_before(
    autojump_clock: MockClock,
    world: World,
) -> None:
    await world.publish(1, 2)
    client = await world.connect()
    await trio.sleep(100)
    await world.publish(3, branch_id=2)
    await client.ask(place(1))
    await world.publish(4)
    assert client.resumed == [resumed(1, place(1))]
    assert client.heard == [2, 4]


async def test_first_message_after_a_durable_event_cannot_resume(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1, 2)
    client = await world.connect()
    await trio.sleep(100)
    await world.publish(3)
    await client.ask(place(1))
    await world.publish(4)
    assert client.resumed == [resumed(0, place(3), recovered=False)]
    assert client.heard == [3, 4]


async def test_first_message_after_a_durable_event_that_only_the_stream_still_holds_cannot_resume(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, events=3, most_scanned=100)
    nursery.start_soon(world.replays.decide)
    await world.publish(1, 2)
    client = await world.connect()
    await trio.sleep(100)
    await world.publish(3)
    await world.publish(4, 5, 6, branch_id=2)
    await client.ask(place(1))
    await trio.sleep(1)
    assert client.resumed == [resumed(0, place(6), recovered=False)]
    assert client.heard == [3]


# Held


async def test_silent_client_gets_durable_events_after_half_a_second_and_others_at_once(
    autojump_clock: MockClock,
    world: World,
) -> None:
    diner = make_principal(Endpoint.DINER, session=456)
    client = await world.connect(principal=diner)
    await world.publish(1, session_id=456)
    await world.publish(2, session_id=456, type="CART_SYNC")
    await world.publish(3, session_id=456, stream=None)
    assert client.heard == [2, 3]
    await trio.sleep(UNDECIDED - 0.001)
    assert client.heard == [2, 3]
    await trio.sleep(0.001)
    await wait_all_tasks_blocked()
    assert client.heard == [2, 3, 1]
    await world.publish(4, session_id=456)
    assert client.heard == [2, 3, 1, 4]
    assert not world.hub.held


@pytest.mark.parametrize("first", ["x", "ping", '{"type":"auth","token":"t"}', "{"])
async def test_any_first_message_ends_the_wait(
    autojump_clock: MockClock, world: World, first: str
) -> None:
    client = await world.connect()
    await world.publish(1)
    assert client.heard == []
    await client.say(first)
    assert client.heard == [1]
    assert trio.current_time() == 0
    await trio.sleep(1)
    await world.publish(2)
    assert client.heard == [1, 2]


async def test_each_client_is_held_for_half_a_second_after_it_joined(
    autojump_clock: MockClock, world: World
) -> None:
    clients = []
    for _ in range(5):
        clients.append(await world.connect())
        await trio.sleep(0.1)
    await world.publish(1)  # at 0.5
    for n in range(5):
        await trio.sleep_until(0.5 + n * 0.1 + 0.05)
        assert [bool(client.heard) for client in clients] == [i <= n for i in range(5)]


async def test_events_in_several_writes_for_a_silent_client_are_in_order(
    autojump_clock: MockClock,
    world: World,
) -> None:
    client = await world.connect()
    await world.publish(*range(1, 501))
    await trio.sleep(UNDECIDED)
    await world.publish(501)
    await wait_all_tasks_blocked()
    assert client.heard == list(range(1, 502))


# Another process was faster


async def test_id_that_is_newer_than_what_was_read_is_waited_for(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1)
    clients = [await world.connect(place(3)) for _ in range(3)]
    await trio.sleep(PATIENCE - 0.1)
    assert [client.said for client in clients] == [[], [], []]
    await world.publish(2, 3, 4)
    await wait_all_tasks_blocked()

    for client in clients:
        assert client.resumed == [resumed(1, place(3))]
        assert client.heard == [4]


async def test_stream_that_is_being_read_for_the_first_time_is_waited_for(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """Half of it is in memory, and another stream has been read already."""
    world = World(nursery, A)
    world.history.extent.expected.update({A, B})
    early = await world.connect(place(1, B))
    world.history.extent.begin(B, at(1), whole=True)
    for n in (1, 2):
        world.history.add(still_to_come(n, B), audiences_of(make_principal()), now=0)
    during = await world.connect(place(1, B))
    assert not world.history.extent.warm
    assert (early.said, during.said) == ([], [])
    world.history.add(still_to_come(3, B), audiences_of(make_principal()), now=0)
    world.history.extent.advance(B, at(3))
    await wait_all_tasks_blocked()

    assert world.history.extent.warm
    for client in (early, during):
        assert client.resumed == [resumed(2, f"{event_id(A, START)}.{place(1, B)}")]
        assert client.heard == [2, 3]


async def test_stream_whose_first_reading_takes_too_long_is_not_recovered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, A)
    world.history.extent.expected.update({A, B})
    world.history.extent.begin(B, START, whole=True)
    client = await world.connect(place(1, B))
    await trio.sleep(PATIENCE + 0.1)
    assert [answer["recovered"] for answer in client.resumed] == [False]


async def test_id_that_is_not_read_within_two_seconds_is_refused(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(1)
    client = await world.connect(place(3))
    await trio.sleep(1)
    await world.publish(2)
    assert client.said == []
    await trio.sleep_until(PATIENCE)
    await wait_all_tasks_blocked()
    assert client.resumed == [resumed(0, place(1), recovered=False)]
    assert client.heard == [2]
    await world.publish(3)
    assert client.heard == [2, 3]


async def test_id_that_names_streams_that_are_not_read_is_refused_at_once(
    autojump_clock: MockClock, world: World
) -> None:
    """While an id is waited for, each entry that is read would cost as much as it names streams."""
    await world.publish(1)
    unknown = ".".join(place(1, Stream(f"{n:04d}")) for n in range(3000))
    clients = [
        await world.connect(f"{unknown}.{place(3)}"),
        await world.connect(f"{place(3)}.{place(1, B)}"),
    ]
    assert trio.current_time() == 0
    for client in clients:
        assert client.resumed == [resumed(0, place(1), recovered=False)]


async def test_gateway_answers_a_resume_when_it_has_read_the_stream(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:
    world = World(nursery, begun=False)
    early = [await world.connect(resume_from) for resume_from in (place(1), "", None)]
    await trio.sleep(1)
    for n in (1, 2):  # warming
        world.history.extent.begin(A, at(1))
        world.dispatch.remember(make_event(data=n, stream=A, position=at(n)))
        early.append(await world.connect())
    world.history.extent.advance(A, at(2))
    await wait_all_tasks_blocked()
    await world.publish(3)
    for client in early[2:]:
        await client.say("x")

    assert [client.heard for client in early] == [[2, 3], [3], [3], [3], [3]]
    assert early[0].resumed == [resumed(1, place(1))]
    assert early[1].resumed == [resumed(0, place(2))]


@pytest.mark.parametrize("messages", [["garbage"], [place(9)], [None, "garbage"], [None, ""]])
async def test_refusal_waits_for_the_first_reading_to_name_the_present_position(
    autojump_clock: MockClock, nursery: trio.Nursery, messages: list[str | None]
) -> None:
    world = World(nursery, begun=False)
    client = await world.connect()
    for last_event_id in messages:
        await (client.say("x") if last_event_id is None else client.ask(last_event_id))
    assert client.said == []
    world.history.extent.begin(A, START, whole=True)
    world.dispatch.remember(make_event(data=1, stream=A, position=at(1)))
    world.history.extent.advance(A, at(1))
    await trio.sleep(PATIENCE + 0.1)
    await world.publish(2)

    assert client.resumed == [resumed(0, place(1), recovered=False)]
    assert client.heard == [2]
    assert (await world.connect(place(1))).heard == [2]


async def test_position_before_the_first_reading_is_not_taken_for_the_present_one(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:
    world = World(nursery, begun=False)
    client = await world.connect("")
    await trio.sleep(PATIENCE)
    await wait_all_tasks_blocked()
    (answer,) = client.resumed
    assert (answer["recovered"], answer["count"]) == (False, 0)
    await client.leave()
    world.history.extent.begin(A, START, whole=True)
    world.history.extent.advance(A, START)
    await world.publish(1)

    again = await world.connect(answer["last_event_id"])

    assert again.resumed == [resumed(0, place(1), recovered=False)]


# Slow clients


async def test_replay_to_a_slow_client_is_as_fast_as_it_reads(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(*range(1, 5001), entity="x" * 100)
    client = await world.connect(
        "0-0-aaaa", socket=FakeSocket(room=0), terms=bounded(outbox_messages=1000)
    )
    most, last = 0, 5000
    for _ in range(2000):
        last += 1
        await world.publish(last)  # durable, and waits its turn in the history
        client.socket.read(4000)
        await wait_all_tasks_blocked()
        most = max(most, client.connection.waiting_bytes)
        if not world.hub.held:
            break
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert client.resumed[0]["count"] == 5000
    assert client.heard == list(range(1, last + 1))
    assert most < 70_000
    assert not client.connection.ending


async def test_client_that_reads_nothing_of_its_replay_is_closed(
    autojump_clock: MockClock,
    world: World,
) -> None:
    await world.publish(*range(1, 500))
    client = await world.connect(place(0), socket=FakeSocket(room=9), terms=bounded())
    await trio.sleep(20)
    assert client.connection.code == Close.SLOW_CONSUMER
    assert not world.hub.held


async def test_events_that_are_not_durable_overtake_a_slow_replay(
    autojump_clock: MockClock, world: World
) -> None:
    diner = make_principal(Endpoint.DINER, session=456)
    await world.publish(*range(1, 401), session_id=456)
    client = await world.connect(place(0), principal=diner, socket=FakeSocket(room=1000))
    await world.publish(1000, session_id=456, type="CART_SYNC")
    for _ in range(1000):
        client.socket.read(1000)
        await wait_all_tasks_blocked()
    assert client.heard.index(1000) < 399
    assert [n for n in client.heard if n != 1000] == list(range(1, 401))


async def test_slow_client_whose_next_events_are_forgotten_is_closed_and_may_resume(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, events=300)
    await world.publish(*range(1, 301), entity="x" * 100)
    client = await world.connect(place(0), socket=FakeSocket(room=200))
    await world.publish(*range(301, 1001), entity="x" * 100)  # 2 to 700 can't wait so long
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert client.heard == [1]  # which was partly written
    assert client.socket.closed is Close.SLOW_CONSUMER
    assert client.socket.reason == "too slow: the history has moved past it"
    assert GAP not in client.said


async def test_slow_client_receives_the_events_of_a_recreated_stream(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(*range(1, 501), entity="x" * 100)
    client = await world.connect(place(0), socket=FakeSocket(room=0))
    world.history.restart(A, since=at(501), end=at(100))  # it is not known what was lost
    world.replays.tell_of_gap(A)
    await world.publish(101, 102)  # positions that the stream had before
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert client.heard[-2:] == [101, 102]
    assert client.said[-3] == GAP
    assert not world.hub.held


async def test_replay_that_needs_no_forgotten_event_goes_on(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:
    world = World(nursery, events=300)
    await world.publish(1, 2, entity="x" * 100)
    await world.publish(*range(3, 301), branch_id=9)
    client = await world.connect(place(0), socket=FakeSocket(room=400))
    await world.publish(*range(301, 591), branch_id=9)  # 1 to 290 are forgotten
    await trio.sleep(1.5)
    await world.publish(*range(591, 881), branch_id=9)  # and all events that existed when it came
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    await world.publish(881)

    assert client.heard == [1, 2, 881]
    assert GAP not in client.said


async def test_held_client_gets_a_gap_if_the_history_forgets_its_events(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:
    world = World(nursery, events=2)
    client = await world.connect()
    await world.publish(1, 2, 3)
    await client.say("x")
    assert [message.get("data") for message in client.said] == [None, 2, 3]
    assert client.said[0] == GAP


# The seam


@pytest.mark.parametrize("way", ["handshake", "message", "silent"])
async def test_client_that_joins_while_a_batch_is_delivered_gets_each_event_once(
    autojump_clock: MockClock, world: World, way: str
) -> None:
    await world.publish(1, 2)
    others = [await world.live() for _ in range(50)]
    joined: list[Client] = []

    async def join(socket: FakeSocket) -> None:
        connection = Connection(
            make_principal(),
            bounded(),
            replays=world.replays,
            resume_from=place(1) if way == "handshake" else None,
        )
        client = Client(connection, socket)
        joined.append(client)
        if way == "message":
            ask = json.dumps({"type": "resume", "last_event_id": place(1)})
            socket.client.to_gateway.send_nowait(ask)
        world.nursery.start_soon(connection.run, socket, world.hub)

    async def keep_joining() -> None:
        for _ in range(40):
            await join(FakeSocket())
            for _ in range(12):
                await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_joining)
        for n in range(3, 33, 3):
            await world.publish(n, n + 1, n + 2)  # a checkpoint after every write
    await trio.sleep(1)

    for client in others:
        assert client.heard == list(range(3, 33))
    assert len(joined) == 40
    starts = set()
    for client in joined:
        first = 2 if way != "silent" else min([*client.heard, 33])
        starts.add(first)
        assert client.heard == list(range(first, 33))
    if way == "silent":
        assert len(starts) > 3  # they did join at different moments


async def test_client_that_goes_live_while_a_batch_is_delivered_gets_it_once(
    autojump_clock: MockClock, world: World
) -> None:
    others = [await world.live() for _ in range(10)]
    held = [await world.connect() for _ in range(10)]

    async def decide() -> None:
        for client in held:
            client.socket.client.to_gateway.send_nowait("x")
            await trio.lowlevel.checkpoint()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(decide)
        for n in range(1, 8):
            await world.publish(n)
    await wait_all_tasks_blocked()

    for client in [*others, *held]:
        assert client.heard == list(range(1, 8))


async def test_clients_not_reached_by_a_cancelled_delivery_get_a_gap(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
) -> None:
    world = World(nursery)
    scope = trio.CancelScope()
    reached = 0

    class Counting(FakeSocket):
        def try_write(self, data: bytes | memoryview) -> int:
            nonlocal reached
            reached += 1
            if reached == 3:
                scope.cancel()
            return super().try_write(data)

    clients = [await world.live(socket=Counting()) for _ in range(9)]
    held = await world.connect()
    assert reached == 0
    with scope:
        await world.publish(1, 2)
    assert scope.cancelled_caught
    await held.say("x")
    await world.publish(3)

    received = [[message.get("data", message["type"]) for message in c.said] for c in clients]
    assert received.count([1, 2, 3]) == 3
    assert received.count(["gap", 3]) == 6
    assert held.heard == [1, 2, 3]  # from the history, whatever became of the delivery
    assert GAP not in held.said


async def test_cancelled_delivery_of_events_that_are_not_durable_causes_no_gap(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    diner = make_principal(Endpoint.DINER, session=456)
    clients = [await world.live(principal=diner) for _ in range(3)]
    with trio.CancelScope() as scope:
        scope.cancel()
        await world.publish(1, 2, stream=None, type="CART_SYNC", session_id=456)
    assert scope.cancelled_caught
    assert sum(client.heard == [1, 2] for client in clients) == 1
    assert all(GAP not in client.said for client in clients)


async def test_cancelled_delivery_of_a_pubsub_copy_causes_a_gap_because_the_stream_copy_is_dropped(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery)
    clients = [await world.live() for _ in range(3)]
    with trio.CancelScope() as scope:
        scope.cancel()
        await world.publish(1, stream=None)
    await world.publish(1)
    received = [[message.get("data", message["type"]) for message in c.said] for c in clients]
    assert sorted(received, key=str) == [["gap"], ["gap"], [1]]


# Copies


async def test_pubsub_copy_before_the_stream_entry_is_delivered_once_and_is_in_the_history(
    autojump_clock: MockClock,
    world: World,
) -> None:
    client = await world.live()
    await world.publish(1, stream=None)
    await world.publish(1)
    await world.publish(2)
    assert client.heard == [1, 2]
    assert "event_id" not in client.said[0]

    assert (await world.connect(place(0))).heard == [1, 2]


async def test_pubsub_copy_after_the_stream_entry_is_dropped(
    autojump_clock: MockClock, world: World
) -> None:
    live, held = await world.live(), await world.connect()
    await world.publish(1)
    await world.publish(1, stream=None)
    await held.say("x")
    assert live.heard == held.heard == [1]
    assert live.said[0]["event_id"] == place(1)


@pytest.mark.parametrize("resume_from", [None, "", "0-0-aaaa"])
async def test_held_client_that_received_the_pubsub_copy_does_not_get_the_stream_entry(
    autojump_clock: MockClock, world: World, resume_from: str | None
) -> None:
    client = await world.connect(resume_from, socket=FakeSocket(room=0))
    await world.publish(1, stream=None)
    await world.publish(1)
    client.socket.read(math.inf)
    await trio.sleep(1)
    await world.publish(2)
    assert client.heard == [1, 2]


@pytest.mark.parametrize("batch", [[1], [1, 2]])
@pytest.mark.parametrize("state", ["resuming", "live"])
async def test_client_that_joined_between_the_pubsub_copy_and_the_stream_entry_gets_the_entry(
    autojump_clock: MockClock, world: World, state: str, batch: list[int]
) -> None:
    """It was away when the first copy was delivered, and the second is a durable event."""
    await world.publish(0)
    before = await world.live()
    await world.publish(1, stream=None)
    client = await world.connect(
        place(0), socket=FakeSocket(room=0 if state == "resuming" else 999)
    )
    await world.publish(*batch)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    assert client.heard == batch
    assert before.heard == batch


async def test_repeated_id_in_the_stream_is_one_event_live_and_in_a_replay(
    autojump_clock: MockClock, world: World
) -> None:
    """A publisher whose answer was lost publishes again."""
    live = await world.live()
    await world.publish(1, id="a")
    await world.publish(2, id="a")
    await world.publish(3, id="b")
    assert live.heard == [1, 3]
    assert (await world.connect(place(0))).heard == [1, 3]
    assert (await world.connect(place(1))).heard == [3]
    assert (await world.connect(place(2))).heard == [3]


# Other audiences, in the middle of a replay


async def test_events_of_an_audience_left_during_a_replay_are_not_sent_any_more(
    autojump_clock: MockClock,
    world: World,
) -> None:
    for n in range(1, 1001, 2):
        await world.publish(n, branch_id=1)
        await world.publish(n + 1, branch_id=2)
    client = await world.connect(
        place(0), principal=make_principal(branches=[1, 2]), socket=FakeSocket(room=1000)
    )
    world.hub.move(client.connection, make_principal(branches=[1]))
    before = len(client.heard)
    await world.publish(1001, branch_id=2)
    await world.publish(1002, branch_id=1)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    await world.publish(1003, branch_id=2)
    await world.publish(1004, branch_id=1)

    assert before < 20
    assert [n for n in client.heard if n % 2] == list(range(1, 1000, 2))
    # Of the other branch only the frames that had begun were sent.
    other = [n for n in client.heard if not n % 2]
    assert other == [*range(2, before + 2, 2), 1002, 1004]


async def test_events_of_an_audience_joined_during_a_replay_are_sent_from_then_on(
    autojump_clock: MockClock,
    world: World,
) -> None:
    await world.publish(*range(1, 1001), entity="x" * 50)
    client = await world.connect(place(0), socket=FakeSocket(room=1000))
    world.hub.move(client.connection, make_principal(branches=[1, 2]))
    await world.publish(1001, branch_id=2)
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()
    await world.publish(1002, branch_id=2)
    assert client.heard == list(range(1, 1003))


async def test_replay_uses_the_present_authorisation(
    autojump_clock: MockClock, world: World
) -> None:
    """It was a waiter of two branches when it left."""
    await world.publish(1, branch_id=1)
    await world.publish(2, branch_id=2)
    client = await world.connect(place(0), principal=make_principal(branches=[2]))
    assert client.heard == [2]


# Endings


@pytest.mark.parametrize("ending", ["leaves", "is closed", "is aborted"])
@pytest.mark.parametrize("state", ["held", "waiting", "replaying", "late"])
async def test_connection_that_ends_before_it_is_live_leaves_nothing_behind(
    autojump_clock: MockClock, world: World, state: str, ending: str
) -> None:
    before = len(world.nursery.child_tasks)
    await world.publish(*range(1, 1000))
    socket = FakeSocket(room=100 if state in ("replaying", "late") else math.inf)
    resume_from = {"waiting": place(5000), "replaying": place(0)}.get(state)
    client = await world.connect(resume_from, socket=socket)
    if state == "late":
        await world.publish(*range(1000, 2000))
        await trio.sleep(UNDECIDED)
    assert client.connection in world.hub.held
    if ending == "leaves":
        await client.leave()
    elif ending == "is closed":
        client.connection.close(Close.AUTH_FAILED, "revoked")
    else:
        client.connection.abort()
    await trio.sleep(5)
    await world.publish(5000)
    await trio.sleep(5)

    assert not world.hub.held
    assert not world.hub.connections
    assert not world.hub.leaving
    assert not world.replays._undecided
    assert len(world.nursery.child_tasks) == before


async def test_connection_that_leaves_when_its_position_is_read_leaves_nothing_behind(
    autojump_clock: MockClock,
    world: World,
) -> None:
    for n in range(1, 40):  # Trio runs the tasks that are ready in random order
        client = await world.connect(place(n))
        await client.socket.client.leave()
        world.history.extent.advance(A, at(n))
        await wait_all_tasks_blocked()
        assert not world.hub.held


async def test_rate_limited_client_is_closed_during_its_replay(
    autojump_clock: MockClock, world: World
) -> None:
    await world.publish(*range(1, 1000))
    client = await world.connect(place(0), socket=FakeSocket(room=100))
    for _ in range(21):
        client.socket.client.to_gateway.send_nowait("x")
    await wait_all_tasks_blocked()
    assert client.connection.code == Close.RATE_LIMITED
    assert not world.hub.held


async def test_outcomes_are_counted(autojump_clock: MockClock, world: World) -> None:
    await world.publish(1, 2, 3)
    for last_event_id in (place(1), "", "nonsense"):
        await world.connect(last_event_id)
    assert world.replays.resumes == {"recovered": 2, "not_recovered": 1}
    assert world.replays.feeding.replayed == 2
