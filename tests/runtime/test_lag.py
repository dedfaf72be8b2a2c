"""A lag: a client that reads slowly gets durable events from the history, and is not closed."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.resume_world import GAP, A, Client, World, at, bounded, place
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.close_codes import Close
from trio_gateway.core.messages import Message
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.resume_state import Phase
from trio_gateway.runtime.socket import Ping
from trio_gateway.testing import FakeSocket, make_event, make_principal

DINER = make_principal(Endpoint.DINER, session=456)
SMALL = bounded(outbox_messages=10, write_timeout=math.inf)


@pytest.fixture
async def world(nursery: trio.Nursery) -> World:
    return World(nursery)


async def diner(world: World, limits: ConnectionLimits = SMALL, room: float = 0) -> Client:
    return await world.live(principal=DINER, terms=limits, socket=FakeSocket(room=room))


async def publish(world: World, *numbers: int, **keys: Any) -> None:
    await world.publish(*numbers, **{"session_id": 456} | keys)


async def read_all(client: Client) -> None:
    client.socket.read(math.inf)
    await wait_all_tasks_blocked()


async def test_client_over_the_bound_lags_and_gets_everything_in_order(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await publish(world, *range(1, 8))
    assert not world.hub.lagging
    await publish(world, *range(8, 15))  # this batch is put whole
    await publish(world, *range(15, 500))
    assert client.connection.waiting_frames == 14
    assert world.hub.lagging == {client.connection}

    await read_all(client)
    await publish(world, 500)

    assert client.heard == list(range(1, 501))
    assert client.connection.resume_state.phase is Phase.LIVE
    assert (world.replays.feeding.lags, world.hub.lagging) == (1, set())
    assert GAP not in client.said


async def test_events_that_are_not_durable_are_skipped_and_one_gap_follows(
    autojump_clock: MockClock, world: World
) -> None:
    client, other = await diner(world), await diner(world, room=math.inf)
    await publish(world, *range(1, 21))
    await publish(world, 21, type="CART_SYNC")
    await publish(world, 22)
    await publish(world, 23, stream=None)
    await world.dispatch.deliver([
        make_event("CART_SYNC", session_id=456, data=24),
        make_event(session_id=456, data=25, stream=A, position=at(25)),
    ])  # fmt: skip
    await read_all(client)
    await publish(world, 26, type="CART_SYNC")

    assert other.heard == list(range(1, 27))
    assert client.heard == [*range(1, 21), 22, 25, 26]
    assert client.said[-2:] == [GAP, client.said[-1]]
    assert client.said.count(GAP) == 1


async def test_each_lag_that_skips_an_event_ends_with_a_gap_and_no_other_does(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    for n, skips in enumerate([True, False, True]):
        await publish(world, *range(100 * n + 1, 100 * n + 50))
        if skips:
            await publish(world, 100 * n + 50, type="CART_SYNC")
        client.socket.read(1_000_000)
        await wait_all_tasks_blocked()
        client.socket.room = 0

    assert client.said.count(GAP) == 2
    assert world.replays.feeding.lags == 3


async def test_client_without_durable_events_gets_just_the_gap(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, begun=False)  # there is no stream
    client = await diner(world)
    for n in range(1, 30):
        await publish(world, n, type="CART_SYNC")
    await read_all(client)

    assert client.heard == list(range(1, 12))
    assert client.said[-1] == GAP


async def test_lagging_client_costs_a_cursor_and_one_frame_of_the_history(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await publish(world, *range(1, 2001), entity="x" * 500)
    await publish(world, *range(2001, 3001), entity="x" * 500)
    client.socket.read(client.connection.waiting_bytes)  # what waited when its lag began
    await wait_all_tasks_blocked()
    history = world.history.missed({A: at(0)}, client.connection.audiences)
    frames = {id(stored.frame) for stored in history}
    for _ in range(20):
        client.socket.read(30_000)
        await wait_all_tasks_blocked()
        outbox = client.connection._outbox
        assert outbox is not None
        assert [id(data) in frames for data, _ in outbox._chunks] == [True]

    assert client.connection.resume_state.phase is Phase.LAGGING


async def test_lagging_client_is_answered(autojump_clock: MockClock, world: World) -> None:
    client = await diner(world)
    await publish(world, *range(1, 100))
    await client.say("ping")
    await client.say(Ping(b"there?"))
    await read_all(client)

    assert client.heard == list(range(1, 100))
    assert {"type": "pong"} in client.said
    assert client.socket.pongs == [b"there?"]


@pytest.mark.parametrize("lags", [True, False])
async def test_answers_that_wait_unread_are_bounded(
    autojump_clock: MockClock, world: World, lags: bool
) -> None:
    limits = bounded(outbox_bytes=5000, write_timeout=math.inf, rate_limit=10**9)
    client = await diner(world, limits)
    if lags:
        await publish(world, *range(1, 100))
    pings = 0
    while not client.connection.ending:
        await client.say("ping")
        pings += 1

    assert client.connection.code == Close.SLOW_CONSUMER
    assert client.connection.close_reason == "too slow: outbox is full"
    assert 5000 / 100 < pings < 5000 / 64 + 2


async def test_pings_of_a_slow_client_that_reads_do_not_close_it(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world, bounded(outbox_bytes=50_000, write_timeout=math.inf))
    last = 0
    for _ in range(500):
        last += 1
        await publish(world, last, entity="x" * 1000)
        await trio.sleep(25)
        await client.say("ping")
        client.socket.read(900)  # less than is published
        await wait_all_tasks_blocked()
    assert client.connection.resume_state.phase is Phase.LAGGING
    await read_all(client)

    assert client.heard == list(range(1, last + 1))
    assert client.said.count({"type": "pong"}) == 500


async def test_client_that_reads_nothing_is_closed_after_the_write_timeout(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world, bounded(outbox_messages=10, write_timeout=10))
    await publish(world, *range(1, 100))
    await trio.sleep(9.9)
    assert not client.connection.ending
    await trio.sleep(0.2)

    assert client.connection.code == Close.SLOW_CONSUMER
    assert client.connection.close_reason == "too slow: no byte accepted"
    assert not world.hub.lagging


async def test_client_that_the_history_moves_past_is_closed_and_resumes(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, events=300)
    client = await diner(world)
    await publish(world, *range(1, 101))
    await publish(world, *range(101, 1001))
    await read_all(client)

    assert client.heard == list(range(1, 101))
    assert client.socket.closed is Close.SLOW_CONSUMER
    assert client.socket.reason == "too slow: the history has moved past it"
    assert not world.hub.lagging


async def test_history_that_moves_on_by_events_of_others_closes_no_client(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    world = World(nursery, events=300)
    client = await diner(world)
    await publish(world, *range(1, 101))
    assert client.connection.resume_state.phase is Phase.LAGGING
    for n in range(1, 5):
        await world.publish(*range(200 * n, 200 * n + 200), branch_id=9)
        await trio.sleep(1.5)
    await publish(world, 1000)  # for which it waits from now on
    for n in range(6):
        await world.publish(*range(1001 + 40 * n, 1041 + 40 * n), branch_id=9)
        await trio.sleep(1.5)
    await read_all(client)

    assert client.heard == [*range(1, 101), 1000]
    assert not client.connection.ending


async def test_lagging_client_continues_after_a_gap_in_the_stream(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await publish(world, *range(1, 21))
    await publish(world, *range(21, 41))
    world.history.restart(A, since=at(50), end=at(50))
    world.replays.tell_of_gap(A)
    await publish(world, 51, 52)
    await read_all(client)

    assert client.heard == [*range(1, 21), 51, 52]
    assert client.said[20] == GAP
    assert client.said.count(GAP) == 1


async def test_client_that_lags_while_held_gets_all_since_it_joined(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.connect(principal=DINER, terms=SMALL, socket=FakeSocket(room=0))
    for n in range(1, 25):
        await publish(world, n, type="ROUND_READY" if n % 2 else "CART_SYNC")
    assert client.connection.resume_state.phase is Phase.LAGGING
    await client.say("x")
    await read_all(client)

    assert [n for n in client.heard if n % 2] == list(range(1, 25, 2))
    assert client.said[-1] == GAP


async def test_replay_at_the_bound_is_slowed(autojump_clock: MockClock, world: World) -> None:
    await publish(world, *range(1, 501))
    client = await world.connect(
        place(0), principal=DINER, terms=SMALL, socket=FakeSocket(room=500)
    )
    for n in range(501, 530):
        await publish(world, n, type="CART_SYNC")
    assert client.connection.resume_state.phase is Phase.LAGGING
    await read_all(client)

    assert client.resumed[0]["count"] == 500
    assert [n for n in client.heard if n <= 500] == list(range(1, 501))
    assert client.said[-1] == GAP


async def test_copy_that_was_skipped_in_a_lag_comes_from_the_stream(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    await publish(world, 1, stream=None)  # its copy is sent
    await publish(world, *range(2, 21))
    await publish(world, 21, stream=None)  # its copy is skipped
    await publish(world, 22)
    await world.dispatch.deliver([
        make_event(data=n, session_id=456, channel="stream", stream=A, position=at(100 + n))
        for n in (1, 21)
    ])  # fmt: skip
    await read_all(client)

    assert client.heard == [*range(1, 21), 22, 21]
    assert client.said[-1] == GAP


async def test_answer_that_overflows_while_a_batch_is_written_loses_nothing(
    autojump_clock: MockClock, world: World, nursery: trio.Nursery
) -> None:
    """The batch is in the history, and its turn in this outbox comes later."""
    for late in range(6):
        first = [await diner(world, bounded()) for _ in range(5)]
        client = await diner(world, bounded(outbox_bytes=2000, write_timeout=math.inf))
        await publish(world, 1000 * late + 1, entity="x" * 1500)
        nursery.start_soon(publish, world, 1000 * late + 2)
        for _ in range(late):
            await trio.lowlevel.checkpoint()
        client.connection.send(b'"' + b"x" * 600 + b'"')  # a turn of dispatch waits at each write
        await wait_all_tasks_blocked()
        await publish(world, 1000 * late + 3)
        await read_all(client)
        assert client.heard == [1000 * late + n for n in (1, 2, 3)]
        for each in [*first, client]:
            await each.leave()


async def test_lag_costs_one_task_that_ends_with_it(
    autojump_clock: MockClock, world: World
) -> None:
    clients = [await diner(world, room=10**6) for _ in range(20)]
    before = trio.lowlevel.current_statistics().tasks_living
    for client in clients:
        client.socket.room = 0
    await publish(world, *range(1, 100))
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before + len(clients)
    for client in clients[:10]:
        await read_all(client)
    for client in clients[10:]:
        await client.leave()
        client.socket.read(math.inf)
    await trio.sleep(3)

    assert trio.lowlevel.current_statistics().tasks_living == before - len(clients[10:])


async def test_late_resume_of_a_client_that_begins_to_lag_doubles_nothing(
    autojump_clock: MockClock, world: World
) -> None:
    client = await world.connect(principal=DINER, terms=SMALL, socket=FakeSocket(room=10**6))
    await trio.sleep(100)
    client.socket.room = 0
    await client.ask(place(10_000))  # for which the process waits, up to two seconds
    for n in range(1, 40):
        await publish(world, n)
    await trio.sleep(3)
    await read_all(client)
    await publish(world, 40)

    assert client.heard == list(range(1, 41))
    assert [answer["recovered"] for answer in client.resumed] == [False]


Action = tuple[str, int]
_ACTIONS = st.lists(
    st.one_of(
        st.tuples(st.just("durable"), st.integers(1, 30)),
        st.tuples(st.just("other"), st.integers(1, 12)),
        st.tuples(st.just("mixed"), st.integers(2, 12)),
        st.tuples(st.just("read"), st.sampled_from([1, 50, 500, 5000, 10**6])),
        st.tuples(st.sampled_from(["ping", "gap", "wait"]), st.just(0)),
    ),
    max_size=40,
)


@given(_ACTIONS, st.sampled_from([1, 5, 30]), st.sampled_from([math.inf, 2000]))
def test_any_slow_client_gets_durable_events_once_in_order_and_a_gap_for_what_it_skips(
    actions: Sequence[Action], messages: int, size: float
) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            world = World(nursery)
            limits = bounded(
                outbox_messages=messages,
                outbox_bytes=size,
                write_timeout=math.inf,
                rate_limit=10**9,
            )  # fmt: skip
            client = await diner(world, limits)
            sent: list[tuple[int, bool]] = []  # since the last gap in the stream
            pings = n = gaps = 0
            for what, much in actions:
                match what:
                    case "durable" | "other" | "mixed":
                        batch = []
                        for i in range(much):
                            n += 1
                            durable = what == "durable" or (what == "mixed" and i % 2 == 0)
                            sent.append((n, durable))
                            batch.append(
                                make_event(
                                    "ROUND_READY" if durable else "CART_SYNC",
                                    session_id=456,
                                    data=n,
                                    stream=A if durable else None,
                                    position=at(n) if durable else None,
                                )
                            )
                        await world.dispatch.deliver(batch)
                    case "read":
                        client.socket.read(much)
                    case "ping":
                        await client.socket.client.send("ping")
                        pings += 1
                    case "gap":
                        n += 1
                        gaps += 1
                        world.history.restart(A, since=at(n), end=at(n))
                        world.replays.tell_of_gap(A)
                        sent.clear()
                    case "wait":
                        await trio.sleep(1.5)
                await wait_all_tasks_blocked()
            assert size < math.inf or not client.connection.ending
            if not client.connection.ending:
                await read_all(client)
                check(client, sent, pings, gaps, world.replays.feeding.lags)
            nursery.cancel_scope.cancel()

    trio.run(main, clock=MockClock(autojump_threshold=0))


def check(
    client: Client, sent: Sequence[tuple[int, bool]], pings: int, gaps: int, lags: int
) -> None:
    heard, said = client.heard, client.said
    assert len(heard) == len(set(heard))
    since = sent[0][0] if sent else 10**9
    durable = [n for n, is_durable in sent if is_durable]
    assert [n for n in heard if n in set(durable)] == durable
    skipped = {n for n, is_durable in sent if not is_durable} - set(heard)
    assert said.count(GAP) <= gaps + lags
    assert said.count({"type": "pong"}) == pings
    if skipped:
        # The gap comes behind all that was sent before it was skipped.
        last_gap = max(i for i, message in enumerate(said) if message == GAP)
        before = [m["data"] for m in said[:last_gap] if m.get("data", 0) >= since]
        assert all(n in before or n in skipped for n, _ in sent if n < max(skipped))
    assert client.connection.resume_state.phase is Phase.LIVE


async def test_clients_at_the_same_place_share_what_is_read_for_them(
    autojump_clock: MockClock, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = [await diner(world) for _ in range(20)]
    kitchen = await world.live(
        principal=make_principal(Endpoint.KITCHEN), terms=SMALL, socket=FakeSocket(room=0)
    )
    await publish(world, *range(1, 21))
    for first in range(21, 4021, 200):
        await publish(world, *range(first, first + 199))
        await world.publish(first + 199, session_id=457)  # for the kitchen, not for these diners
    reads, following = 0, world.history.following

    def counted(*arguments: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return following(*arguments, **options)

    monkeypatch.setattr(world.history, "following", counted)
    for client in [*clients, kitchen]:
        client.socket.read(math.inf)
    await wait_all_tasks_blocked()

    mine = [n for n in range(1, 4021) if n < 21 or (n - 20) % 200]
    assert all(client.heard == mine for client in clients)
    assert kitchen.heard == list(range(1, 4021))
    assert reads < 100  # of 460 without
    await trio.sleep(2)
    assert not world.replays.feeding._shared


async def test_lagging_client_is_fed_while_a_message_is_answered(
    autojump_clock: MockClock, world: World
) -> None:
    async def answer(connection: Connection, message: Message) -> None:
        await trio.sleep(10)

    client = await diner(world)
    client.connection._answer = answer
    await client.say("refresh_sectors")
    await publish(world, *range(1, 21))
    await publish(world, *range(21, 500))
    await read_all(client)

    assert trio.current_time() < 1
    assert client.heard == list(range(1, 500))


async def test_last_slow_client_that_leaves_frees_what_was_read_for_it(
    autojump_clock: MockClock, world: World
) -> None:
    client = await diner(world)
    for first in range(1, 3001, 200):
        await publish(world, *range(first, first + 200))
    client.socket.read(200_000)
    await wait_all_tasks_blocked()
    assert world.replays.feeding._shared
    await client.leave()
    client.socket.read(math.inf)
    await trio.sleep(3)

    assert not world.replays.feeding._shared
