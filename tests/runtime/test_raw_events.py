"""Raw events: what is stored without being routed changes nothing that a client gets.

The oracle is the same gateway in which every event counts as one that concerns a connection, so
that none is raw.
"""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.audiences import (
    Endpoint,
    Principal,
    SessionId,
    TenantId,
    audiences_of,
    diners,
)
from trio_gateway.core.event_ids import START, Position, Stream, event_id
from trio_gateway.core.events import InvalidEvent, parse_event
from trio_gateway.core.routing import ROUTES
from trio_gateway.runtime.batches import Batches
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.past_routing import PastRouting
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.raw_events import RawEvents, StoredEvent
from trio_gateway.runtime.resume import Replays
from trio_gateway.runtime.source import Entry
from trio_gateway.runtime.stream_inlet import StreamInlet
from trio_gateway.testing import FakeSocket, make_event, make_payload, make_principal

A, B = Stream("aaaa"), Stream("bbbb")
LIMITS = ConnectionLimits(
    stale_after=math.inf, receive_timeout=math.inf, write_timeout=math.inf, rate_limit=10**6
)
PRINCIPALS = (
    make_principal(Endpoint.WAITER, sectors=[5]),
    make_principal(Endpoint.WAITER, branches=[1, 2]),
    make_principal(Endpoint.KITCHEN, branches=[2]),
    make_principal(Endpoint.ADMIN, branches=[1, 2]),
    make_principal(Endpoint.DINER, session=456),
    make_principal(Endpoint.ADMIN, tenant=2),
)
TYPES = ("ROUND_READY", "ROUND_PENDING", "ENTITY_UPDATED", "CART_SYNC", "NEW_TYPE")
CHANNELS = {"stream": A, "other stream": B, "channel": None, "other channel": None}

_keys = st.fixed_dictionaries(
    {
        "type": st.sampled_from(TYPES),
        "tenant_id": st.sampled_from([1, 1, 1, 2]),
        "branch_id": st.integers(0, 2),
        "data": st.integers(0, 3),
    },
    optional={
        "sector_id": st.sampled_from([5, 6]),
        "session_id": st.sampled_from([456, 456, 457]),
        "id": st.sampled_from(["x", "y"]),
    },
)
_what = st.one_of(
    st.tuples(st.just("publish"), st.sampled_from(list(CHANNELS)), st.lists(_keys, max_size=6)),
    st.tuples(st.just("publish"), st.sampled_from(list(CHANNELS)), st.lists(_keys, max_size=6)),
    st.tuples(st.sampled_from(["resume", "resume", "come", "leave"]), st.integers(0, 5)),
    st.tuples(st.just("move"), st.integers(0, 3), st.sets(st.integers(1, 2), min_size=1)),
    st.tuples(st.just("wait"), st.sampled_from([0.6, 3.0, 6.0])),
)


class Outcome(NamedTuple):
    """What the clients were sent, and what was counted."""

    sent: list[list[str]]
    counts: dict[str, int]
    stored: int


