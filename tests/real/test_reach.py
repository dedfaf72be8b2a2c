"""Must reach: who is sent an event that nobody has confirmed in time, and who is told."""

import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import redis
import trio

from tests.support.api_keys import secret_of, write_keys
from tests.support.gateways import Running, admitted, connect, http, received, until
from tests.support.receipts import (
    EVENT,
    next_events,
    numbers,
    one,
    publish,
    receipts,
    say,
    waiter_at,
)
from trio_gateway.core.event_ids import read_position, tag
from trio_gateway.core.receipts import Place, TrackedEvent
from trio_gateway.runtime.reach import Due
from trio_gateway.stats import snapshot

WITHIN = 0.4  # seconds of each step
OVER = WITHIN + 1  # until it is over for certain
TO_FLOOR = f"""
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = {WITHIN}
then = [{{to = "floor", within = {WITHIN}}}]
"""
ROUTES = TO_FLOOR.replace("}]", f'}}, {{to = "admins", within = {WITHIN}}}]')


@asynccontextmanager
async def two(
    redis_url: str, folder: Path, routes: str = TO_FLOOR, **settings: Any
) -> AsyncIterator[tuple[Running, Running]]:
    async with (
        one(redis_url, folder, routes, **settings) as gateway,
        one(redis_url, folder, routes, **settings) as other,
    ):
        yield gateway, other


def unheard(event: dict[str, Any]) -> tuple[str, int, int]:
    assert event["type"] == "EVENT_UNHEARD"
    entity = event["entity"]
    return entity["to"], entity["written"], entity["delivered"]


def reports(backend: "redis.Redis") -> list[tuple[str, str, int]]:
    """The reports in the stream: of which entry and audience, and to how many it was written."""
    entries: Any = backend.xrange("events:critical")
    events = [json.loads(fields[b"data"]) for _, fields in entries]
    found = [each["entity"] for each in events if each["type"] == "EVENT_UNHEARD"]
    return [(each["event_id"].rpartition("-")[0], each["to"], each["written"]) for each in found]


async def test_event_that_nobody_confirms_goes_from_step_to_step(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        two(redis_url, tmp_path, ROUTES) as (gateway, other),
        waiter_at(gateway) as waiter,
        waiter_at(other, "22", 6) as colleague,
        admitted(other.staff_url("admin", sub="9")) as admin,
    ):
        publish(backend)
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
        found = await receipts(other, event["event_id"])
        assert [step["to"] for step in found["steps"]] == ["floor", "admins"]
        assert found["written"] == 3


@pytest.mark.parametrize(("ago", "late"), [(0, "no"), (1100, "yes")])
@pytest.mark.parametrize(("number", "outcome"), [(0, "escalation"), (1, "report")])
async def test_each_step_is_counted_once_over_all_processes(
    redis_url: str,
    backend: "redis.Redis",
    tmp_path: Path,
    ago: int,
    late: str,
    number: int,
    outcome: str,
) -> None:
    """``ago``: its deadline was so many ms ago when it was taken."""
    async with two(redis_url, tmp_path, TO_FLOOR.replace("0.4", "60")) as gateways:
        place = Place(tag("events:critical"), read_position(publish(backend)))
        steps = gateways[0].app.parts.settings.routes["SERVICE_CALL_CREATED"].steps
        now = int(time.time() * 1000)
        about = TrackedEvent("SERVICE_CALL_CREATED", 1, 1, now)
        due = Due(place, about, 5, None, steps, [], number, now - ago, now + 60_000)
        for each in gateways:
            assert await each.app.parts.steps.take([due]) == [0]
        counted = Counter[str]()
        for each in gateways:
            counted.update(snapshot(each.app.parts).numbers["wsgateway_steps_total"])
        assert +counted == {f"{outcome},{late}": 1}


