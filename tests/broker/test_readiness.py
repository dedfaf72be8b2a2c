"""Readiness is checked rarely, however many requests ask for it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
from trio.testing import MockClock

from trio_gateway.broker.commands import Unavailable
from trio_gateway.broker.readiness import ANSWER_TIMEOUT, CHECK_TIMEOUT, FRESH, Readiness


class Redis:
    """A Redis that answers after this delay, with this problem."""

    def __init__(self) -> None:
        self.takes = 0.0
        self.problem: str | None = None
        self.checks = self.at_once = self.most_at_once = 0

    async def check(self, seconds: float) -> None:
        self.checks += 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            with trio.move_on_after(seconds) as scope:
                await trio.sleep(self.takes)
        finally:
            self.at_once -= 1
        if scope.cancelled_caught:
            raise Unavailable("no answer in time")
        if self.problem is not None:
            raise Unavailable(self.problem)


@asynccontextmanager
async def readiness_of(redis: Redis) -> AsyncIterator[Readiness]:
    async with trio.open_nursery() as nursery:
        readiness = Readiness(redis.check)
        nursery.start_soon(readiness.run)
        yield readiness
        nursery.cancel_scope.cancel()


async def test_many_requests_cost_one_check_every_half_second(autojump_clock: MockClock) -> None:
    redis = Redis()
    redis.takes = 0.1

    async def ask() -> None:
        for _ in range(20):
            assert await readiness.ask() is None
            await trio.sleep(0.1)

    async with readiness_of(redis) as readiness:
        async with trio.open_nursery() as nursery:
            for _ in range(700):
                nursery.start_soon(ask)
        assert redis.most_at_once == 1
        assert redis.checks <= 1 + trio.current_time() / FRESH


async def test_redis_that_is_slow_for_a_second_stays_ready_and_the_answer_is_immediate(
    autojump_clock: MockClock,
) -> None:
    redis = Redis()
    async with readiness_of(redis) as readiness:
        assert await readiness.ask() is None
        await trio.sleep(FRESH)
        redis.takes = CHECK_TIMEOUT - 0.1
        for _ in range(5):
            asked = trio.current_time()
            assert await readiness.ask() is None
            assert trio.current_time() - asked <= ANSWER_TIMEOUT
        redis.takes = 0
        await trio.sleep(CHECK_TIMEOUT)
        assert await readiness.ask() is None


async def test_redis_that_is_slow_for_longer_is_not_ready_until_it_answers(
    autojump_clock: MockClock,
) -> None:
    redis = Redis()
    async with readiness_of(redis) as readiness:
        assert await readiness.ask() is None
        await trio.sleep(FRESH)
        redis.takes = 10
        assert await readiness.ask() is None
        await trio.sleep(CHECK_TIMEOUT)
        assert await readiness.ask() == "no answer in time"
        redis.takes = 0
        await trio.sleep(CHECK_TIMEOUT + FRESH)
        assert await readiness.ask() is None


async def test_refusal_is_answered_at_once_until_the_cause_is_gone(
    autojump_clock: MockClock,
) -> None:
    redis = Redis()
    redis.problem = "ReadOnlyError"
    async with readiness_of(redis) as readiness:
        assert await readiness.ask() == "ReadOnlyError"
        redis.problem = None
        assert await readiness.ask() == "ReadOnlyError"
        await trio.sleep(FRESH)
        assert await readiness.ask() is None


async def test_first_answer_waits_for_the_first_check(autojump_clock: MockClock) -> None:
    redis = Redis()
    redis.takes = 1
    async with readiness_of(redis) as readiness:
        assert await readiness.ask() is None
        assert trio.current_time() == 1