async def play(
    script: Sequence[Any], *, raw: bool, events: int = 1000, uncovered_to_branch: bool = False
) -> Outcome:
    routing = PastRouting(uncovered_to_branch=uncovered_to_branch)
    hub, history = Hub(), History(events=events, routing=routing)
    if not raw:
        hub.concerns = lambda event: True  # type: ignore[method-assign]
    replays = Replays(history, hub)
    dispatch = Dispatch(hub, history=history, uncovered_to_branch=uncovered_to_branch)
    pubsub, queue = EventQueue(100), EventQueue(100)
    inlet = StreamInlet(
        ingest=Ingest(), queue=queue, history=history, dispatch=dispatch, replays=replays,
        routes=ROUTES,
    )  # fmt: skip
    sockets: list[FakeSocket] = []
    here: dict[int, FakeSocket] = {}
    connections: dict[int, Connection] = {}
    last, number = {A: START, B: START}, 0
    seen: dict[int, str] = {}
    for each in (A, B):
        history.extent.begin(each, START, whole=True)
        history.extent.advance(each, START)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(replays.decide)
        for waiting in (pubsub, queue):
            nursery.start_soon(Batches(dispatch).run, waiting, 4)
        for step in script:
            match step:
                case ("publish", channel, batch):
                    entries = []
                    for keys in batch:
                        number += 1
                        event = make_event(
                            channel=channel, received_at=trio.current_time(), ts=number, **keys
                        )
                        entries.append(Entry(Position((number, 0)), event.payload))
                        if CHANNELS[channel] is None:
                            pubsub.offer(event)
                    if (stream := CHANNELS[channel]) is not None and entries:
                        last[stream] = entries[-1].position
                        await inlet.take(stream, channel, entries, lambda taken: None)
                case (("resume" | "come") as how, client) if client not in here:
                    socket = here[client] = FakeSocket()
                    sockets.append(socket)
                    connections[client] = connection = Connection(
                        PRINCIPALS[client], LIMITS, replays=replays,
                        resume_from=seen.get(client, f"{event_id(A, START)}.{event_id(B, START)}")
                        if how == "resume" else None,
                    )  # fmt: skip
                    nursery.start_soon(connection.run, socket, hub)
                case ("leave", client) if client in here:
                    await here.pop(client).client.leave()
                    place = [event_id(stream, position) for stream, position in last.items()]
                    seen[client] = ".".join(place)
                case ("move", client, branches) if client in here:
                    hub.move(connections[client], moved(PRINCIPALS[client], branches))
                case ("wait", seconds):
                    await trio.sleep(seconds)
            await wait_all_tasks_blocked()
        await trio.sleep(1)
        sent = [socket.texts for socket in sockets]
        nursery.cancel_scope.cancel()
    names = ("processed", "duplicate", "unheard", "unknown_type", "broadcasts", "deliveries")
    return Outcome(sent, {name: getattr(dispatch, name) for name in names}, len(history))


def moved(principal: Principal, branches: set[int]) -> Principal:
    found = make_principal(
        principal.endpoint, tenant=principal.tenant, branches=sorted(branches), sectors=[5]
    )
    assert found.owner == principal.owner
    return found


def run(script: Sequence[Any], **how: Any) -> Outcome:
    async def main() -> Outcome:
        return await play(script, **how)

    return trio.run(main, clock=MockClock(autojump_threshold=0))


@given(st.lists(_what, max_size=25), st.sampled_from([1000, 7]), st.booleans())
def test_clients_get_the_same_whether_events_are_stored_raw_or_not(
    script: list[Any], events: int, uncovered_to_branch: bool
) -> None:
    how = {"events": events, "uncovered_to_branch": uncovered_to_branch}
    assert run(script, raw=True, **how) == run(script, raw=False, **how)


def entries(number: int, **keys: Any) -> tuple[str, str, list[dict[str, Any]]]:
    keys = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1} | keys
    return "publish", "stream", [keys | {"data": n} for n in range(number)]


def test_client_resumes_over_raw_and_live_events() -> None:
    script = [entries(5), ("come", 3), entries(5), ("leave", 3), entries(5), ("resume", 0)]

    outcome = run(script, raw=True)

    assert outcome == run(script, raw=False)
    assert len(outcome.sent[1]) == 1 + 15


def test_copies_that_came_while_nobody_was_here_are_replayed_once() -> None:
    copies = [("publish", channel, entries(3)[2]) for channel in CHANNELS]
    script = [*copies, ("resume", 3)]

    outcome = run(script, raw=True)

    assert outcome == run(script, raw=False)
    assert len(outcome.sent[0]) == 1 + 3
    assert (outcome.counts["processed"], outcome.counts["duplicate"]) == (3, 9)


