"""Shard claims: when a process claims again, and what it holds meanwhile."""

from collections.abc import Sequence
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from tests.runtime.test_following import FakeSource
from trio_gateway.broker.commands import Unavailable
from trio_gateway.broker.shard_claims import ShardClaims
from trio_gateway.core.shards import Sharding
from trio_gateway.runtime.extent import Extent
from trio_gateway.runtime.following import Following

SHARDING = Sharding(("s",), shards=3, previous=3)


class Redis:
    """Replies what it is given, then that nothing is to be had; notes when it was asked."""

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)
        self.asked: list[float] = []

    async def __call__(
        self, script: str, keys: Sequence[str], arguments: Sequence[Any], *, seconds: float
    ) -> Any:
        self.asked.append(round(trio.current_time(), 3))
        reply = self.replies.pop(0) if self.replies else [300]
        if isinstance(reply, Exception):
            raise reply
        return reply


async def claim_for(seconds: float, redis: Redis) -> Following:
    following = Following(FakeSource(), Extent(), SHARDING)
    with trio.move_on_after(seconds):
        await ShardClaims(redis, following, SHARDING).run()
    return following


async def test_process_that_holds_nothing_asks_again_when_the_first_claim_ends(
    autojump_clock: MockClock,
) -> None:
    redis = Redis([250], [30], [210])
    assert not (await claim_for(0.5, redis)).names
    assert redis.asked == [0.0, 0.25, 0.28, 0.49]


async def test_holder_renews_its_claims_three_times_while_they_last(
    autojump_clock: MockClock,
) -> None:
    redis = Redis([300, 1, 3], [40, 1, 3], [300, 1, 3])
    assert (await claim_for(0.15, redis)).names == {"s:{0}", "s:{2}"}
    assert redis.asked == [0.0, 0.1, 0.14]


@pytest.mark.parametrize("reply", [Unavailable("no answer"), None, [b"junk"], 7])
async def test_what_was_held_is_read_on_while_redis_does_not_answer_or_refuses(
    autojump_clock: MockClock, reply: Any
) -> None:
    redis = Redis([300, 2], reply, [300, 2])
    assert (await claim_for(1.15, redis)).names == {"s:{1}"}
    assert redis.asked == [0.0, 0.1, 1.1]
