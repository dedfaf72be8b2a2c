"""Pub/Sub: a dead or lagging connection is detected by PING, a slow one is kept."""

import pytest
import trio
from trio.testing import MockClock

from tests.support.redis_links import Redis, link_to
from trio_gateway.broker.connection import ENOUGH
from trio_gateway.broker.pubsub import LIVENESS, PubSub
from trio_gateway.core.limits import DropAlarm
from trio_gateway.core.resilience import Breaker
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.supervision import ConnectionLost

PONG = b"*2\r\n$4\r\npong\r\n$0\r\n\r\n"


def make_pubsub() -> PubSub:
    queue = EventQueue(10, DropAlarm(60, 0.05, 300))
    return PubSub(RedisAddress(), [], Ingest(), queue, Breaker(5, 30))


def message(size: int) -> bytes:
    return b"*3\r\n$7\r\nmessage\r\n$1\r\nx\r\n$%d\r\n%b\r\n" % (size, b"x" * size)


async def lost_after(redis: Redis) -> float:
    """When the link to this Redis counts as lost."""
    pubsub = make_pubsub()
    pubsub._listeners[b"x"] = lambda payload: None
    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="no answer to PING"):
            await pubsub._listen(link)
        return trio.current_time()


async def test_connection_that_delivers_a_byte_a_second_is_lost(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        for byte in message(1000):
            await trio.sleep(1)
            await stream.send_all(bytes([byte]))

    assert await lost_after(redis) == 2 * LIVENESS


async def test_connection_that_falls_behind_is_lost_even_if_every_message_is_complete(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(PONG)
        while True:
            await trio.sleep(1)
            await stream.send_all(message(10))

    assert await lost_after(redis) == 2 * LIVENESS


async def test_busy_connection_is_kept_however_late_the_answer(
    autojump_clock: MockClock,
) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        for _ in range(50):
            await trio.sleep(LIVENESS / 2)
            await stream.send_all(message(ENOUGH))
        await trio.sleep_forever()

    silence = await lost_after(redis) - 50 * LIVENESS / 2
    assert LIVENESS <= silence <= 2 * LIVENESS


async def test_connection_that_answers_is_kept(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            await trio.sleep(LIVENESS - 0.1)
            await stream.send_all(PONG)

    async with link_to(redis) as link:
        await link.send("PING")
        with trio.move_on_after(100) as scope:
            await make_pubsub()._listen(link)
        assert scope.cancelled_caught


async def test_redis_that_is_still_loading_is_a_lost_connection() -> None:
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
