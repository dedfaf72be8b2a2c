"""Delivery times of a service: what its processes count, and who may ask."""

import json
import time
from pathlib import Path
from typing import Any

import redis
import trio

from tests.support.api_keys import call, write_keys
from tests.support.gateways import (
    admitted,
    make_settings,
    receive_event,
    running,
    serving,
    until,
)
from trio_gateway.core.time_counts import quantiles

CALL = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1}
KEYS: dict[str, dict[str, Any]] = {"all": {}, "one": {"tenants": [1]}}


def settings_with_receipts(folder: Path) -> dict[str, Any]:
    """Those of a gateway with these keys that tracks calls."""
    routes = folder / "routes.toml"
    routes.write_text("[routes.SERVICE_CALL_CREATED]\nreceipt = true\n")
    return {"ws_api_keys_file": write_keys(folder, KEYS), "ws_routes_file": routes}


async def test_figures_are_those_of_all_processes_and_of_the_tenants_of_the_key(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    settings = settings_with_receipts(tmp_path)
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings) as other,
        admitted(one.staff_url("waiter", sub="21")) as here,
        admitted(one.staff_url("waiter", sub="22")) as colleague,
        admitted(other.staff_url("waiter", sub="23")) as there,
        admitted(other.staff_url("waiter", tenant_id=2)) as stranger,
    ):
        await until(lambda: all(g.app.parts.cluster.link.connected for g in (one, other)))  # type: ignore[union-attr]
        for tenant in (1, 1, 2):
            backend.xadd("events:critical", {"data": json.dumps(CALL | {"tenant_id": tenant})})
        ids = [(await receive_event(here))["event_id"] for _ in range(2)]
        for client, number in ((colleague, 2), (there, 2), (stranger, 1)):
            for _ in range(number):
                await receive_event(client)
        await here.send_message(json.dumps({"type": "ping", "last_event_id": ids[1]}))
        await receive_event(here)

        found = (await call(other.port, "slo", key="all")).json
        assert {each["tenant_id"] for each in found["tenants"]} == {1, 2}
        assert (found["seconds"], found["more"], found["complete"], found["missing"]) == (
            1.0, 0, True, [],
        )  # fmt: skip
        assert found["others"]["last_hour"]["written"]["count"] == 0
        bound = (await call(one.port, "slo", key="one")).json
        assert bound["others"] is None
        (mine,) = bound["tenants"]
        assert mine == next(each for each in found["tenants"] if each["tenant_id"] == 1)
        for window in (mine["last_5_minutes"], mine["last_hour"]):
            assert window["written"]["count"] == 4  # two events, on two processes
            assert 0 < window["written"]["p50"] <= window["written"]["p99"] < 5
            assert (window["delivered"]["count"], window["delivered"]["unconfirmed"]) == (2, 4)

        assert (await call(one.port, "slo?tenant_id=2", key="one")).status == 403
        (only,) = (await call(one.port, "slo?tenant_id=2", key="all")).json["tenants"]
        assert only["last_hour"]["written"]["count"] == 1
        assert (await call(one.port, "slo?limit=1", key="all")).json["more"] == 1
        for query in ("limit=0", "limit=1001", "limit=x", "tenant_id=", "tenant_id=0"):
            assert (await call(one.port, f"slo?{query}", key="all")).status == 422, query


async def test_one_ack_to_each_process_leaves_nothing_of_a_burst_unconfirmed(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    settings = settings_with_receipts(tmp_path)
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings) as other,
        admitted(one.staff_url("waiter", sub="21")) as here,
        admitted(other.staff_url("waiter", sub="22")) as there,
    ):
        await until(lambda: all(g.app.parts.cluster.link.connected for g in (one, other)))  # type: ignore[union-attr]
        pipeline = backend.pipeline()
        for _ in range(3000):
            pipeline.xadd("events:critical", {"data": json.dumps(CALL)})
        pipeline.execute()
        for client in (here, there):
            for _ in range(3000):
                event = await receive_event(client)
            ack = {"type": "ping", "last_event_id": event["event_id"]}
            await client.send_message(json.dumps(ack))
            await receive_event(client)
        (found,) = (await call(one.port, "slo", key="one")).json["tenants"]
        assert found["last_hour"]["delivered"]["count"] == 6000
        assert found["last_hour"]["delivered"]["unconfirmed"] == 0


async def test_a_process_that_hung_was_late_whatever_its_wall_clock_shows(
    redis_url: str, backend: "redis.Redis"
) -> None:
    settings = make_settings(redis_url, ws_slo_seconds=0.4)
    async with (
        running(settings, clock=lambda: time.time() + 600) as gateway,
        admitted(gateway.staff_url("waiter")) as waiter,
    ):
        for seconds in (0, 0.5):
            backend.xadd("events:critical", {"data": json.dumps(CALL)})
            time.sleep(seconds)  # the loop hangs
            await receive_event(waiter)
        found = gateway.app.parts.dispatch.times.figures(1, trio.current_time()).last_hour.written
    assert (found.count, found.over) == (2, 1)
    longest = quantiles(found)[2]
    assert longest is not None
    assert 0.45 <= longest < 5
