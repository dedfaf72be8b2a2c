"""Under load, whatever is killed: no durable event is lost, doubled or out of order."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

from .durable import again_and_again, freeze_redis, kill_gateway, kill_redis, run


@pytest.mark.parametrize(
    ("kills", "clients"), [(3, 20), pytest.param(50, 200, marks=pytest.mark.chaos)]
)
async def test_redis_killed_under_load_loses_nothing(kills: int, clients: int) -> None:
    disturb = again_and_again(kill_redis, kills)
    figures = await run("Redis kill -9", disturb, clients=clients, kills=kills)
    print(figures)
    figures.assert_nothing_lost()


@pytest.mark.parametrize(
    ("kills", "clients"), [(2, 20), pytest.param(20, 200, marks=pytest.mark.chaos)]
)
async def test_gateway_killed_under_load_loses_nothing(kills: int, clients: int) -> None:
    disturb = again_and_again(kill_gateway, kills)
    figures = await run("gateway kill -9", disturb, clients=clients, kills=kills)
    print(figures)
    figures.assert_nothing_lost()
    assert figures.replayed


@pytest.mark.chaos
async def test_redis_frozen_for_ten_seconds_loses_nothing() -> None:
    async def freeze(
        server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
    ) -> None:
        await trio.sleep(3)
        await freeze_redis(server, gateway, progress, 10)
        await trio.sleep(3)

    figures = await run("Redis SIGSTOP 10 s", freeze, clients=200, kills=1)
    print(figures)
    figures.assert_nothing_lost()