async def test_confirmed_event_goes_no_further(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    """Also if its receipts are kept for less than its steps take, and it was published twice."""
    async with (
        two(redis_url, tmp_path, TO_FLOOR.replace("0.4", "1.4", 1), ws_receipt_ttl=1) as (
            gateway,
            other,
        ),
        waiter_at(gateway) as waiter,
        waiter_at(other, "22", 6) as colleague,
    ):
        publish(backend, id="a")
        publish(backend, id="a")
        [event] = await next_events(waiter, 1)
        await say(waiter, type="ack", last_event_id=event["event_id"])
        await trio.sleep(1 + OVER)
        assert reports(backend) == []
        assert await received(colleague) == []


async def test_confirmation_right_before_a_process_stops_counts(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with one(redis_url, tmp_path, TO_FLOOR) as other:
        async with (
            one(redis_url, tmp_path, TO_FLOOR) as gateway,
            waiter_at(gateway) as waiter,
        ):
            publish(backend)
            [event] = await next_events(waiter, 1)
            await say(waiter, type="ack", last_event_id=event["event_id"])
            gateway.stop.set()
        assert numbers(await receipts(other, event["event_id"])) == (1, 1, 0)


async def test_escalated_event_is_confirmed_and_seen_by_the_id_of_the_original(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    async with (
        one(redis_url, tmp_path, TO_FLOOR.replace(f"{WITHIN}}}", "1.4}")) as gateway,
        waiter_at(gateway, "22", 6) as colleague,
    ):
        publish(backend)
        publish(backend, type="ROUND_READY", sector_id=6)
        between, event = await next_events(colleague, 2)
        assert event["type"] == "SERVICE_CALL_CREATED"

        # Who comes back with an event before the escalation need not have that.
        back = gateway.staff_url("waiter", sub="22", sector_ids=[6])
        async with connect(f"{back}&last_event_id={between['event_id']}") as again:
            assert (await next_events(again, 1))[0]["recovered"]
            assert numbers(await receipts(gateway, event["event_id"])) == (1, 0, 0)

        await say(colleague, type="ack", last_event_id=event["event_id"])
        await say(colleague, type="seen", event_id=event["event_id"])
        assert numbers(await receipts(gateway, event["event_id"])) == (1, 1, 1)
        assert gateway.app.parts.receipts.ignored == 0
        await trio.sleep(1 + OVER)
        assert [to for _, to, _ in reports(backend)] == ["waiters"]


async def test_each_device_of_a_user_counts_for_its_own_audiences(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    """On one endpoint a user is one client: here a manager, and a waiter of the sector."""
    async with (
        one(redis_url, tmp_path, TO_FLOOR) as gateway,
        waiter_at(gateway, "21", 6, roles=["MANAGER"]) as manager,
    ):
        before = publish(backend, type="ROUND_READY")
        publish(backend)
        first, event = await next_events(manager, 2)
        assert first["event_id"].startswith(before)
        url = gateway.staff_url("waiter", sub="21", sector_ids=[5])
        async with connect(f"{url}&last_event_id={first['event_id']}") as waiter:
            assert [each["type"] for each in await next_events(waiter, 2)] == [
                "resumed",
                "SERVICE_CALL_CREATED",
            ]
            await say(waiter, type="ack", last_event_id=event["event_id"])
        assert numbers(await receipts(gateway, event["event_id"])) == (1, 1, 0)
        await trio.sleep(OVER)
        assert reports(backend) == []


async def test_waiters_that_stand_in_for_an_uncovered_sector_count_as_its_waiters(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    settings = {"ws_uncovered_sector": "branch"}
    async with (
        two(redis_url, tmp_path, **settings) as (gateway, _),
        waiter_at(gateway, "22", 6) as waiter,
    ):
        entries = [publish(backend, n=n) for n in range(2)]
        first, _ = await next_events(waiter, 2)
        await say(waiter, type="ack", last_event_id=first["event_id"])
        await until(lambda: len(reports(backend)) == 2)
        assert reports(backend) == [(entries[1], "waiters", 1), (entries[1], "floor", 1)]

        # The same for one that comes later, and is sent what it missed.
        url = gateway.staff_url("waiter", sub="23", sector_ids=[7])
        async with connect(f"{url}&last_event_id={first['event_id']}") as late:
            _, event = await next_events(late, 2)
            await say(late, type="seen", event_id=event["event_id"])
            assert numbers(await receipts(gateway, event["event_id"])) == (2, 1, 1)


async def test_who_is_sent_it_as_an_admin_is_no_waiter_of_the_sector(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    settings = {"ws_uncovered_sector": "branch"}
    async with (
        one(redis_url, tmp_path, TO_FLOOR, **settings) as gateway,
        waiter_at(gateway) as waiter,
        waiter_at(gateway, "9", 6, roles=["MANAGER"]) as manager,
    ):
        publish(backend)
        await next_events(waiter, 1)
        [event] = await next_events(manager, 1)
        await say(manager, type="ack", last_event_id=event["event_id"])
        await until(lambda: reports(backend))
        assert [(to, written) for _, to, written in reports(backend)] == [("waiters", 1)]


async def test_nobody_but_the_gateway_takes_steps(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    """A backend of one tenant could end the steps of another one's event."""
    keys = write_keys(tmp_path, {"one": {"scopes": ["publish"], "tenants": [1]}})
    async with one(redis_url, tmp_path, TO_FLOOR, ws_api_keys_file=keys) as gateway:
        entry = publish(backend, tenant_id=2)
        forged = {
            "type": "EVENT_ESCALATED", "tenant_id": 1, "branch_id": 1, "event_id": f"{entry}-4723",
            "of": "SERVICE_CALL_CREATED", "to": "floor", "unless": [], "step": 1, "event": EVENT,
        }  # fmt: skip
        reply = await http(
            gateway.port,
            "/ws/api/publish",
            method="POST",
            headers={"Authorization": f"Bearer {secret_of('one')}"},
            json_body=json.dumps({"events": [forged]}, separators=(",", ":")).encode(),
        )
        assert "error" in reply.json["published"][0]
        await until(lambda: len(reports(backend)) == 2)
        assert [to for _, to, _ in reports(backend)] == ["waiters", "floor"]
