"""The keyed limiter: a few requests at a time for each user or session."""

import pytest
import trio
from trio.testing import MockClock

from trio_gateway.runtime import keyed_limiter
from trio_gateway.runtime.concurrency_limiter import Overloaded
from trio_gateway.runtime.keyed_limiter import KeyedLimiter


async def test_each_key_has_a_limit_of_its_own(
    autojump_clock: MockClock,
) -> None:
    limiter = KeyedLimiter(2)
    first = await limiter.take("one")
    await limiter.take("one")
    await limiter.take("other")
    with pytest.raises(Overloaded):
        await limiter.take("one")
    assert trio.current_time() == 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(limiter.take, "one")
        await trio.sleep(1)
        first()
    assert trio.current_time() == 3

    async with trio.open_nursery() as nursery:
        for _ in range(keyed_limiter._MOST_WAITING):
            nursery.start_soon(limiter.take, "one")
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(Overloaded):
            await limiter.take("one")
        assert trio.current_time() == 3
        nursery.cancel_scope.cancel()
    assert len(limiter._there) == 2
