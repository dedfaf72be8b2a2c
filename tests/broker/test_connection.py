"""Redis connections: slow replies are awaited, invalid ones are a lost connection."""

import socket
from dataclasses import replace

import pytest
import redis
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.redis_links import link_to
from tests.support.redis_server import valkey
from trio_gateway.broker.connection import ENOUGH, RedisConnection, open_redis
from trio_gateway.redis_url import RedisAddress
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


async def test_command_that_does_not_fit_into_the_socket_is_sent_whole() -> None:
    ours, theirs = socket.socketpair()
    word, got = b"x" * 2_000_000, bytearray()
    async with trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as redis:
        link = RedisConnection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))

        async def answer() -> None:
            while not got.endswith(word + b"\r\n"):
                got.extend(await redis.receive_some())
            await redis.send_all(b"+OK\r\n")

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(answer)
                assert await link.ask("ECHO", word) == b"OK"
        await link.close()
    assert bytes(got) == b"*2\r\n$4\r\nECHO\r\n$%d\r\n%b\r\n" % (len(word), word)


async def test_connection_that_is_closed_is_lost_for_who_waits_and_for_who_comes_later() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        link = RedisConnection(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:

                async def lose() -> None:
                    with pytest.raises(ConnectionLost, match="receive failed"):
                        await link.ask("PING")

                nursery.start_soon(lose)
                await wait_all_tasks_blocked()
                await link.close()
            for used in (link.receive, lambda: link.ask("PING")):
                with pytest.raises(ConnectionLost):
                    await used()


@pytest.mark.parametrize("user", [None, "nobody"])
async def test_optional_credentials_are_not_needed_by_a_server_without_a_password(
    user: str | None,
) -> None:
    with valkey() as server:
        address = RedisAddress("127.0.0.1", server.port, user=user, password="p")
        with pytest.raises(ConnectionLost, match="AUTH failed"):
            async with open_redis(address):
                pass
        async with open_redis(replace(address, optional_auth=True)) as link:
            assert await link.call("PING") == b"PONG"


async def test_optional_credentials_are_used_where_a_password_is_needed() -> None:
    with valkey() as server:
        with redis.Redis(port=server.port) as admin:
            admin.config_set("requirepass", "p")
        address = RedisAddress("127.0.0.1", server.port, password="p", optional_auth=True)
        async with open_redis(address) as link:
            assert await link.call("PING") == b"PONG"
        async with open_redis(replace(address, password="q")) as link:
            with pytest.raises(ConnectionLost, match="PING failed: NOAUTH"):
                await link.call("PING")
