"""Must reach: who is sent an event that nobody has confirmed in time, and who is told."""

import json
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import JWT_SECRET, admitted, http, receive_event, received, serving
from trio_gateway.testing import make_jwt

EVENT = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1, "sector_id": 5}


@pytest.fixture
def routes(tmp_path: Path) -> Path:
    file = tmp_path / "routes.toml"
    file.write_text(
        '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 1\n'
        'then = [{to = "floor", within = 1}, {to = "admins", within = 1}]\n'
    )
    return file


def one(redis_url: str, routes: Path, **settings: Any) -> Any:
    return serving(redis_url, "direct", ws_routes_file=routes, **settings)


async def next_events(client: WebSocketConnection, number: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with trio.fail_after(10):
        while len(found) < number:
            if (event := await receive_event(client)).get("type") != "pong":
                found.append(event)
    return found


def unheard(event: dict[str, Any]) -> tuple[str, int, int]:
    assert event["type"] == "EVENT_UNHEARD"
    entity = event["entity"]
    return entity["to"], entity["written"], entity["delivered"]


async def test_event_that_nobody_confirms_goes_from_step_to_step(
    redis_url: str, backend: "redis.Redis", routes: Path
) -> None:
    async with (
        one(redis_url, routes) as gateway,
        one(redis_url, routes) as other,
        admitted(gateway.staff_url("waiter", sub="21", sector_ids=[5])) as waiter,
        admitted(other.staff_url("waiter", sub="22", sector_ids=[6])) as colleague,
        admitted(other.staff_url("admin", sub="9", roles=["ADMIN"])) as admin,
    ):
        backend.xadd("events:critical", {"data": json.dumps(EVENT)})
        [event] = await next_events(waiter, 1)
        told = await next_events(admin, 4)
        assert told[0] == event
        assert list(map(unheard, told[1:])) == [
            ("waiters", 1, 0),
            ("floor", 2, 0),
            ("admins", 1, 0),
        ]
        for each in told[1:]:
            assert each["entity"]["event_id"] == event["event_id"]
            assert (each["sector_id"], each["branch_id"]) == (5, 1)
        assert await next_events(colleague, 1) == [event]
        for client in (waiter, colleague, admin):
            assert await received(client) == []
        token = make_jwt(JWT_SECRET, roles=["MANAGER"])
        reply = await http(
            other.port,
            f"/ws/receipts?event_id={event['event_id']}",
            headers={"Authorization": f"Bearer {token}"},
        )
        found = json.loads(reply.text)
        assert [step["to"] for step in found["steps"]] == ["floor", "admins"]
        assert found["written"] == 3


async def test_confirmed_event_goes_no_further(
    redis_url: str, backend: "redis.Redis", routes: Path
) -> None:
    async with (
        one(redis_url, routes) as gateway,
        one(redis_url, routes) as other,
        admitted(gateway.staff_url("waiter", sub="21", sector_ids=[5])) as waiter,
        admitted(other.staff_url("waiter", sub="22", sector_ids=[6])) as colleague,
        admitted(other.staff_url("admin", sub="9", roles=["ADMIN"])) as admin,
    ):
        backend.xadd("events:critical", {"data": json.dumps(EVENT)})
        [event] = await next_events(waiter, 1)
        await next_events(admin, 1)
        await trio.sleep(0.5)
        await waiter.send_message(json.dumps({"type": "ack", "last_event_id": event["event_id"]}))
        await trio.sleep(2)
        assert await received(admin) == []
        assert await received(colleague) == []
