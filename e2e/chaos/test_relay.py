"""The relay does what it is told: each mode is the fault that its name says."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.support.gateways import free_port, until

from .relay import JUNK, Relay, Way, open_relay


class Echo:
    """A server that says again whatever it hears, and counts it."""

    def __init__(self) -> None:
        self.heard = b""
        self.ended = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                async for data in stream:
                    self.heard += data
                    await stream.send_all(data)
            except trio.BrokenResourceError:
                pass
            self.ended += 1


@asynccontextmanager
async def relayed(buffer: int | None = None) -> AsyncIterator[tuple[Relay, Echo]]:
    echo, port = Echo(), free_port()
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(port, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, echo.serve, listeners)
        async with open_relay(port, buffer=buffer) as relay:
            yield relay, echo
        nursery.cancel_scope.cancel()


async def client_of(relay: Relay) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", relay.port)


async def heard(stream: trio.SocketStream, size: int, seconds: float = 2) -> bytes:
    found = b""
    with trio.fail_after(seconds):
        while len(found) < size:
            data = await stream.receive_some(size - len(found))
            if not data:
                break
            found += data
    return found


async def is_silent(stream: trio.SocketStream) -> bool:
    with trio.move_on_after(0.05) as scope:
        await stream.receive_some()
    return scope.cancelled_caught


async def test_forward_hands_on_bytes_and_ends_both_ways() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"x" * 1_000_000)
        assert len(await heard(client, 1_000_000)) == 1_000_000
        await client.send_eof()
        assert await heard(client, 1) == b""
        assert echo.ended == 1


async def test_vanish_hands_on_nothing_nor_an_end_until_the_network_is_back() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await heard(client, 3) == b"one"
        relay.vanish()
        async with await client_of(relay) as second:
            for each in (client, second):
                await each.send_all(b"two")
            assert await is_silent(client)
            assert await is_silent(second)
        assert echo.heard == b"one"
        await client.send_eof()
        relay.forward()
        assert await heard(client, 4) == b"two"  # and its end
        await until(lambda: echo.heard == b"one" + b"two" * 2)


@pytest.mark.parametrize("way", [Way.TO_SERVER, Way.TO_CLIENT])
async def test_vanish_may_be_one_way(way: Way) -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        relay.vanish(way)
        await client.send_all(b"one")
        assert await is_silent(client)
        assert echo.heard == (b"" if way is Way.TO_SERVER else b"one")


async def test_orphan_is_silent_for_ever_while_new_connections_work() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await heard(client, 3) == b"one"
        relay.orphan()
        relay.forward()
        await client.send_all(b"two")
        async with await client_of(relay) as second:
            await second.send_all(b"new")
            assert await heard(second, 3) == b"new"
        assert await is_silent(client)
        assert echo.heard == b"onenew"


async def test_slow_is_as_slow_as_it_says_and_what_waits_is_not_lost() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        relay.slow(100, Way.TO_CLIENT)
        started = trio.current_time()
        await client.send_all(b"x" * 1000)
        assert len(await heard(client, 30)) == 30
        assert 0.15 < trio.current_time() - started < 1.5
        relay.forward()
        assert len(await heard(client, 970)) == 970


async def test_small_buffer_lets_the_sender_feel_that_nobody_reads() -> None:
    async with relayed(buffer=4096) as (relay, _), await client_of(relay) as client:
        relay.vanish()
        with trio.move_on_after(0.3) as scope:
            await client.send_all(b"x" * 8_000_000)
        assert scope.cancelled_caught


async def test_garbage_comes_at_once_and_before_every_word() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await heard(client, 3) == b"one"
        relay.garbage()
        assert await heard(client, len(JUNK)) == JUNK
        await client.send_all(b"two")
        assert await heard(client, len(JUNK) + 3) == JUNK + b"two"
        async with await client_of(relay) as second:
            assert await heard(second, len(JUNK)) == JUNK


async def test_reset_is_felt_by_old_and_new_connections() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await heard(client, 3) == b"one"
        relay.reset()
        async with await client_of(relay) as second:
            for each in (client, second):
                with pytest.raises(trio.BrokenResourceError):
                    await each.receive_some()
        relay.forward()
        async with await client_of(relay) as third:
            await third.send_all(b"new")
            assert await heard(third, 3) == b"new"


async def test_refuse_ends_old_connections_and_takes_no_new_one() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await heard(client, 3) == b"one"
        relay.refuse()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        with pytest.raises(OSError):
            await client_of(relay)
        relay.forward()
        async with await client_of(relay) as second:
            await second.send_all(b"new")
            assert await heard(second, 3) == b"new"


async def test_modes_may_follow_each_other_at_once() -> None:
    async with relayed() as (relay, _):
        for _ in range(3):
            relay.refuse()
            relay.forward()
        async with await client_of(relay) as client:
            await client.send_all(b"one")
            assert await heard(client, 3) == b"one"
