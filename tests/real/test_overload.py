"""A burst of events that exceeds the queue; e2e/chaos overloads for a minute."""

import json
from typing import Any

import redis
import trio
from structlog.testing import capture_logs

from tests.support.gateways import admitted, make_settings, metrics, received, running, settle

FLOOD = 2000


def payload(n: int, tenant: int = 1) -> str:
    event = {"type": "ROUND_READY", "tenant_id": tenant, "branch_id": 1, "n": n}
    return json.dumps(event)


def publish(backend: "redis.Redis", *, others: int = 20) -> None:
    """A flood of tenant 1, mixed with its durable events and a few events of tenant 2."""
    with backend.pipeline(transaction=False) as pipeline:
        for n in range(FLOOD):
            pipeline.publish("channel:branch:1:waiters", payload(n))
            if n % (FLOOD // others) == 0:
                pipeline.publish("channel:branch:1:waiters", payload(n, tenant=2))
                pipeline.xadd("events:critical", {"data": payload(FLOOD + n)})
        pipeline.execute()


def numbers(events: list[Any], *, durable: bool) -> list[int]:
    return [event["n"] for event in events if ("event_id" in event) is durable]


async def test_burst_drops_the_oldest_events_of_the_largest_tenant_and_nothing_durable(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(
        redis_url, redis_event_queue_size=100, redis_event_max_wait=0, ws_outbox_messages=10_000
    )
    with capture_logs() as logs:
        async with (
            running(settings) as gateway,
            admitted(gateway.staff_url("waiter")) as flooded,
            admitted(gateway.staff_url("waiter", tenant_id=2)) as other,
        ):
            await trio.to_thread.run_sync(publish, backend)
            await settle(gateway)
            ours, theirs = await received(flooded), await received(other)
            figures = await metrics(gateway.port)

    dropped = figures["events_dropped_total"]
    assert numbers(theirs, durable=False) == list(range(0, FLOOD, FLOOD // 20))
    assert numbers(ours, durable=True) == list(range(FLOOD, 2 * FLOOD, FLOOD // 20))
    delivered = numbers(ours, durable=False)
    assert delivered == sorted(delivered)
    assert delivered[-1] == FLOOD - 1  # the newest
    assert dropped == FLOOD - len(delivered) > 0
    assert figures.by_source_and_reason("events_dropped_by_source_total") == {
        ("pubsub", "queue_full"): dropped,
        ("pubsub", "tenant_rate"): 0,
        ("stream", "queue_full"): 0,
    }
    assert [log["tenant"] for log in logs if log["event"] == "dropping events"] == [1]


async def test_burst_that_is_delivered_in_time_loses_nothing(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(
        redis_url, redis_event_queue_size=100, redis_event_max_wait=30, ws_outbox_messages=10_000
    )
    async with (
        running(settings) as gateway,
        admitted(gateway.staff_url("waiter")) as flooded,
    ):
        await trio.to_thread.run_sync(publish, backend)
        await settle(gateway)
        events = await received(flooded)
        figures = await metrics(gateway.port)

    assert numbers(events, durable=False) == list(range(FLOOD))
    assert figures["events_dropped_total"] == 0


async def test_tenant_over_its_rate_is_limited_to_it_and_no_other_tenant_is(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, ws_tenant_event_rate=30)
    with capture_logs() as logs:
        async with (
            running(settings) as gateway,
            admitted(gateway.staff_url("waiter")) as flooded,
            admitted(gateway.staff_url("waiter", tenant_id=2)) as other,
        ):
            await trio.to_thread.run_sync(publish, backend)
            await settle(gateway)
            ours, theirs = await received(flooded), await received(other)
            figures = await metrics(gateway.port)

    assert len(numbers(theirs, durable=False)) == 20
    assert len(numbers(ours, durable=True)) == 20
    delivered = numbers(ours, durable=False)
    assert delivered[:30] == list(range(30))
    assert len(delivered) < 100
    found = figures.by_source_and_reason("events_dropped_by_source_total")
    assert found["pubsub", "tenant_rate"] == FLOOD - len(delivered)
    assert figures["events_dropped_total"] == FLOOD - len(delivered)
    over = [log for log in logs if log["event"] == "tenant over its event rate"]
    assert 1 <= len(over) <= 3
    assert {log["tenant"] for log in over} == {1}
