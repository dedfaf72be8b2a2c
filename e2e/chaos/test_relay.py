"""The relay: each mode is the fault of its name."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio

from tests.support.gateways import free_port, until

from .relay import JUNK, Relay, Way, open_relay


class Echo:
    """A server that sends back what it receives, and records it."""

    def __init__(self) -> None:
        self.received = b""
        self.ended = 0

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            try:
                async for data in stream:
                    self.received += data
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


async def client_of(relay: Relay, host: str | None = None) -> trio.SocketStream:
    return await trio.open_tcp_stream("127.0.0.1", relay.port, local_address=host)


async def received(stream: trio.SocketStream, size: int, seconds: float = 2) -> bytes:
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


async def test_forward_passes_bytes_and_ends_on_both_ways() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"x" * 1_000_000)
        assert len(await received(client, 1_000_000)) == 1_000_000
        await client.send_eof()
        assert await received(client, 1) == b""
        assert echo.ended == 1


async def test_split_cuts_off_some_addresses_until_the_network_is_back() -> None:
    async with (
        relayed() as (relay, _),
        await client_of(relay) as near,
        await client_of(relay, "127.0.0.2") as far,
    ):
        relay.split({"127.0.0.2"})
        async with await client_of(relay, "127.0.0.2") as later:
            for each in (near, far, later):
                await each.send_all(b"one")
            assert await received(near, 3) == b"one"
            assert await is_silent(far)
            assert await is_silent(later)
            relay.forward()
            assert await received(far, 3) == b"one"
            assert await received(later, 3) == b"one"


async def test_vanish_passes_nothing_until_the_network_is_back() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await received(client, 3) == b"one"
        relay.vanish()
        async with await client_of(relay) as second:
            for each in (client, second):
                await each.send_all(b"two")
            assert await is_silent(client)
            assert await is_silent(second)
        assert echo.received == b"one"
        await client.send_eof()
        relay.forward()
        assert await received(client, 4) == b"two"  # and its end
        await until(lambda: echo.received == b"one" + b"two" * 2)


@pytest.mark.parametrize("way", [Way.TO_SERVER, Way.TO_CLIENT])
async def test_vanish_can_be_one_way(way: Way) -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        relay.vanish(way)
        await client.send_all(b"one")
        assert await is_silent(client)
        assert echo.received == (b"" if way is Way.TO_SERVER else b"one")


async def test_orphaned_connection_is_silent_while_new_ones_work() -> None:
    async with relayed() as (relay, echo), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await received(client, 3) == b"one"
        relay.orphan()
        relay.forward()
        await client.send_all(b"two")
        async with await client_of(relay) as second:
            await second.send_all(b"new")
            assert await received(second, 3) == b"new"
        assert await is_silent(client)
        assert echo.received == b"onenew"


async def test_slow_has_the_given_rate_and_loses_nothing() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        relay.slow(100, Way.TO_CLIENT)
        started = trio.current_time()
        await client.send_all(b"x" * 1000)
        assert len(await received(client, 30)) == 30
        assert 0.15 < trio.current_time() - started < 1.5
        relay.forward()
        assert len(await received(client, 970)) == 970


async def test_small_buffer_blocks_a_sender_whose_bytes_are_not_read() -> None:
    async with relayed(buffer=4096) as (relay, _), await client_of(relay) as client:
        relay.vanish()
        with trio.move_on_after(0.3) as scope:
            await client.send_all(b"x" * 8_000_000)
        assert scope.cancelled_caught


async def test_garbage_is_sent_at_once_and_before_all_later_bytes() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await received(client, 3) == b"one"
        relay.garbage()
        assert await received(client, len(JUNK)) == JUNK
        await client.send_all(b"two")
        assert await received(client, len(JUNK) + 3) == JUNK + b"two"
        async with await client_of(relay) as second:
            assert await received(second, len(JUNK)) == JUNK


async def test_reset_ends_old_and_new_connections() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await received(client, 3) == b"one"
        relay.reset()
        async with await client_of(relay) as second:
            for each in (client, second):
                with pytest.raises(trio.BrokenResourceError):
                    await each.receive_some()
        relay.forward()
        async with await client_of(relay) as third:
            await third.send_all(b"new")
            assert await received(third, 3) == b"new"


async def test_refuse_ends_old_connections_and_accepts_no_new_one() -> None:
    async with relayed() as (relay, _), await client_of(relay) as client:
        await client.send_all(b"one")
        assert await received(client, 3) == b"one"
        relay.refuse()
        with pytest.raises(trio.BrokenResourceError):
            await client.receive_some()
        with pytest.raises(OSError):
            await client_of(relay)
        relay.forward()
        async with await client_of(relay) as second:
            await second.send_all(b"new")
            assert await received(second, 3) == b"new"


async def test_modes_can_follow_each_other_at_once() -> None:
    async with relayed() as (relay, _):
        for _ in range(3):
            relay.refuse()
            relay.forward()
        async with await client_of(relay) as client:
            await client.send_all(b"one")
            assert await received(client, 3) == b"one"
