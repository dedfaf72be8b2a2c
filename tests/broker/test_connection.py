"""Redis connections: slow replies are awaited, invalid ones are a lost connection."""

import pytest
import trio
from trio.testing import MockClock

from tests.support.redis_links import link_to
from trio_gateway.broker.connection import ENOUGH
from trio_gateway.runtime.supervision import ConnectionLost


async def test_reply_that_trickles_times_out_like_a_missing_one(
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


async def test_long_reply_is_awaited_while_it_arrives(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"$%d\r\n" % (10 * ENOUGH))
        for _ in range(10):
            await trio.sleep(1.9)
            await stream.send_all(b"x" * ENOUGH)
        await stream.send_all(b"\r\n")

    async with link_to(redis) as link:
        assert await link.ask("XREAD", timeout=2) == b"x" * 10 * ENOUGH


async def test_two_replies_to_one_command_are_a_lost_connection() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"+OK\r\n+OK\r\n")

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="more replies than commands"):
            await link.ask("XREAD")


async def test_array_too_large_for_memory_is_a_lost_connection() -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b"*4294967295\r\n")

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="not RESP"):
            await link.ask("XREAD")


async def test_several_commands_are_sent_at_once_and_answered_in_order() -> None:
    received = b""

    async def redis(stream: trio.abc.Stream) -> None:
        nonlocal received
        while received.count(b"PING") < 3:
            received += await stream.receive_some()
        for piece in (b":1", b"\r\n-ERR no\r\n", b":3\r\n"):
            await stream.send_all(piece)

    async with link_to(redis) as link:
        first, second, third = await link.ask_all([("PING", n) for n in range(3)])
    assert (first, str(second), third) == (1, "ERR no", 3)


async def test_missing_reply_of_several_names_its_command(autojump_clock: MockClock) -> None:
    async def redis(stream: trio.abc.Stream) -> None:
        await stream.send_all(b":1\r\n")
        await trio.sleep_forever()

    async with link_to(redis) as link:
        with pytest.raises(ConnectionLost, match="no answer to XINFO"):
            await link.ask_all([("TIME",), ("XINFO", "STREAM", "s")], timeout=1)
