"""What our own Redis connections make of links that are slow, and of replies that are none."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import hiredis
import pytest
import trio
from trio.testing import MockClock, memory_stream_pair

from trio_gateway.broker.connection import ENOUGH, RedisConnection
from trio_gateway.broker.pubsub import LIVENESS, PubSub
from trio_gateway.broker.stream_cursor import StreamCursor
from trio_gateway.broker.stream_replies import Info, read_entries, read_info, read_news, read_time
from trio_gateway.broker.streams import Streams
from trio_gateway.core.event_ids import START, tag
from trio_gateway.core.limits import DropAlarm
from trio_gateway.core.resilience import Breaker
from trio_gateway.core.routing import ROUTES
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import CapacityLimits, Hub
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.resume import Replays
from trio_gateway.runtime.stream_inlet import StreamInlet
from trio_gateway.runtime.supervision import ConnectionLost

PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"
Redis = Callable[[trio.abc.Stream], Awaitable[None]]


def make_pubsub() -> PubSub:
    queue = EventQueue(10, DropAlarm(60, 0.05, 300))
    return PubSub(RedisAddress(), [], Ingest(), queue, Breaker(5, 30))


@asynccontextmanager
async def link_to(redis: Redis) -> AsyncIterator[RedisConnection]:
    """A connection to this Redis."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(redis, theirs)
        yield RedisConnection(ours)
        nursery.cancel_scope.cancel()


def message(size: int) -> bytes:
    return b"*3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$%d\r\n%b\r\n" % (size, b"x" * size)


# Pub/Sub


async def lost_after(redis: Redis) -> float:
    """When the link to this Redis counts as lost."""
    pubsub = make_pubsub()
    pubsub._listeners[b"x"] = lambda payload: None
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="no answer to PING"):
            await pubsub._listen(link)
        return trio.current_time()


async def test_link_that_brings_a_byte_a_second_is_lost(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        for byte in message(1000):
            await trio.sleep(1)
            await stream.send_all(bytes([byte]))

    assert await lost_after(redis) == 2 * LIVENESS


async def test_link_that_falls_behind_is_lost_though_every_message_is_whole(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        while True:
            await trio.sleep(1)
            await stream.send_all(message(10))

    assert await lost_after(redis) == 2 * LIVENESS


async def test_link_that_brings_much_lives_however_late_the_answer(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        for _ in range(50):
            await trio.sleep(LIVENESS / 2)
            await stream.send_all(message(ENOUGH))
        await trio.sleep_forever()

    silence = await lost_after(redis) - 50 * LIVENESS / 2
    assert LIVENESS <= silence <= 2 * LIVENESS


async def test_link_that_answers_lives(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            await trio.sleep(LIVENESS - 0.1)
            await stream.send_all(PONG)

    async with link_to(redis) as link:
        await link.send("PING")
        with trio.move_on_after(100) as scope:
            await make_pubsub()._listen(link)
        assert scope.cancelled_caught


async def test_redis_that_is_still_loading_is_no_source_though_it_lets_us_subscribe() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"*3\r\n$9\r\nsubscribe\r\n$1\r\nx\r\n:1\r\n")
        await trio.testing.wait_all_tasks_blocked()
        connected.append(pubsub.connected)
        await stream.send_all(b"-LOADING Redis is loading the dataset in memory\r\n")

    pubsub, connected = make_pubsub(), list[bool]()
    pubsub._unconfirmed = 1
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="Redis says LOADING"):
            await pubsub._listen(link)
    assert connected == [False]


# Commands and their replies


async def test_reply_that_trickles_is_waited_for_no_longer_than_none(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        while True:
            await stream.send_all(b"$1000000\r\n"[:1])
            await trio.sleep(1)

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="no answer to XREAD"):
            await link.ask("XREAD", timeout=3)
        assert trio.current_time() == 3


async def test_long_reply_is_waited_for_as_long_as_it_comes(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"$%d\r\n" % (10 * ENOUGH))
        for _ in range(10):
            await trio.sleep(1.9)
            await stream.send_all(b"x" * ENOUGH)
        await stream.send_all(b"\r\n")

    async with link_to(redis) as link:
        assert await link.ask("XREAD", timeout=2) == b"x" * 10 * ENOUGH


async def test_two_replies_to_one_command_are_out_of_step() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"+OK\r\n+OK\r\n")

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="more replies than commands"):
            await link.ask("XREAD")


async def test_array_of_more_members_than_there_is_memory_for_is_a_lost_link() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"*4294967295\r\n")

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="not RESP"):
            await link.ask("XREAD")


SHAPES: list[Any] = [
    b"OK", 1, [], [1], [[b"a"]], [[b"a", 1]], [[b"a", [[b"1-1"]]]], [[b"a", [[b"1-1", [b"b"]]]]],
    [[b"a", [[b"x", [b"data", b"b"]]]]], [[b"\xff", [[b"1-1", None]]]],
    [[b"a", [[b"1-1", [1, 2]]]]],
    [b"1-1", None], [[b"1-1", [b"data", 5]]], [b"length"], [b"length", 1], [1, 2], {},
    [b"length", b"1", b"last-generated-id", b"1-1", b"first-entry", None], float("nan"), True,
]  # fmt: skip


@pytest.mark.parametrize("read", [read_news, read_entries, read_info, read_time])
@pytest.mark.parametrize("reply", SHAPES, ids=repr)
def test_reply_of_another_shape_is_a_lost_link_and_no_bug(
    reply: Any, read: Callable[[Any], Any]
) -> None:
    if reply == [] and read in {read_news, read_entries}:
        assert read(reply) == []
        return
    with pytest.raises(ConnectionLost, match="unexpected reply"):
        read(reply)


def test_replies_are_read() -> None:
    assert read_news(None) == []
    entries = [[b"1-2", [b"other", b"a", b"data", b"b"]], [b"1-3", None], [b"1-4", [b"x", b"y"]]]
    payloads = [((1, 2), b"b"), ((1, 3), None), ((1, 4), None)]
    assert read_news([[b"events", entries]]) == [("events", payloads)]
    assert read_entries(entries) == payloads
    info: list[Any] = [b"length", 3, b"last-generated-id", b"5-0", b"first-entry", entries[0]]
    assert read_info(info) == ((5, 0), (1, 2), 3, None, START)
    assert read_info([*info, b"entries-added", 9, b"new-in-redis-99", b"?"]).added == 9
    assert read_info(hiredis.ReplyError("ERR no such key")) == Info()
    assert read_time([b"1700000000", b"250000"]) == 1_700_000_000.25
    assert read_time(hiredis.ReplyError("NOPERM no")) is None
    with pytest.raises(ConnectionLost, match="XINFO failed: NOPERM"):
        read_info(hiredis.ReplyError("NOPERM no"))


async def test_answer_to_an_earlier_question_is_not_delivered_again() -> None:
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
    streams = Streams(RedisAddress(), ["s"], inlet, Breaker(5, 30))
    cursor = StreamCursor("s", tag("s"), Info())
    cursor.checked_at = trio.current_time()
    streams._by_name["s"] = cursor
    async with link_to(redis) as link:
        await streams._read(link)
        assert streams.cursors == {"s": "1-1"}
        with pytest.raises(ConnectionLost, match="earlier question"):
            await streams._read(link)
    assert ingest.received["stream"] == 1
