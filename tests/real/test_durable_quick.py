"""The chaos of e2e/chaos, for a moment: what runs there for minutes must run here at all."""

import pytest

from e2e.chaos.durable import again_and_again, kill_gateway, kill_redis, run

pytestmark = pytest.mark.slow


async def test_redis_killed_under_load_loses_nothing() -> None:
    figures = await run("Redis kill -9", again_and_again(kill_redis, 3), clients=20, kills=3)
    figures.assert_nothing_lost()


async def test_gateway_killed_under_load_loses_nothing() -> None:
    figures = await run("gateway kill -9", again_and_again(kill_gateway, 2), clients=20, kills=2)
    figures.assert_nothing_lost()
    assert figures.replayed
