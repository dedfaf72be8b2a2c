"""What commands do during a failover."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import trio

from tests.support.gateways import open_commands, until
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.commands import Commands, Unavailable
from trio_gateway.core.resilience import Breaker, State
from trio_gateway.redis_sets import Node, RedisSet

LIVE_AGAIN = 2.0  # seconds after the new primary accepts writes: the contract


@asynccontextmanager
async def commands_of(servers: RedisSet, *breakers: Breaker) -> AsyncIterator[Commands]:
    """Commands to a set of servers, with the usual breakers."""
    reads, writes = breakers or (Breaker(5, 30), Breaker(5, 30))
    async with open_commands(servers.url, reads, writes, max_connections=5) as found:
        yield found


async def fails_over(servers: RedisSet, key: str, lose: Callable[[Node], None]) -> None:
    """Commands for a key are used all the time; they work again soon after a primary is lost."""
    breakers = Breaker(5, 30), Breaker(5, 30)
    await trio.to_thread.run_sync(servers.wait_healthy)  # an earlier failover may not be over
    old = servers.primary(key)
    async with commands_of(servers, *breakers) as commands, trio.open_nursery() as nursery:

        async def works() -> bool:
            try:
                await commands.set_for(key, "v", 60)
                await commands.mget([key])
                await commands.check(2)
            except Unavailable:
                return False
            return True

        async def use() -> None:
            while True:
                await works()
                await trio.sleep(0.01)

        assert await works()
        for _ in range(3):
            nursery.start_soon(use)
        lose(old)
        await trio.to_thread.run_sync(lambda: servers.wait_writable(key, other_than=old))
        watch = Stopwatch()
        await until(works)
        assert watch.net < LIVE_AGAIN
        await until(lambda: {each.state for each in breakers} == {State.CLOSED}, 1)
        nursery.cancel_scope.cancel()
