"""Shards with a real Redis: read while they have clients here, and resumed as one stream is."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import quote

import pytest
import redis
import trio
from structlog.testing import capture_logs
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    connect,
    http,
    make_settings,
    metrics,
    receive_event,
    received,
    running,
    settle,
    until,
    valkey,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.audiences import TenantId
from trio_gateway.core.event_ids import tag
from trio_gateway.core.shards import shard_of
from trio_gateway.publisher import Publisher
from trio_gateway.settings import Settings
from trio_gateway.testing import make_jwt

BASE = "events:critical"
# Of two tenants in different shards, and one more in the shard of the first.
ONE, OTHER, NEIGHBOUR = 1, 2, 37
SHARDS = 64


def settings_of(redis_url: str, **changes: Any) -> Settings:
    return make_settings(redis_url, redis_stream_shards=SHARDS, **changes)


@asynccontextmanager
async def sharded(redis_url: str, **changes: Any) -> AsyncIterator[Running]:
    async with running(settings_of(redis_url, **changes)) as gateway:
        yield gateway


def stream(tenant: int) -> str:
    return SETTINGS.sharding.name_for_new(tenant)


SETTINGS = Settings(redis_stream_shards=SHARDS)
assert stream(ONE) != stream(OTHER)


def publish(redis_url: str, tenant: int, *markers: int, shards: int = SHARDS) -> list[str]:
    """Publish events as a backend does; return their event ids."""
    name = Settings(redis_stream_shards=shards).sharding.name_for_new(tenant)
    with Publisher(redis_url, shards=shards) as publisher:
        entries = [
            publisher.publish(
                {
                    "type": "ROUND_READY",
                    "tenant_id": tenant,
                    "branch_id": 1,
                    "entity": {"marker": marker},
                }
            )
            for marker in markers
        ]
    return [f"{entry}-{tag(name)}" for entry in entries]


def markers(found: list[Any]) -> list[int]:
    return [event["entity"]["marker"] for event in found if "entity" in event]


async def next_markers(client: WebSocketConnection, count: int) -> list[int]:
    return markers([await receive_event(client, 4) for _ in range(count)])


async def warm(gateway: Running, tenant: int) -> None:
    """Wait until the streams of a tenant are read."""
    assert await gateway.app.parts.places.wait_known(TenantId(tenant), 5)


async def recover(url: str, last_event_id: str) -> tuple[bool, list[int]]:
    async with connect(f"{url}&last_event_id={quote(last_event_id)}") as client:
        answer = await receive_event(client, 4)
        assert answer["type"] == "resumed", answer
        found = await next_markers(client, answer["count"])
        assert await received(client) == []
        return answer["recovered"], found


async def test_clients_get_the_events_of_their_tenant_in_order_and_no_other(redis_url: str) -> None:
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=ONE)) as one,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)) as other,
    ):
        for n in range(20):
            publish(redis_url, (ONE, OTHER)[n % 2], n)
        assert await next_markers(one, 10) == list(range(0, 20, 2))
        assert await next_markers(other, 10) == list(range(1, 20, 2))
        assert await received(one) == await received(other) == []


async def test_process_without_clients_reads_no_shard_and_is_ready(redis_url: str) -> None:
    publish(redis_url, ONE, 1)
    async with sharded(redis_url) as gateway:
        assert (await http(gateway.port, "/ws/health/ready")).status == 200
        detailed = (await http(gateway.port, "/ws/health/detailed")).json
        assert detailed["stream"] == {"status": "connected", "cursor": {}, "lag": 0}
        assert gateway.app.parts.ingest.received["stream"] == 0


async def test_one_unreadable_shard_costs_the_others_nothing(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.set(stream(OTHER), "not a stream")
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)),
        admitted(gateway.staff_url("waiter", tenant_id=ONE)) as one,
    ):
        publish(redis_url, ONE, 1)
        assert await next_markers(one, 1) == [1]
        await until(lambda: gateway.app.parts.streams.unreadable)
        assert (await http(gateway.port, "/ws/health/ready")).status == 200
        detailed = await http(gateway.port, "/ws/health/detailed")
        assert detailed.status == 503
        assert detailed.json["stream"]["unreadable"] == [stream(OTHER)]
        assert (await http(gateway.port, "/ws/health")).json["status"] == "degraded"
        assert (await metrics(gateway.port))["streams_unreadable"] == 1


async def test_process_is_not_ready_while_its_only_stream_cannot_be_read(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.set("events:critical", "not a stream")
    async with running(make_settings(redis_url), wait_ready=False) as gateway:
        await until(lambda: gateway.app.parts.streams.unreadable)
        assert (await http(gateway.port, "/ws/health/ready")).status == 503
        backend.delete("events:critical")
        await until(lambda: gateway.app.ready)


async def test_shard_is_read_only_where_it_has_clients(redis_url: str) -> None:
    async with (
        sharded(redis_url, redis_stream_shards_previous=SHARDS) as one,
        sharded(redis_url, redis_stream_shards_previous=SHARDS) as other,
        admitted(one.staff_url("waiter", tenant_id=ONE)) as here,
        admitted(other.staff_url("waiter", tenant_id=OTHER)) as there,
    ):
        await warm(one, ONE)
        await warm(other, OTHER)
        publish(redis_url, ONE, *range(30))
        publish(redis_url, OTHER, *range(10))
        assert await next_markers(here, 30) == list(range(30))
        assert await next_markers(there, 10) == list(range(10))
        assert set(one.app.parts.streams.cursors) == {stream(ONE)}
        assert one.app.parts.ingest.received["stream"] == 30
        assert other.app.parts.ingest.received["stream"] == 10


async def test_first_client_of_a_shard_gets_live_events_at_once(redis_url: str) -> None:
    """The reader of the other shards waits for news of those for two seconds."""
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)),
    ):
        await warm(gateway, OTHER)
        await trio.sleep(0.05)
        async with connect(gateway.staff_url("waiter", tenant_id=ONE)) as client:
            publish(redis_url, ONE, 1)
            watch = Stopwatch()
            # It may still ask to resume for half a second, unless it says something.
            await client.send_message("x")
            assert await next_markers(client, 1) == [1]
            assert watch.net < 1
            assert await received(client) == []


async def test_first_client_is_not_sent_what_came_before_it(redis_url: str) -> None:
    publish(redis_url, ONE, 1, 2, 3)
    await trio.sleep(0.01)
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=ONE)) as client,
    ):
        await warm(gateway, ONE)
        publish(redis_url, ONE, 4)
        assert await next_markers(client, 1) == [4]


async def test_events_during_the_first_reading_come_once_and_in_order(redis_url: str) -> None:
    publish(redis_url, ONE, *range(1000, 4000))  # so that the first reading takes a while
    await trio.sleep(0.01)
    async with sharded(redis_url) as gateway:
        for _ in range(3):
            async with connect(gateway.staff_url("waiter", tenant_id=ONE)) as client:
                with Publisher(redis_url, shards=SHARDS) as publisher:
                    for n in range(50):
                        event = {"tenant_id": ONE, "branch_id": 1, "entity": {"marker": n}}
                        await trio.to_thread.run_sync(
                            publisher.publish, {"type": "ROUND_READY", **event}
                        )
                assert await next_markers(client, 50) == list(range(50))
                assert await received(client) == []


async def test_resume_waits_for_the_first_reading_of_the_shard(redis_url: str) -> None:
    ids = publish(redis_url, ONE, *range(10))
    async with sharded(redis_url) as gateway:
        url = gateway.staff_url("waiter", tenant_id=ONE)
        assert await recover(url, ids[3]) == (True, [4, 5, 6, 7, 8, 9])
        publish(redis_url, NEIGHBOUR, 10)
        assert await recover(url, ids[8]) == (True, [9])


async def test_empty_id_is_answered_with_the_place_in_the_tenants_streams_alone(
    redis_url: str,
) -> None:
    async with (
        sharded(redis_url, redis_stream_shards_previous=SHARDS) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)),
    ):
        last = publish(redis_url, ONE, 1)[-1]
        async with connect(f"{gateway.staff_url('waiter', tenant_id=ONE)}&last_event_id=") as one:
            answer = await receive_event(one)
        assert answer == {
            "type": "resumed", "recovered": True, "count": 0, "last_event_id": last,
        }  # fmt: skip


async def test_refused_id_is_answered_with_the_place_in_a_shard_that_was_not_read_yet(
    redis_url: str,
) -> None:
    last = publish(redis_url, ONE, 1)[-1]
    async with (
        sharded(redis_url, redis_stream_shards_previous=SHARDS) as gateway,
        connect(f"{gateway.staff_url('waiter', tenant_id=ONE)}&last_event_id=invalid") as one,
    ):
        assert await receive_event(one) == {
            "type": "resumed", "recovered": False, "count": 0, "last_event_id": last,
        }  # fmt: skip


async def test_id_of_another_tenants_shard_is_not_recovered(redis_url: str) -> None:
    ids = publish(redis_url, OTHER, 1, 2)
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)),
    ):
        found = await recover(gateway.staff_url("waiter", tenant_id=ONE), ids[0])
        assert found == (False, [])


async def test_shard_is_given_up_some_time_after_its_last_client_and_resumed_later(
    redis_url: str,
) -> None:
    async with sharded(redis_url) as gateway:
        parts = gateway.app.parts
        parts.following._linger = 0.3
        url = gateway.staff_url("waiter", tenant_id=ONE)
        with Publisher(redis_url, shards=SHARDS) as publisher:

            def add(n: int) -> None:
                event = {"type": "ROUND_READY", "tenant_id": ONE, "branch_id": 1}
                publisher.publish({**event, "entity": {"marker": n}}, id=f"order-{n}")

            async with admitted(url) as client:
                for n in range(10):
                    add(n)
                assert await next_markers(client, 10) == list(range(10))
                async with admitted(url):
                    pass
                await trio.sleep(0.4)
                assert stream(ONE) in parts.streams.cursors  # one client is still there
                add(10)
                last = (await receive_event(client))["event_id"]
            add(11)
            await until(lambda: len(parts.history) == 12)
            with trio.fail_after(3):
                while parts.extent.end:
                    await trio.sleep(0.02)
            assert parts.streams.cursors == {}
            assert (len(parts.history), parts.history.bytes, parts.extent.expected) == (
                0,
                0,
                set(),
            )
            add(12)
            assert await recover(url, last) == (True, [11, 12])


async def test_what_memory_does_not_hold_of_a_shard_is_read_from_it(redis_url: str) -> None:
    ids = publish(redis_url, ONE, *range(50))
    async with sharded(redis_url, ws_history_events=5) as gateway:
        gateway.app.parts.following._linger = 0.2
        url = gateway.staff_url("waiter", tenant_id=ONE)
        for _ in range(2):
            assert await recover(url, ids[9]) == (True, list(range(10, 50)))
            assert await recover(url, ids[47]) == (True, [48, 49])
            await until(lambda: not gateway.app.parts.extent.end)
            assert not gateway.app.parts.older_events._ranges


async def test_client_that_comes_back_within_the_time_costs_no_new_reading(redis_url: str) -> None:
    async with sharded(redis_url) as gateway:
        url = gateway.staff_url("waiter", tenant_id=ONE)
        with capture_logs() as logs:
            async with admitted(url):
                await warm(gateway, ONE)
                [*_, last] = publish(redis_url, ONE, 1, 2)
            publish(redis_url, ONE, 3)
            await settle(gateway)
            assert await recover(url, last) == (True, [3])
        warmed = [line["stream"] for line in logs if line["event"] == "history warmed"]
        assert warmed == [BASE, stream(ONE)]


async def test_catch_up_reads_the_shard_of_a_tenant_without_clients(redis_url: str) -> None:
    ids = publish(redis_url, ONE, 1, 2, 3)
    token = make_jwt(JWT_SECRET, roles=["WAITER"], tenant_id=ONE)
    async with sharded(redis_url) as gateway:
        for since, expected in [(ids[0], [2, 3]), ("0", [1, 2, 3])]:
            path = f"/ws/catchup?branch_id=1&since={since}&token={token}"
            reply = await http(gateway.port, path)
            assert (reply.status, markers(reply.json["events"])) == (200, expected)
            assert "gateway-complete" not in reply.headers
        foreign = f"{ids[0].rsplit('-', 1)[0]}-{tag(stream(OTHER))}"
        reply = await http(gateway.port, f"/ws/catchup?branch_id=1&since={foreign}&token={token}")
        assert (reply.json["count"], reply.headers["gateway-complete"]) == (0, "false")


async def test_gap_in_a_shard_is_sent_to_its_tenants_alone(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=ONE)) as one,
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)) as other,
    ):
        for tenant, client in ((ONE, one), (OTHER, other)):
            publish(redis_url, tenant, 1, 2)
            assert await next_markers(client, 2) == [1, 2]
        backend.delete(stream(ONE))
        publish(redis_url, ONE, 3)
        messages = [await receive_event(one, 6) for _ in range(2)]
        assert {"type": "gap"} in messages
        assert markers(messages) == [3]
        publish(redis_url, OTHER, 3)
        assert await next_markers(other, 1) == [3]


async def test_event_in_the_shard_of_another_tenant_is_counted_logged_and_delivered(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        sharded(redis_url) as gateway,
        admitted(gateway.staff_url("waiter", tenant_id=ONE)),
        admitted(gateway.staff_url("waiter", tenant_id=OTHER)) as other,
    ):
        await warm(gateway, ONE)
        await warm(gateway, OTHER)
        event = (
            f'{{"type":"ROUND_READY","tenant_id":{OTHER},"branch_id":1,"entity":{{"marker":1}}}}'
        )
        with capture_logs() as logs:
            backend.xadd(stream(ONE), {"data": event})
            assert await next_markers(other, 1) == [1]
        assert "REDIS_STREAM_SHARDS" in next(
            line["event"] for line in logs if line.get("tenant") == OTHER
        )
        numbers = await metrics(gateway.port)
        assert numbers["events_misplaced_total"] == 1
        assert numbers["streams_followed"] == 3  # with the one from before the shards


async def test_process_that_reads_no_shard_knows_whether_it_can() -> None:
    with valkey() as server:
        async with sharded(server.connection_url, circuit_recovery_timeout=0.5) as gateway:
            assert gateway.app.ready
            server.kill()
            await until(lambda: not gateway.app.parts.streams.connected)
            assert (await http(gateway.port, "/ws/health/ready")).status == 503
            server.start_again()
            await until(lambda: gateway.app.ready, 10)
            async with admitted(gateway.staff_url("waiter", tenant_id=ONE)) as client:
                publish(server.connection_url, ONE, 1)
                assert await next_markers(client, 1) == [1]


# From one number of shards to another


@pytest.mark.parametrize(("old", "new"), [(1, 64), (8, 64), (64, 8), (8, 1)])
async def test_change_of_the_number_loses_and_repeats_nothing(
    redis_url: str, old: int, new: int
) -> None:
    """Gateways read both, then publishers change one after the other."""
    changes = {"redis_stream_shards": new, "redis_stream_shards_previous": old}
    tenant = next(
        t for t in range(1, 99) if shard_of(t, old) != shard_of(t, new) or 1 in (old, new)
    )
    ids = publish(redis_url, tenant, 0, 1, shards=old)
    async with running(make_settings(redis_url, **changes)) as gateway:
        url = gateway.staff_url("waiter", tenant_id=tenant)
        async with admitted(url) as client:
            last, n = ids[1], 1
            for number in (old, old, new, new, old, new, new):
                for _ in range(3):
                    n += 1
                    ids += publish(redis_url, tenant, n, shards=number)
                    await trio.sleep(0.002)  # two backends change places, not in a millisecond
            events = [await receive_event(client, 4) for _ in range(n - 1)]
            assert markers(events) == list(range(2, n + 1))
            assert [event["event_id"] for event in events] == ids[2:]
        for each in (0, 1, 2, 5, 6, 7, 8, 13, 14, 15, 16, n - 1, n):
            assert await recover(url, ids[each]) == (True, list(range(each + 1, n + 1)))
            page = f"/ws/catchup?branch_id=1&since={ids[each]}&token={url.split('token=')[1]}"
            reply = await http(gateway.port, page)
            assert markers(reply.json["events"]) == list(range(each + 1, n + 1))
        assert last == ids[1]
    async with running(make_settings(redis_url, ws_history_events=3, **changes)) as gateway:
        url = gateway.staff_url("waiter", tenant_id=tenant)
        assert await recover(url, ids[0]) == (False, [])  # it would be from two streams
        assert await recover(url, ids[n - 3]) == (True, [n - 2, n - 1, n])
        page = f"/ws/catchup?branch_id=1&since=0&token={url.split('token=')[1]}"
        assert (await http(gateway.port, page)).headers["gateway-complete"] == "false"