@pytest.mark.parametrize("keys", [{}, {"id": "x"}])
@pytest.mark.parametrize("second", ["channel", "other stream"])
@pytest.mark.parametrize("how", ["come", "resume"])
def test_copy_that_comes_after_the_first_client_is_no_second_event(
    how: str, second: str, keys: dict[str, Any]
) -> None:
    first = entries(1, **keys)
    script = [first, (how, 3), ("wait", 0.6), ("publish", second, first[2])]

    outcome = run(script, raw=True)

    assert outcome == run(script, raw=False)
    assert len(outcome.sent[0]) == (2 if how == "resume" else 0)


def test_session_is_resumed_in_every_branch_that_has_events_of_it() -> None:
    script = [entries(3, branch_id=2, session_id=456), entries(3, session_id=456), ("resume", 4)]

    assert len(run(script, raw=True).sent[0]) == 1 + 6


@pytest.mark.parametrize("events", [10, 1000])
def test_raw_events_are_bounded_like_all_others(events: int) -> None:
    script = [entries(30), entries(30, branch_id=2, session_id=7), entries(30, type="CART_SYNC")]

    assert run(script, raw=True, events=events).stored == min(events, 60)


@pytest.mark.parametrize("taken", [4000, 2000])
def test_cost_of_raw_events_does_not_grow_with_the_sessions_that_they_name(taken: int) -> None:
    def seconds(sessions: int) -> float:
        events = RawEvents()
        made = [
            make_event(session_id=1 + n % sessions, stream=A, position=Position((n, 1)))
            for n in range(4000)
        ]
        events.add([(event, 0) for event in made])
        (branch,) = events.branches_of(A, diners(TenantId(1), SessionId(1)))
        started = time.process_time()
        for _ in range(taken):  # for clients, and the others are forgotten
            assert events.take_newest(branch, START) is not None
        for _ in range(4000 - taken):
            events.forget_oldest(branch)
        return time.process_time() - started

    assert min(seconds(4000) for _ in range(3)) < 15 * min(seconds(1) for _ in range(3))


async def test_routing_of_raw_events_does_not_delay_other_tasks(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    history = History()
    dispatch = Dispatch(Hub(), history=history)
    history.extent.begin(A, START)
    await dispatch.deliver(
        [make_event(data=n, stream=A, position=Position((n, 1))) for n in range(1000)]
    )
    turns = 0

    async def another() -> None:
        nonlocal turns
        while True:
            await trio.lowlevel.checkpoint()
            turns += 1

    nursery.start_soon(another)
    while not turns:
        await trio.lowlevel.checkpoint()
    turns, audiences = 0, audiences_of(make_principal(Endpoint.ADMIN))
    await history.prepare({A: Position((99, 1))}, audiences)
    assert turns >= 8  # 900 in steps of a hundred
    assert [
        stored.position[0] for stored in history.missed({A: Position((989, 1))}, audiences)
    ] == [*range(990, 1000)]
    assert len(history.missed({A: START}, audiences)) == 1000


async def test_event_that_cannot_be_parsed_any_more_is_left_out(autojump_clock: MockClock) -> None:
    history = History()
    Dispatch(Hub(), history=history)  # routes what is raw

    def store(number: int, levels: int) -> bool:
        nested = make_payload(data="?").replace(b'"?"', b"[" * levels + b"]" * levels)
        position = Position((number, 0))
        try:
            event = parse_event(
                nested, channel="", received_at=0.0, stream=A, position=position,
                durable_types=ROUTES.durable_types,
            )  # fmt: skip
        except InvalidEvent:
            return False
        history.add_raw([(event, 0)], now=0.0)
        return True

    def missed_below(frames: int) -> list[StoredEvent]:
        if frames:
            return missed_below(frames - 1)
        return history.missed({A: START}, audiences_of(PRINCIPALS[3]))

    history.extent.begin(A, START, whole=True)
    assert store(1, 1)
    assert any(store(2, levels) for levels in range(sys.getrecursionlimit(), 0, -1))
    assert store(3, 1)
    with capture_logs() as logs:
        found = missed_below(20)
    assert [stored.position[0] for stored in found] == [1, 3]
    assert [entry["event"] for entry in logs] == ["event not replayed: nested too deeply"]
