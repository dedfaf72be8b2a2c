"""Reach: when Redis is asked whether a step is to be taken."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.event_ids import Position, Stream, tag
from trio_gateway.core.events import Event, parse_event
from trio_gateway.core.receipts import Place
from trio_gateway.core.routes_file import read_routes
from trio_gateway.runtime.reach import GRACE, SETTLE, Due, Reach
from trio_gateway.testing import make_event

ROUTES = read_routes(
    '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 10\n'
    'then = [{to = "floor", within = 5}]\n'
)
STREAM = tag("events:critical")
BEGIN = 1_790_000_000


class Asked:
    """Answers, and notes when it was asked about what."""

    def __init__(self) -> None:
        self.calls: list[tuple[float, list[tuple[int, int]]]] = []
        self.left: Sequence[int] | None = [0]
        self.is_away = False

    async def answers(self, place: Place) -> bool:
        return not self.is_away

    async def __call__(self, dues: Sequence[Due]) -> Sequence[int] | None:
        steps = [(due.place.position[0] - BEGIN * 1000, due.number) for due in dues]
        self.calls.append((round(trio.current_time(), 2), steps))
        return None if self.left is None else list(self.left) * len(dues)


def clock() -> float:
    return BEGIN + trio.current_time()


def watching(ttl: float = 3600.0) -> Reach:
    return Reach(ROUTES, clock, ttl)


@asynccontextmanager
async def asking(
    reach: Reach | None = None, answers: Callable[[Place], Awaitable[bool]] | None = None
) -> AsyncIterator[tuple[Reach, Asked]]:
    """Ask while the block runs, a Redis that answers unless ``answers`` says otherwise."""
    reach, asked = watching() if reach is None else reach, Asked()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reach.run, asked, answers or asked.answers)
        yield reach, asked
        nursery.cancel_scope.cancel()


def event(
    type_: str = "SERVICE_CALL_CREATED",
    after: float = 0.0,
    payload: bytes = b"",
    stream: Stream = STREAM,
) -> Event:
    return parse_event(
        payload or make_event(type_, sector_id=5).payload,
        channel="",
        received_at=0.0,
        stream=stream,
        position=Position((int((BEGIN + after) * 1000), 0)),
        durable_types=ROUTES.durable_types,
    )


async def test_redis_is_asked_a_moment_after_each_deadline(autojump_clock: MockClock) -> None:
    async with asking() as (reach, asked):
        reach.note([event(after=-1), event("ROUND_READY"), event()])
        await trio.sleep(60)
        assert asked.calls == [(9 + GRACE, [(-1000, 0)]), (10 + GRACE, [(0, 0)])]
        assert not len(reach)


async def test_deadlines_that_are_over_right_after_a_question_share_the_next_one(
    autojump_clock: MockClock,
) -> None:
    async with asking() as (reach, asked):
        reach.note([event(after=after) for after in (-1, -0.95, -0.83, -0.79)])
        await trio.sleep(60)
        assert asked.calls == [
            (9 + GRACE, [(-1000, 0)]),
            (9.2 + GRACE, [(-950, 0), (-830, 0)]),
            (9.4 + GRACE, [(-790, 0)]),
        ]
        assert not len(reach)


async def test_deadlines_that_no_other_process_watches_are_asked_about_earlier(
    autojump_clock: MockClock,
) -> None:
    """If this one dies right before that, another one has to take over first."""
    async with asking(Reach(ROUTES, clock, 3600, is_alone=True)) as (reach, asked):
        reach.note([event(after=after) for after in (-1, -0.95, -0.93, -0.89)])
        await trio.sleep(60)
        assert asked.calls == [
            (9 + GRACE, [(-1000, 0)]),
            (9.1 + GRACE, [(-950, 0), (-930, 0)]),
            (9.2 + GRACE, [(-890, 0)]),
        ]


async def test_earlier_deadline_that_comes_later_is_asked_about_first(
    autojump_clock: MockClock,
) -> None:
    async with asking() as (reach, asked):
        reach.note([event()])
        await wait_all_tasks_blocked()
        reach.note([event(after=-100)])  # of the past: a process has just begun to read
        await trio.sleep(60)
        assert [steps for _, steps in asked.calls] == [[(-100_000, 0)], [(0, 0)]]


async def test_nothing_is_asked_until_redis_has_been_back_for_a_moment(
    autojump_clock: MockClock,
) -> None:
    """What clients confirmed while it was away must be written first."""
    async with asking() as (reach, asked):
        asked.is_away = True
        reach.note([event()])
        await trio.sleep(20.2)
        assert asked.calls == []
        asked.is_away = False
        await trio.sleep(60)
        assert asked.calls == [(20 + GRACE + SETTLE, [(0, 0)])]


async def test_answer_that_waited_for_the_end_of_an_outage_is_one(
    autojump_clock: MockClock,
) -> None:

    async def answers(place: Place) -> bool:
        await trio.sleep(0.9)
        return True

    async with asking(answers=answers) as (reach, asked):
        reach.note([event()])
        await trio.sleep(60)
        assert [at for at, _ in asked.calls] == [pytest.approx(10 + GRACE + 0.9 + SETTLE + 0.9)]


async def test_while_much_is_asked_redis_is_not_asked_first_whether_it_answers(
    autojump_clock: MockClock,
) -> None:
    questions: list[float] = []

    async def answers(place: Place) -> bool:
        questions.append(trio.current_time())
        return True

    async with asking(answers=answers) as (reach, asked):
        for _ in range(100):
            reach.note([event(after=trio.current_time())])
            await trio.sleep(0.05)
        await trio.sleep(60)
        assert questions == [pytest.approx(10 + GRACE)]
        assert 20 <= len(asked.calls) <= 26


async def test_nothing_is_asked_while_the_stream_is_not_read_and_a_moment_after_that(
    autojump_clock: MockClock,
) -> None:
    """A new primary may answer at once: what clients confirmed before is written first."""
    reach, asked = Reach(ROUTES, clock, 3600, by_stream=True), Asked()
    other = tag("events:other")
    reach.back(STREAM)  # read for the first time
    async with trio.open_nursery() as nursery:
        nursery.start_soon(reach.run, asked, asked.answers)
        reach.note([event(), event(stream=other)])
        await trio.sleep(9)
        reach.lost(STREAM)
        await trio.sleep(3)
        reach.back(STREAM)
        await trio.sleep(60)
        assert [at for at, _ in asked.calls] == [10 + GRACE, 12 + SETTLE]
        nursery.cancel_scope.cancel()


async def test_what_redis_did_not_answer_is_asked_again_after_that_moment(
    autojump_clock: MockClock,
) -> None:
    async with asking() as (reach, asked):
        asked.left = None
        reach.note([event()])
        await trio.sleep(11)
        asked.left = [0]
        await trio.sleep(60)
        assert [at for at, _ in asked.calls] == [10 + GRACE, 11 + GRACE + SETTLE]


async def test_what_another_server_may_not_know_is_asked_again(autojump_clock: MockClock) -> None:
    async with asking() as (reach, asked):
        reach.note([event(after=-60), event()])
        await trio.sleep(63)
        assert [at for at, _ in asked.calls] == [0.0, 10 + GRACE]
        reach.ask_again()
        await trio.sleep(60)
        assert asked.calls[2:] == [(63 + SETTLE, [(0, 0)])]


async def test_copy_of_an_event_is_not_watched(autojump_clock: MockClock) -> None:
    async with asking() as (reach, asked):
        reach.note([event(after=-1), event()])
        reach.drop(event())
        await trio.sleep(60)
        assert [steps for _, steps in asked.calls] == [[(-1000, 0)]]


async def test_server_that_does_not_answer_delays_its_own_streams_only(
    autojump_clock: MockClock,
) -> None:
    other = tag("events:other")

    async def answers(place: Place) -> bool:
        return place.stream == STREAM

    by_server = Reach(ROUTES, clock, 3600, by_stream=True)
    async with asking(by_server, answers) as (reach, asked):
        reach.note([event(stream=other), event(after=0.01)])
        await trio.sleep(60)
        assert asked.calls == [(10 + GRACE, [(10, 0)])]


@pytest.mark.parametrize("change", [-3.0, -3600.0, 3600.0])
async def test_clock_of_the_process_does_not_matter(
    autojump_clock: MockClock, change: float
) -> None:
    """It is behind that of Redis from the start, or is set after the event has come."""
    offset = min(0.0, max(change, -3.0))
    async with asking(Reach(ROUTES, lambda: clock() + offset, 3600)) as (reach, asked):
        reach.note([event()])
        offset = change
        await trio.sleep(60)
        assert asked.calls == [(10 + GRACE, [(0, 0)])]


async def test_clock_that_is_ahead_of_redis_asks_again_when_it_is_time(
    autojump_clock: MockClock,
) -> None:
    async with asking() as (reach, asked):
        asked.left = [2500]
        reach.note([event()])
        await trio.sleep(11)
        asked.left = [0]
        await trio.sleep(60)
        assert [at for at, _ in asked.calls] == [10 + GRACE, 12.5 + GRACE]


async def test_next_step_has_its_own_time_from_its_own_entry(autojump_clock: MockClock) -> None:
    payload = (
        b'{"type":"EVENT_ESCALATED","tenant_id":1,"branch_id":1,"event_id":"%d000-0-%s",'
        b'"of":"SERVICE_CALL_CREATED","to":"floor","unless":[],"step":1,"event":{}}'
        % (BEGIN, STREAM.encode())
    )
    async with asking() as (reach, asked):
        await trio.sleep(12)
        reach.note([event(after=12, payload=payload)])
        await trio.sleep(60)
        assert asked.calls == [(17 + GRACE, [(0, 1)])]


async def test_event_of_which_nothing_is_known_any_more_is_not_watched(
    autojump_clock: MockClock,
) -> None:
    reach = watching(ttl=100)
    reach.note([event(after=-120)])
    assert not len(reach)
    reach.note([event(after=-110)])  # its steps take 15 s
    assert len(reach) == 1
