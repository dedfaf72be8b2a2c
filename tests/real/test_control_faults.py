"""Processes that are frozen or killed, and a Redis that is: what the others know and do."""

import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.real.test_control import alive, closed_by, cluster_of
from tests.support.gateways import (
    Reachable,
    Running,
    admitted,
    closed,
    receive_event,
    serving,
    until,
    valkey,
)
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer
from tests.support.stopwatch import Stopwatch
from trio_gateway.broker.commands import Unavailable
from trio_gateway.cluster.control import PATIENCE
from trio_gateway.cluster.questions import Answers
from trio_gateway.core.control_messages import Disconnect

EVERYBODY = Disconnect(1, user_id=21)
AT_ONCE = 0.5  # seconds


@pytest.fixture
def server() -> Iterator[RedisServer]:
    with valkey() as found:
        yield found


@asynccontextmanager
async def processes(url: str, number: int, folder: Path) -> AsyncIterator[list[GatewayProcess]]:
    """Other processes of the same service."""
    found = [GatewayProcess(url, folder, WS_CLUSTER="true") for _ in range(number)]
    try:
        async with trio.open_nursery() as nursery:
            for each in found:
                nursery.start_soon(each.start)
        yield found
    finally:
        for each in found:
            each.kill()


async def knows(gateway: Running, number: int) -> None:
    """Wait until a gateway knows so many live processes, itself included."""
    registry = cluster_of(gateway).registry

    def known() -> bool:
        registry.beat_soon()
        return len(registry.nodes) == number

    await until(known, 10)


def name_of(gateway: Running, process: GatewayProcess) -> str:
    assert process.process is not None
    [name] = [
        name for name in cluster_of(gateway).registry.nodes if f"-{process.process.pid}-" in name
    ]
    return name


async def order(gateway: Running) -> tuple[Answers, float]:
    """Disconnect user 21; returns the answers and how long they took."""
    watch = Stopwatch()
    answers = await cluster_of(gateway).control.order("disconnect", EVERYBODY)
    return answers, watch.net


def waiter_url(port: int) -> str:
    return Reachable(port).staff_url("waiter", sub="21")


async def is_open(client: WebSocketConnection) -> bool:
    await client.send_message('{"type":"ping"}')
    return bool(await receive_event(client) == {"type": "pong"})


async def test_a_frozen_process_is_named_and_carries_out_the_order_when_it_runs_again(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as here,
        processes(redis_url, 1, tmp_path) as (frozen,),
        admitted(waiter_url(here.port)) as mine,
        admitted(waiter_url(frozen.port)) as at_frozen,
    ):
        await knows(here, 2)
        assert frozen.process is not None
        name = name_of(here, frozen)
        frozen.process.send_signal(signal.SIGSTOP)
        answers, seconds = await order(here)
        assert answers.missing == [name]
        assert list(closed_by(answers).values()) == [1]
        assert seconds < 2
        assert (await closed(mine))[0] == 4001
        frozen.process.send_signal(signal.SIGCONT)
        assert (await closed(at_frozen))[0] == 4001
        async with admitted(waiter_url(frozen.port)) as later:
            frozen.process.send_signal(signal.SIGSTOP)
            frozen.process.send_signal(signal.SIGCONT)
            assert await is_open(later)
            answers, _ = await order(here)
            assert answers.complete
            assert closed_by(answers)[name] == 1
            assert (await closed(later))[0] == 4001


async def test_an_order_given_before_a_connection_joined_does_not_concern_it(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with serving(redis_url, "direct", ws_cluster=True) as gateway:
        await alive(gateway)
        orders = cluster_of(gateway).control._orders
        await until(lambda: orders._after is not None)
        time: Any = backend.time()
        entry = f"{(time[0] - 2) * 1000}-0"
        request = '{"tenant_id":1,"user_id":21}'
        fields: Any = {"id": "a", "giver": "any", "kind": "disconnect", "request": request}
        async with admitted(gateway.staff_url("waiter", sub="21")) as waiter:
            backend.xadd("{gateway}:orders", fields, id=entry)
            backend.publish("channel:gateway:control", f'{{"type":"ordered","order":"{entry}"}}')
            await until(lambda: entry in orders._done)
            assert await is_open(waiter)


async def works(*gateways: Running) -> bool:
    """Whether an order by each reaches all."""
    for each in gateways:
        try:
            answers, _ = await order(each)
        except Unavailable:
            return False
        if len(answers.by_node) < len(gateways) or not answers.complete:
            return False
    return True


async def test_redis_that_restarts_empty_knows_all_processes_soon(server: RedisServer) -> None:
    url = server.connection_url
    async with (
        serving(url, "direct", ws_cluster=True) as one,
        serving(url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        server.kill()
        await until(lambda: not cluster_of(one).link.connected)
        watch = Stopwatch()
        with pytest.raises(Unavailable):
            await order(one)
        assert watch.net < PATIENCE + AT_ONCE
        server.start_again()
        await trio.to_thread.run_sync(server.wait_until_ready)
        watch = Stopwatch()
        await until(lambda: works(one, other), 10)
        assert watch.net < 7


async def test_while_redis_is_frozen_orders_are_refused_and_nobody_is_forgotten(
    server: RedisServer,
) -> None:
    url = server.connection_url
    async with (
        serving(url, "direct", ws_cluster=True) as one,
        serving(url, "direct", ws_cluster=True) as other,
        admitted(one.staff_url("waiter", sub="21")) as waiter,
    ):
        await alive(one, other)
        with server.frozen():
            watch = Stopwatch()
            with pytest.raises(Unavailable):
                await order(other)
            assert watch.net < PATIENCE + AT_ONCE
            await trio.sleep(2)
            assert len(cluster_of(one).registry.nodes) == 2
        await until(lambda: works(one, other), 10)
        assert (await closed(waiter))[0] == 4001
