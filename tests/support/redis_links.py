"""Connections to a Redis in memory that the test implements."""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import trio
from trio.testing import memory_stream_pair

from trio_gateway.broker.connection import RedisConnection

#: Acts as Redis at the other end of a stream.
Redis = Callable[[trio.abc.Stream], Awaitable[None]]


@asynccontextmanager
async def link_to(redis: Redis) -> AsyncIterator[RedisConnection]:
    """A connection to this Redis."""
    ours, theirs = memory_stream_pair()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(redis, theirs)
        yield RedisConnection(ours)
        nursery.cancel_scope.cancel()
