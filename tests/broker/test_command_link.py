"""The link for commands: one connection, opened again when it is lost, whose replies never mix."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import redis
import trio

from tests.support.gateways import RedisServer, until, valkey
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.command_link import CommandLink
from trio_gateway.broker.commands import Unavailable
from trio_gateway.broker.topologies import make_topology
from trio_gateway.redis_url import RedisUrl


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with valkey() as started:
        yield started


@asynccontextmanager
async def open_link(server: RedisServer) -> AsyncIterator[CommandLink]:
    link = CommandLink(make_topology(RedisUrl.from_url(server.connection_url)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(link.run)
        yield link
        nursery.cancel_scope.cancel()


async def echo(link: CommandLink, text: str, seconds: float = 5) -> Any:
    return await link.evaluate("return ARGV[1]", ["key"], [text], seconds=seconds)


async def test_script_that_fails_is_unavailable_and_the_next_one_is_not(
    server: RedisServer,
) -> None:
    async with open_link(server) as link:
        assert await echo(link, "a") == b"a"
        with pytest.raises(Unavailable, match="EVAL failed"):
            await link.evaluate("return nonsense()", ["key"], [], seconds=5)
        assert await echo(link, "b") == b"b"


async def test_connection_to_a_wrong_server_is_left(server: RedisServer) -> None:
    async with open_link(server) as link:
        before = await link.ask("CLIENT", "ID", seconds=5)
        assert link.is_open
        link.reconnect()
        assert not link.is_open
        assert await link.ask("CLIENT", "ID", seconds=5) > before


async def test_connection_that_was_lost_meanwhile_costs_no_script(server: RedisServer) -> None:
    async with open_link(server) as link:
        await echo(link, "a")
        with redis.Redis(port=server.port) as client:
            client.execute_command("CLIENT KILL TYPE normal SKIPME yes")
        assert await echo(link, "b") == b"b"


async def test_frozen_redis_is_unavailable_in_time_and_its_late_replies_are_not_taken(
    server: RedisServer,
) -> None:
    async with open_link(server) as link:
        await echo(link, "a")
        with server.frozen():
            watch = Stopwatch()
            for text in "bc":
                with pytest.raises(Unavailable):
                    await echo(link, text, 0.2)
            assert watch.net < 1
        assert await echo(link, "d") == b"d"
        assert await echo(link, "e") == b"e"


async def test_redis_that_comes_back_is_found(server: RedisServer) -> None:
    async with open_link(server) as link:
        await echo(link, "a")
        server.kill()
        with pytest.raises(Unavailable):
            await echo(link, "b", 0.2)
        server.start_again()

        async def answers() -> bool:
            try:
                return bool(await echo(link, "c", 0.5) == b"c")
            except Unavailable:
                return False

        await until(answers)
