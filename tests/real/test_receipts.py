"""Receipts: who was sent an event, has it, and has seen it."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import redis
from trio_websocket import ConnectionClosed, WebSocketConnection

from tests.support.api_keys import call, write_keys
from tests.support.gateways import (
    TABLE_SECRET,
    Running,
    admitted,
    closed,
    connect,
    http,
    receive_event,
    until,
)
from tests.support.receipts import ask, numbers, post, publish, receipts, say, waiter_at
from tests.support.receipts import one as gateway_with
from trio_gateway.core.audiences import TenantId
from trio_gateway.core.shards import shard_of
from trio_gateway.testing import make_table_token

ROUTES = "[routes.SERVICE_CALL_CREATED]\nreceipt = true\n[routes.CHECK_PAID]\nreceipt = true\n"


def one(redis_url: str, folder: Path, **settings: Any) -> Any:
    return gateway_with(redis_url, folder, ROUTES, **settings)


@asynccontextmanager
async def called(
    redis_url: str, backend: "redis.Redis", folder: Path, **settings: Any
) -> AsyncIterator[tuple[Running, WebSocketConnection, str]]:
    """A gateway with a waiter that has received a service call, and the id of the call."""
    async with (
        one(redis_url, folder, **settings) as gateway,
        waiter_at(gateway) as waiter,
    ):
        publish(backend)
        yield gateway, waiter, (await receive_event(waiter))["event_id"]


async def test_each_client_has_the_state_that_it_confirmed(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        one(redis_url, tmp_path) as gateway,
        waiter_at(gateway) as waiter,
        waiter_at(gateway, "22") as other,
        admitted(gateway.staff_url("admin", sub="9", roles=["ADMIN"])) as admin,
    ):
        publish(backend)
        event_id = (await receive_event(waiter))["event_id"]
        await receive_event(other)
        await receive_event(admin)
        assert numbers(await receipts(gateway, event_id)) == (3, 0, 0)
        await say(waiter, type="ack", last_event_id=event_id)
        await say(other, type="seen", event_id=event_id)
        found = await receipts(gateway, event_id)
    assert numbers(found) == (3, 2, 1)
    assert found["type"] == "SERVICE_CALL_CREATED"
    assert found["event_id"] == event_id
    assert (found["complete"], found["missing"], found["steps"]) == (True, [], [])
    assert [(each["user_id"], each["endpoint"], each["state"]) for each in found["by"]] == [
        ("9", "admin", "written"),
        ("21", "waiter", "delivered"),
        ("22", "waiter", "seen"),
    ]
    assert all(found["at"] - 1 <= each["at"] <= found["at"] + 10 for each in found["by"])


async def test_ping_confirms_everything_up_to_the_event_that_it_names(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with one(redis_url, tmp_path) as gateway, waiter_at(gateway) as waiter:
        ids = []
        for n in range(3):
            publish(backend, n=n)
            ids.append((await receive_event(waiter))["event_id"])
        await say(waiter, type="ping", last_event_id=ids[1])
        states = [numbers(await receipts(gateway, each)) for each in ids]
    assert states == [(1, 1, 0), (1, 1, 0), (1, 0, 0)]


async def test_ids_that_were_not_sent_on_the_connection_are_ignored_and_counted(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        one(redis_url, tmp_path) as gateway,
        waiter_at(gateway) as waiter,
        waiter_at(gateway, "22", 6) as elsewhere,
    ):
        log = gateway.app.parts.receipts
        publish(backend)
        event_id = (await receive_event(waiter))["event_id"]
        async with waiter_at(gateway, "23") as late:
            for n, client in enumerate((elsewhere, late)):
                await say(client, type="ack", last_event_id=event_id)
                await say(client, type="ping", last_event_id=event_id)
                await say(client, type="seen", event_id=event_id)
                assert log.ignored == 3 * n + 3
        for n, invalid in enumerate(["", "x", 5, None, "0-0-none", "1-1-4723.1-1-aaaa"]):
            await say(waiter, type="ack", last_event_id=invalid)
            assert log.ignored == 7 + n
        found = await receipts(gateway, event_id)
    assert numbers(found) == (1, 0, 0)


async def test_acks_are_free_until_there_are_more_than_events(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with one(redis_url, tmp_path) as gateway, waiter_at(gateway) as waiter:
        for n in range(40):
            publish(backend, n=n)
        ids = [(await receive_event(waiter))["event_id"] for _ in range(40)]
        for each in ids:
            await waiter.send_message(json.dumps({"type": "ack", "last_event_id": each}))
        await say(waiter, type="noted")
        with suppress(ConnectionClosed):
            for _ in range(30):
                await waiter.send_message(json.dumps({"type": "ack", "last_event_id": ids[-1]}))
        assert (await closed(waiter))[0] == 4029


async def test_client_that_comes_back_with_an_id_has_what_it_was_sent_before(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with one(redis_url, tmp_path) as gateway, one(redis_url, tmp_path) as other:
        async with waiter_at(gateway) as waiter:
            publish(backend)
            event_id = (await receive_event(waiter))["event_id"]
        assert numbers(await receipts(gateway, event_id)) == (1, 0, 0)
        url = other.staff_url("waiter", sub="21", sector_ids=[5])
        async with connect(url) as monitor:  # shows its events to nobody
            resume = {"type": "resume", "last_event_id": event_id, "confirm": False}
            await monitor.send_message(json.dumps(resume))
            assert (await receive_event(monitor))["recovered"] is True
            assert numbers(await receipts(other, event_id)) == (1, 0, 0)
        async with connect(f"{url}&last_event_id={event_id}") as waiter:
            assert (await receive_event(waiter))["recovered"] is True
            assert numbers(await receipts(other, event_id)) == (1, 1, 0)
        # Somebody who was never sent it proves nothing.
        url = other.staff_url("waiter", sub="22", sector_ids=[5])
        async with connect(f"{url}&last_event_id={event_id}") as waiter:
            await receive_event(waiter)
            assert numbers(await receipts(other, event_id)) == (1, 1, 0)


async def test_receipts_by_http_are_those_of_the_credential(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        one(redis_url, tmp_path) as gateway,
        admitted(gateway.diner_url(session_id=456, table_id=10)) as diner,
    ):
        publish(backend, type="CHECK_PAID", session_id=456)
        event_id = (await receive_event(diner))["event_id"]
        mine = make_table_token(TABLE_SECRET, session_id=456)
        for bad in ("", "[]", "{}", '{"event_id":1}', '{"event_id":"x"}', "\ud800", "{" * 5000):
            assert await post(gateway, mine, bad.encode("utf-8", "surrogatepass")) == 422
        assert await post(gateway, "nonsense", {"event_id": event_id}) == 401
        other = make_table_token(TABLE_SECRET, session_id=457)
        assert await post(gateway, other, {"event_id": event_id}) == 204
        assert numbers(await receipts(gateway, event_id)) == (1, 0, 0)
        assert await post(gateway, mine, {"last_event_id": event_id}) == 204
        assert numbers(await receipts(gateway, event_id)) == (1, 1, 0)
        assert await post(gateway, mine, {"event_id": event_id}) == 204
        found = await receipts(gateway, event_id)
    assert numbers(found) == (1, 1, 1)
    assert found["by"][0]["session_id"] == 456


async def test_receipts_are_for_the_admins_of_the_branch(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with called(redis_url, backend, tmp_path) as (gateway, waiter, event_id):
        publish(backend, type="ROUND_READY")
        untracked = (await receive_event(waiter))["event_id"]
        assert (await ask(gateway, event_id)).status == 200
        for claims in ({"tenant_id": 2}, {"branch_ids": [2]}):
            assert (await ask(gateway, event_id, **claims)).status == 404
        assert (await ask(gateway, event_id, roles=["WAITER"])).status == 403
        assert (await ask(gateway, untracked)).status == 404
        assert (await ask(gateway, "1-1-4723")).status == 404
        assert (await ask(gateway, "1-1-ffff")).status == 404  # of no stream that is read here
        for bad in ("", "x", "0-0-none", "1-1-zzzz", "1-1-4723.1-1-4724"):
            assert (await ask(gateway, bad)).status == 422
            assert (await http(gateway.port, f"/ws/receipts?event_id={bad}")).status == 401


async def test_receipts_outlive_the_process_and_an_event_that_nobody_received_has_none(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with one(redis_url, tmp_path) as survivor:
        async with called(redis_url, backend, tmp_path) as (gateway, waiter, event_id):
            await say(waiter, type="ack", last_event_id=event_id)
            await until(lambda: gateway.app.parts.receipt_writing.is_idle)
        assert numbers(await receipts(survivor, event_id)) == (1, 1, 0)
        entry = publish(backend, branch_id=3)
        token = event_id.rpartition("-")[2]
        reply = await ask(survivor, f"{entry}-{token}", branch_ids=[3])
        assert reply.status == 200
        assert numbers(json.loads(reply.text)) == (0, 0, 0)


async def test_api_key_with_the_scope_read_may_ask_for_its_tenants(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    keys: dict[str, dict[str, Any]] = {
        "one": {"scopes": ["read"], "tenants": [1]},
        "two": {"tenants": [2]},
        "all": {},
    }
    file = write_keys(tmp_path, keys)
    async with called(redis_url, backend, tmp_path, ws_api_keys_file=file) as (
        gateway,
        _,
        event_id,
    ):
        path = f"receipts?event_id={event_id}"
        replies = [await call(gateway.port, path, key=key) for key in keys]
        assert [each.status for each in replies] == [200, 404, 200]
        assert numbers(replies[0].json) == (1, 0, 0)
        assert (await call(gateway.port, "receipts?event_id=x", key="one")).status == 422


async def test_event_of_the_whole_tenant_names_to_a_manager_those_of_its_branches(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    routes = "[routes.ENTITY_CREATED]\nreceipt = true\n"
    keys = write_keys(tmp_path, {"all": {}})
    async with (
        gateway_with(redis_url, tmp_path, routes, ws_api_keys_file=keys) as gateway,
        admitted(gateway.staff_url("admin", sub="1", branch_ids=[1, 3])) as one_,
        admitted(gateway.staff_url("admin", sub="2", branch_ids=[2])) as two,
    ):
        publish(backend, type="ENTITY_CREATED", branch_id=0, sector_id=None)
        event_id = (await receive_event(one_))["event_id"]
        await receive_event(two)
        for branches, named in (([1], ["1"]), ([2], ["2"]), ([3, 2], ["1", "2"]), ([4], [])):
            found = await receipts(gateway, event_id, branch_ids=branches)
            assert [each["user_id"] for each in found["by"]] == named
            assert numbers(found) == (2, 0, 0)
        reply = await call(gateway.port, f"receipts?event_id={event_id}")
        assert len(reply.json["by"]) == 2


async def test_receipts_of_a_shard_that_a_process_reads_only_since_now(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    """Confirmed on a connection that came before its stream was read, and at another process."""
    stream = "events:critical:{0}"
    shards = 2
    assert shard_of(1, shards) == 0
    publish(backend, stream)
    async with (
        one(redis_url, tmp_path, redis_stream_shards=shards) as gateway,
        one(redis_url, tmp_path, redis_stream_shards=shards) as other,
        admitted(gateway.diner_url(session_id=456, table_id=10)) as diner,
    ):
        assert await gateway.app.parts.places.wait_known(TenantId(1), 5)
        publish(backend, stream, type="CHECK_PAID", session_id=456)
        publish(backend, stream, type="ROUND_READY", session_id=456)
        event_id = (await receive_event(diner))["event_id"]
        later = (await receive_event(diner))["event_id"]
        assert numbers(await receipts(gateway, event_id)) == (1, 0, 0)
        await say(diner, type="ping", last_event_id=later)
        assert numbers(await receipts(gateway, event_id)) == (1, 1, 0)
        token = make_table_token(TABLE_SECRET, session_id=456)
        assert await post(other, token, {"event_id": event_id}) == 204
        assert numbers(await receipts(other, event_id)) == (1, 1, 1)


async def test_receipts_that_cannot_be_written_are_no_answer(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with called(redis_url, backend, tmp_path) as (gateway, waiter, event_id):
        assert (await ask(gateway, event_id)).status == 200
        backend.config_set("maxmemory", 1)
        try:
            await say(waiter, type="ack", last_event_id=event_id)
            assert (await ask(gateway, event_id)).status == 503
        finally:
            backend.config_set("maxmemory", 0)
