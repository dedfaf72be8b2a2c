"""The streams source: no entry is delivered twice."""

import pytest
import trio
from trio.testing import MockClock

from tests.support.redis_links import link_to
from trio_gateway.broker.stream_cursor import StreamCursor
from trio_gateway.broker.stream_reader import COUNT, StreamReader, merge
from trio_gateway.broker.stream_replies import Info
from trio_gateway.broker.unreadable import Unreadable
from trio_gateway.core.capacity import CapacityLimits
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.routing import ROUTES
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.resume import Replays
from trio_gateway.runtime.source import Entry
from trio_gateway.runtime.stream_inlet import StreamInlet
from trio_gateway.runtime.supervision import ConnectionLost


async def test_reply_to_an_earlier_command_is_not_delivered_again() -> None:
    entry = b"*2\r\n$3\r\n1-1\r\n*2\r\n$4\r\ndata\r\n$2\r\n{}\r\n"
    news = b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n" + entry

    async def redis(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            await stream.send_all(news)

    ingest, history = Ingest(), History()
    hub = Hub(CapacityLimits(total=1, per_user=1, per_session=1))
    inlet = StreamInlet(
        ingest=ingest, queue=EventQueue(10), history=history, dispatch=Dispatch(hub, ROUTES),
        replays=Replays(history, hub), routes=ROUTES,
    )  # fmt: skip
    cursor = StreamCursor("s", tag("s"), Info())
    cursor.checked_at = trio.current_time()
    async with link_to(redis) as link:
        reader = StreamReader(
            link, inlet, {"s": cursor}, Unreadable(), ranks={}, old_streams=(), on_gap=lambda: None
        )
        await reader.read()
        assert cursor.entry_id == "1-1"
        with pytest.raises(ConnectionLost, match="earlier question"):
            await reader.read()
    assert ingest.received["stream"] == 1


OLD, NEW = StreamCursor("s", tag("s"), Info()), StreamCursor("s:{1}", tag("s:{1}"), Info())
RANKS = {OLD.stream: 0, NEW.stream: 1}


def at(*places: tuple[int, int]) -> list[Entry]:
    return [Entry(Position(place), b"") for place in places]


def test_entries_of_an_old_and_a_new_stream_are_in_the_order_of_their_times() -> None:
    news = [(OLD, at((1, 0), (4, 0))), (NEW, at((2, 0), (3, 0), (5, 0)))]
    assert merge(news, RANKS) == [
        (OLD, at((1, 0))), (NEW, at((2, 0), (3, 0))), (OLD, at((4, 0))), (NEW, at((5, 0))),
    ]  # fmt: skip


def test_entries_of_the_old_stream_are_first_within_a_millisecond() -> None:
    news = [(NEW, at((7, 0), (7, 1))), (OLD, at((7, 0), (7, 5)))]
    assert merge(news, RANKS) == [(OLD, at((7, 0), (7, 5))), (NEW, at((7, 0), (7, 1)))]


def test_what_an_entry_that_did_not_fit_may_precede_waits_for_the_next_reply() -> None:
    news = [(OLD, at((1, 0), (2, 0))), (NEW, at((1, 0), (2, 0)))]
    assert merge(news, RANKS, count=2) == [
        (OLD, at((1, 0))), (NEW, at((1, 0))), (OLD, at((2, 0))),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("replies", "times"),
    [
        ([1, 1, 1], [0, 0, 0]),  # a single event is not delayed
        ([9, 9, 9], [3, 6, 9]),
        ([5, 5, 5, 1], [0, 3, 3, 3]),  # many in several replies
        ([COUNT, COUNT, 9], [0, 0, 3]),  # it is behind
    ],
)
async def test_reads_are_paced_while_many_entries_come(
    autojump_clock: MockClock, replies: list[int], times: list[int]
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await trio.sleep_forever()

    found = []
    async with link_to(redis) as link:
        hub, history = Hub(), History()
        inlet = StreamInlet(
            ingest=Ingest(), queue=EventQueue(10), history=history, dispatch=Dispatch(hub, ROUTES),
            replays=Replays(history, hub), routes=ROUTES,
        )  # fmt: skip
        reader = StreamReader(
            link, inlet, {}, Unreadable(), ranks={}, old_streams=(), on_gap=lambda: None
        )
        started = trio.current_time()
        for count in replies:
            await reader._pace([(OLD, at(*((1, n) for n in range(count))))])
            found.append(round((trio.current_time() - started) * 1000))
    assert found == times
