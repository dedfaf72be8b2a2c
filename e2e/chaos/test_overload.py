"""Overload, more events than can be delivered: bounded, counted, fair, without after-effects."""

import tempfile
import time
from collections.abc import Awaitable, Callable
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import pytest
import trio

from tests.support.gateways import metrics, valkey
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

from .durable import FOR_CROWDS, run
from .overload import (
    SMALL,
    Bystander,
    deliverable,
    flooding,
    lines,
    median,
    memory,
    percentile,
    quiet,
)

pytestmark = pytest.mark.chaos

FLOOD = 60.0  # seconds
COOLDOWN = 20.0


@pytest.mark.parametrize("max_wait", [0, 2])
async def test_three_times_the_deliverable_rate_for_a_minute(
    max_wait: int, capsys: pytest.CaptureFixture[str]
) -> None:
    async def overload(
        server: RedisServer, gateway: GatewayProcess, progress: Callable[[], Awaitable[None]]
    ) -> None:
        bystander = Bystander(gateway, server.port, rate=10)
        held: list[float] = []

        async def watch() -> None:
            while True:
                held.append(memory(gateway))
                await trio.sleep(0.5)

        async with flooding(gateway, server.port) as flood, trio.open_nursery() as nursery:
            nursery.start_soon(bystander.run)
            per_second = await deliverable(flood)
            await trio.sleep(10)
            at_first, heard = await metrics(gateway.port), len(bystander.events)
            before, began = memory(gateway), time.monotonic()
            nursery.start_soon(watch)
            poured = await flood.pour(5 * per_second, FLOOD)  # it may get faster
            ended = time.monotonic()
            over = await quiet(gateway, 10)
            await progress()  # every client has all events of the stream
            caught_up = time.monotonic() - ended
            await trio.sleep(10)
            found, heard = await metrics(gateway.port), len(bystander.events) - heard
            nursery.cancel_scope.cancel()
        alarms = [
            datetime.fromisoformat(line["timestamp"]) for line in lines(gateway, "dropping events")
        ]
        apart = [(later - earlier).total_seconds() for earlier, later in pairwise(alarms)]
        figures = {
            "deliverable a second": round(per_second),
            "published a second": round(poured["published"] / FLOOD),
            "delivered a second": round(poured["processed"] / FLOOD),
            "dropped": poured["dropped"],
            "MB before": round(before),
            "MB at most": round(max(held)),
            "seconds between alarms": apart,
            "seconds until nothing waits": round(over, 2),
            "seconds until durable events are on time": round(caught_up, 2),
            "bystander's ms, p50 and p99": [
                percentile(bystander.events, p, began, ended) for p in (50, 99)
            ],
            "after": [percentile(bystander.events, p, ended + 1, ended + 10) for p in (50, 99)],
            "longest accept and pong, ms": [
                percentile(each, 100, began, ended) for each in (bystander.accepts, bystander.pongs)
            ],
        }
        with capsys.disabled():
            print(f"\n{figures}")

        assert poured["published"] > 3 * poured["processed"]
        assert poured["closed"] == 0
        by_source = found.by_source_and_reason("events_dropped_by_source_total")
        assert by_source["pubsub", "queue_full"] == found["events_dropped_total"]
        assert by_source["stream", "queue_full"] == 0
        # Every published event was processed, or dropped and counted.
        received, dropped, streamed = (
            found[name] - at_first[name]
            for name in (
                "events_received_total{pubsub}",
                "events_dropped_total",
                "events_received_total{stream}",
            )
        )
        processed = found["events_processed_total"] - at_first["events_processed_total"]
        assert abs(received - poured["published"] - heard) < 10
        assert abs(processed - streamed + dropped - received) < 10
        assert max(held) < before + 32
        assert 2 <= len(apart) + 1 <= 1 + (FLOOD + 15) / COOLDOWN
        assert min(apart) >= COOLDOWN - 0.01
        # What waits in Redis at the end is as much as is published in the wait.
        assert over < 3 + 3 * max_wait
        assert caught_up < 4 + 3 * max_wait
        # An event waits for at most that long, and then for what is read in the meantime.
        assert percentile(bystander.events, 99, began, ended) < 1000 + 3000 * max_wait
        assert len([when for when, _ in bystander.accepts if began < when < ended]) > FLOOD / 2
        assert percentile(bystander.accepts, 100, began, ended) < 1000
        assert percentile(bystander.pongs, 100, began, ended) < 1000

    figures = await run(
        "three times what can be delivered", overload, clients=6, kills=0, rate=20,
        WS_DROP_ALARM_COOLDOWN=str(COOLDOWN),
        **SMALL | {"REDIS_EVENT_MAX_WAIT": str(max_wait)},
    )  # fmt: skip
    with capsys.disabled():
        print(figures)
    figures.assert_nothing_lost()


@pytest.mark.parametrize("rate", [0, 100])
async def test_flood_of_one_tenant_hardly_delays_another(
    rate: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with valkey() as server, tempfile.TemporaryDirectory() as folder:
        gateway = GatewayProcess(
            server.connection_url,
            Path(folder),
            WS_TENANT_EVENT_RATE=str(rate),
            **FOR_CROWDS,
            **SMALL,
        )
        await gateway.start()
        bystander = Bystander(gateway, server.port, rate=50)
        try:
            async with flooding(gateway, server.port) as flood, trio.open_nursery() as nursery:
                nursery.start_soon(bystander.run)
                per_second = 3000.0 if rate else await deliverable(flood)
                without, during = list[float](), list[float]()
                for _ in range(5):
                    for found, pours in ((without, 0.0), (during, 4 * per_second)):
                        await trio.sleep(1)
                        began = time.monotonic()
                        await flood.pour(pours, 3)
                        found.append(percentile(bystander.events, 99, began, time.monotonic()))
                nursery.cancel_scope.cancel()
        finally:
            gateway.kill()
    with capsys.disabled():
        print(f"\nWS_TENANT_EVENT_RATE={rate}: p99 without {without}, during {during}")
    if rate:
        assert median(during) <= 2 * median(without)
