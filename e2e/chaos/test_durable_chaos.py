"""Under load, whatever is killed: no durable event is lost, doubled or out of order."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

from .durable import (
    again_and_again,
    freeze_redis,
    kill_gateway,
    kill_redis,
    run,
)

pytestmark = pytest.mark.chaos


async def test_redis_killed_fifty_times_loses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    figures = await run("Redis kill -9", again_and_again(kill_redis, 50), clients=200, kills=50)
    with capsys.disabled():
        print(f"\n{figures}")
    figures.assert_nothing_lost()


async def test_redis_frozen_for_ten_seconds_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    async def freeze(
        server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
    ) -> None:
        await trio.sleep(3)
        await freeze_redis(server, gateway, progress, 10)
        await trio.sleep(3)

    figures = await run("Redis SIGSTOP 10 s", freeze, clients=200, kills=1)
    with capsys.disabled():
        print(f"\n{figures}")
    figures.assert_nothing_lost()


async def test_gateway_killed_twenty_times_loses_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    figures = await run("gateway kill -9", again_and_again(kill_gateway, 20), clients=200, kills=20)
    with capsys.disabled():
        print(f"\n{figures}")
    figures.assert_nothing_lost()
    assert figures.replayed
