"""The path of an event: over HTTP, for backends, and on the command line."""

import json
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from jsonschema import Draft202012Validator

from tests.support import receipts
from tests.support.api_keys import call, write_keys
from tests.support.commands import SECRETS, run
from tests.support.gateways import (
    JWT_SECRET,
    Reachable,
    admitted,
    http,
    receive_event,
    received,
    serving,
    until,
)
from tests.support.sockets import dialled
from trio_gateway.core.event_ids import tag
from trio_gateway.core.shards import Sharding
from trio_gateway.testing import make_jwt, make_payload
from trio_gateway.web.static import OPENAPI

STREAM = "events:critical"
CALL: dict[str, Any] = {"type": "SERVICE_CALL_CREATED", "sector_id": 5}
ROUTES = """
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = 1
then = [{to = "floor", within = 30}]
[routes.FLOOD]
to = ["waiters"]
"""


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    routes = tmp_path / "routes.toml"
    routes.write_text(ROUTES)
    keys = write_keys(tmp_path, {"all": {}, "two": {"tenants": [2]}})
    return {"ws_routes_file": routes, "ws_api_keys_file": keys}


def publish(backend: "redis.Redis", **keys: Any) -> str:
    """Publish an event; return its event id."""
    entry: Any = backend.xadd(STREAM, {"data": make_payload(**keys)})
    return f"{entry.decode()}-{tag(STREAM)}"


ask = partial(receipts.ask, path="/ws/why")


async def path_of(gateway: Reachable, event_id: str) -> Any:
    reply = await ask(gateway, event_id)
    assert reply.status == 200, reply.text
    return reply.json


async def command(redis_url: str, routes: Path, *arguments: str, **settings: str) -> Any:
    env = SECRETS | {"REDIS_URL": redis_url, "WS_ROUTES_FILE": str(routes)} | settings
    return await trio.to_thread.run_sync(partial(run, *arguments, env=env))


async def test_path_tells_of_a_frozen_client_and_of_the_step_that_followed(
    redis_url: str, backend: "redis.Redis", settings: dict[str, Any]
) -> None:
    async with (
        serving(redis_url, "direct", **settings) as gateway,
        dialled(gateway.port, receive_buffer=4096) as frozen,
        admitted(gateway.staff_url("waiter", sub="22", sector_ids=[6])) as colleague,
        admitted(gateway.staff_url("admin", sub="9", roles=["ADMIN"])) as admin,
    ):
        token = make_jwt(JWT_SECRET, sub="21", sector_ids=[5])
        await frozen.upgrade(f"/ws/waiter?token={token}")
        hub = gateway.app.parts.hub
        await until(lambda: len(hub) == 3 and not hub.held)
        for n in range(100):
            flood = make_payload("FLOOD", sector_id=5, n=n, x="x" * 50_000)
            backend.publish("channel:branch:1:waiters", flood)
        await until(lambda: any(each.waiting_bytes for each in hub.connections))
        event_id = publish(backend, **CALL)

        assert (await receive_event(colleague, 5))["event_id"] == event_id
        path = await path_of(gateway, event_id)
        assert [(step["to"], step["state"]) for step in path["steps"]] == [
            ("waiters", "unheard"), ("floor", "running")
        ]  # fmt: skip
        await colleague.send_message(json.dumps({"type": "ack", "last_event_id": event_id}))
        assert await received(colleague) == []
        path = await path_of(gateway, event_id)
        assert {client["user_id"]: client["state"] for client in path["clients"]} == {
            "9": "written", "21": "sent", "22": "delivered"
        }  # fmt: skip
        assert "Sent, not taken by its connection: user 21 (waiter)." in path["summary"]
        assert path["steps"][1]["state"] == "confirmed"
        reply = await call(gateway.port, f"receipts?event_id={event_id}")
        assert [each["user_id"] for each in reply.json["by"]] == ["9", "22"]

        described = (await http(gateway.port, OPENAPI)).json
        schema = {"$ref": "#/components/schemas/EventPath", "components": described["components"]}
        Draft202012Validator(schema).validate(path)

        # The events that tell of it lead to it.
        assert (await receive_event(admin))["event_id"] == event_id
        report = await receive_event(admin)
        entries: Any = backend.xrevrange(STREAM, count=2)
        ids = {f"{entry.decode()}-{tag(STREAM)}" for entry, _ in entries}
        assert report["event_id"] in ids
        for each in ids:
            found = await path_of(gateway, each)
            assert (found["event_id"], found["type"]) == (event_id, CALL["type"])
            assert found["summary"][0].startswith("You asked for the EVENT_")

        ask_command = partial(command, redis_url, settings["ws_routes_file"])
        done = await ask_command("why", event_id, "--json", WS_CLUSTER="true")
        assert (done.exit_code, done.stderr) == (0, "")
        shown = json.loads(done.stdout)
        assert shown | {"now": 0, "missing": []} == path | {"now": 0}
        done = await ask_command("why", event_id.rpartition("-")[0])  # the entry's
        lines = done.stdout.splitlines()
        assert (done.exit_code, lines[0]) == (0, f"SERVICE_CALL_CREATED  {event_id}")
        assert "  must reach  waiters within 1 s, then floor within 30 s" in lines
        assert lines[-3].split()[:3] == ["user", "9", "(admin)"]
        done = await ask_command("receipts", event_id, "--json")
        assert json.loads(done.stdout) == reply.json
        done = await ask_command("receipts", event_id)
        assert "written to 2, delivered to 1, seen by 0" in done.stdout
        assert "sent to floor after 1." in done.stdout


