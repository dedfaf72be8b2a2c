"""The history of a branch has every durable event of it, whoever the event is for."""

import random
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import pytest
import redis

from tests.support.api_keys import call, publish, write_keys
from tests.support.gateways import Running, admitted, serving, settle, until
from trio_gateway.core.routes_file import read_routes

ROUTES: Final = """
[routes.FOR_DINERS]
to = ["diners"]
durable = true
[routes.FOR_WAITERS]
to = ["waiters"]
durable = true
[routes.FOR_NOBODY]
to = []
durable = true
[routes.CART_SYNC]
to = ["diners"]
"""
KINDS: Final = ("ROUND_READY", "FOR_DINERS", "FOR_WAITERS", "FOR_NOBODY", "CART_SYNC", "UNKNOWN")
TABLE: Final = read_routes(ROUTES)


async def history(gateway: Running, query: str, *, since: object = 0) -> list[dict[str, Any]]:
    """The events of all pages."""
    found: list[dict[str, Any]] = []
    while since is not None:
        reply = await call(gateway.port, f"history?{query}&since={since}")
        assert reply.status == 200, reply.text
        assert "gateway-complete" not in reply.headers
        assert reply.json["count"] == len(reply.json["events"])
        found += reply.json["events"]
        since = reply.json.get("next")
    return found


@pytest.mark.parametrize("way", ["raw", "routed", "from the stream", "sharded"])
async def test_history_has_all_durable_events_of_a_branch_and_of_the_whole_tenant_in_order(
    redis_url: str, backend: "redis.Redis", tmp_path: Path, way: str
) -> None:
    (tmp_path / "routes.toml").write_text(ROUTES)
    settings: dict[str, Any] = {
        "ws_api_keys_file": write_keys(tmp_path),
        "ws_routes_file": tmp_path / "routes.toml",
    }
    if way == "from the stream":
        settings["ws_history_events"] = 20
    if way == "sharded":  # nobody here has followed these shards
        settings["redis_stream_shards"] = 8
    chooser = random.Random(5)
    events: list[dict[str, Any]] = [
        {
            "type": chooser.choice(KINDS),
            "tenant_id": chooser.choice([1, 2]),
            "branch_id": chooser.choice([0, 1, 2]),
            "session_id": chooser.choice([None, 456]),
            "sector_id": chooser.choice([None, 5]),
            "n": n,
        }
        for n in range(300)
    ]
    async with serving(redis_url, "direct", **settings) as gateway, AsyncExitStack() as stack:
        if way == "routed":
            for tenant in (1, 2):
                url = gateway.staff_url("admin", tenant_id=tenant, branch_ids=[1, 2])
                await stack.enter_async_context(admitted(url))
        answers = await publish(gateway.port, events)
        ids = [answer.get("event_id") for answer in answers]
        assert [number is not None for number in ids] == [
            TABLE.is_durable(event["type"]) for event in events
        ]
        if way != "sharded":
            await settle(gateway)
        for tenant in (1, 2):
            for branch in (0, 1, 2):
                wanted = [
                    event | {"event_id": its_id}
                    for event, its_id in zip(events, ids, strict=True)
                    if its_id is not None
                    and event["tenant_id"] == tenant
                    and event["branch_id"] in {0, branch}
                ]
                query = f"tenant_id={tenant}&branch_id={branch}"
                assert await history(gateway, query) == wanted
                middle = wanted[len(wanted) // 2]
                rest = wanted[len(wanted) // 2 + 1 :]
                assert await history(gateway, query, since=middle["event_id"]) == rest


async def test_history_has_an_event_once_whatever_steps_followed(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    (tmp_path / "routes.toml").write_text(
        """
        [routes.SERVICE_CALL_CREATED]
        to = ["waiters"]
        must_reach = "waiters"
        within = 0.1
        then = [{to = "floor", within = 0.1}, {to = "admins", within = 0.1}]
        """
    )
    keys, routes = write_keys(tmp_path), tmp_path / "routes.toml"
    async with serving(
        redis_url, "direct", ws_api_keys_file=keys, ws_routes_file=routes
    ) as gateway:
        call = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1}
        await publish(gateway.port, [call])
        await until(lambda: backend.xlen("events:critical") == 6)  # two steps, three reports
        await settle(gateway)
        found = await history(gateway, "tenant_id=1&branch_id=1")
    assert [each["type"] for each in found] == ["SERVICE_CALL_CREATED", *["EVENT_UNHEARD"] * 3]


async def test_a_history_that_is_not_complete_says_so_and_a_bad_query_names_the_field(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    keys = {"mine": {"tenants": [1]}}
    changes = {"ws_api_keys_file": write_keys(tmp_path, keys)}
    async with serving(redis_url, "direct", **changes) as gateway:
        for query, status, named in (
            ("branch_id=1&since=0", 422, "tenant_id"),
            ("tenant_id=1&since=0", 422, "branch_id"),
            ("tenant_id=1&branch_id=-1&since=0", 422, "branch_id"),
            ("tenant_id=1&branch_id=1", 422, "since"),
            ("tenant_id=1&branch_id=1&since=1796028486287", 422, "since"),
            ("tenant_id=2&branch_id=1&since=0", 403, "tenant_id"),
            ("tenant_id=2", 403, "tenant_id"),
        ):
            reply = await call(gateway.port, f"history?{query}", key="mine")
            assert (reply.status, named in reply.json["error"]) == (status, True), query
        query = "history?tenant_id=1&branch_id=1&since=5-0-4723"
        reply = await call(gateway.port, query, key="mine")
        assert (reply.status, reply.headers["gateway-complete"]) == (200, "false")