async def test_events_without_receipts_and_unknown_ids_are_explained_to_those_who_may_know(
    redis_url: str, backend: "redis.Redis", settings: dict[str, Any]
) -> None:
    async with serving(redis_url, "direct", **settings) as gateway:
        first = publish(backend)
        untracked = await path_of(gateway, first)
        assert untracked["type"] == "ROUND_READY"
        assert "Receipts are not kept for ROUND_READY" in untracked["summary"][0]
        assert untracked["audiences"][0] == {"audience": "admins", "tenant_id": 1, "branch_id": 1}
        cart = publish(backend, type="CART_SYNC", session_id=456)
        assert "not a durable type" in (await path_of(gateway, cart))["summary"][0]
        forged = publish(backend, type="EVENT_UNHEARD", tenant_id=2, entity={"event_id": first})
        assert (await ask(gateway, forged, tenant_id=2)).json["type"] == "EVENT_UNHEARD"

        unknown = {
            first.replace("-0-", "-7-"): "no such entry in its stream",
            f"1-0-{tag(STREAM)}": "older than all that its stream holds",
            f"9{first}": "of the future",
            "1-0-ffff": "of a stream that is not read here",
        }
        for event_id, words in unknown.items():
            reply = await ask(gateway, event_id)
            assert (reply.status, words in reply.text) == (404, True), reply.text
        absent = (await ask(gateway, next(iter(unknown)))).text
        for claims in ({"tenant_id": 2}, {"branch_ids": [2]}):
            reply = await ask(gateway, first, **claims)
            assert (reply.status, reply.text) == (404, absent)
        assert (await ask(gateway, first, roles=["WAITER"])).status == 403
        assert (await ask(gateway, "x")).status == 422
        assert (await http(gateway.port, f"/ws/why?event_id={first}")).status == 401
        why = f"why?event_id={first}"
        assert [(await call(gateway.port, why, key=key)).status for key in ("all", "two")] == [
            200, 404
        ]  # fmt: skip

        ask_command = partial(command, redis_url, settings["ws_routes_file"])
        done = await ask_command("why", f"1-0-{tag(STREAM)}")
        assert (done.exit_code, "older than all" in done.stderr) == (1, True)
        done = await ask_command("receipts", first)
        assert (done.exit_code, "no receipts are known" in done.stderr) == (1, True)
        assert (await ask_command("why", "1-0-ffff")).exit_code == 1
        assert (await ask_command("why", "x")).exit_code == 2


@pytest.mark.parametrize(("age", "is_known"), [(3_500, True), (3_700, False)])
async def test_command_does_not_take_receipts_that_have_expired_for_none(
    redis_url: str, backend: "redis.Redis", tmp_path: Path, age: int, is_known: bool
) -> None:
    (tmp_path / "routes.toml").write_text(ROUTES)
    added = f"{int(time.time() - age) * 1000}-0"
    backend.xadd(STREAM, {"data": make_payload(**CALL)}, id=added)
    done = await command(redis_url, tmp_path / "routes.toml", "receipts", added)
    words = "written to 0, delivered to 0" if is_known else "no receipts are known"
    assert words in (done.stdout if is_known else done.stderr)
    assert done.exit_code == 1 - is_known


async def test_where_no_receipts_are_kept_no_right_to_them_is_needed(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    backend.acl_setuser(
        "few", enabled=True, reset=True, passwords=["+pw"], keys=["*"], channels=["*"],
        categories=["+@all"], commands=["-eval", "-time"],
    )  # fmt: skip
    url = redis_url.replace("://", "://few:pw@")
    async with serving(url, "direct") as gateway:
        event_id = publish(backend, **CALL)
        path = await path_of(gateway, event_id)
        assert "Receipts are not kept for SERVICE_CALL_CREATED" in path["summary"][0]
        (tmp_path / "none.toml").touch()
        done = await command(url, tmp_path / "none.toml", "why", event_id, "--json")
        assert json.loads(done.stdout)["summary"] == path["summary"]
        (tmp_path / "routes.toml").write_text(ROUTES)
        done = await command(url, tmp_path / "routes.toml", "why", event_id)
        assert (done.exit_code, "(NOPERM)" in done.stderr) == (1, True), done.stderr


async def test_commands_find_an_entry_in_any_shard_while_no_gateway_runs(
    redis_url: str, backend: "redis.Redis", settings: dict[str, Any]
) -> None:
    ask_command = partial(command, redis_url, settings["ws_routes_file"], REDIS_STREAM_SHARDS="4")
    for tenant in range(1, 5):
        stream = Sharding([STREAM], shards=4).name_for_new(tenant)
        entry: Any = backend.xadd(stream, {"data": make_payload(tenant_id=tenant)})
        done = await ask_command("why", entry.decode(), "--json")
        assert json.loads(done.stdout)["tenant_id"] == tenant
    nowhere = "redis://127.0.0.1:1"
    for name in ("why", "receipts"):
        done = await command(nowhere, settings["ws_routes_file"], name, f"1-0-{tag(STREAM)}")
        assert (done.exit_code, done.stdout) == (1, "")
        assert done.stderr.startswith("trio-gateway: Redis at 127.0.0.1:1: ")
