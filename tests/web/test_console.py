"""The console: who may open it, and what it shows."""

import json
import re
from importlib.resources import files
from typing import Any

import pytest
import redis
import trio
from trio.testing import MockClock

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    admitted,
    closed,
    commands_running,
    connect,
    http,
    make_idle_app,
    make_settings,
    receive_event,
    serving,
)
from trio_gateway.core.audiences import Endpoint, TenantId
from trio_gateway.core.histogram import SECONDS
from trio_gateway.core.messages import Command
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.stats import slow
from trio_gateway.stats_feed import StatsFeed
from trio_gateway.testing import FakeSocket, make_jwt, make_principal, make_table_token

NO_REDIS = "redis://127.0.0.1:1"


def client_of(**changes: Any) -> Any:
    return make_idle_app(make_settings(NO_REDIS, **changes)).test_client()


async def test_in_development_anyone_gets_the_page_and_it_contains_no_secret() -> None:
    response = await client_of().get("/ws/console")
    page = await response.get_data(as_text=True)

    assert response.status_code == 200
    assert 'data-environment="development"' in page
    assert JWT_SECRET not in page
    assert response.headers["Cache-Control"] == "no-store"
    policy = response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert "connect-src 'self';" in policy
    assert "frame-ancestors 'none'" in policy


def test_buckets_of_the_page_are_those_of_the_histograms() -> None:
    page = files("trio_gateway").joinpath("static", "console.html").read_text("utf-8")
    (found,) = re.findall(r"const BOUNDS = (\[.*\]);", page)
    assert tuple(json.loads(found)) == SECONDS


async def test_in_production_only_admins_get_the_page(redis_url: str) -> None:
    async with serving(
        redis_url, "direct", environment="production", allowed_origins=("https://a.example",)
    ) as gateway:

        async def status(**headers: str) -> int:
            return (await http(gateway.port, "/ws/console", headers=headers)).status

        assert await status() == 401
        assert await status(Authorization="Bearer nonsense") == 401
        for role, expected in {"WAITER": 403, "KITCHEN": 403, "MANAGER": 403, "ADMIN": 200}.items():
            token = make_jwt(JWT_SECRET, roles=[role])
            assert await status(Authorization=f"Bearer {token}") == expected, role
        diner = make_table_token(TABLE_SECRET)
        assert await status(Authorization=f"Bearer {diner}") == 401
        admin = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=['ADMIN'])}"}
        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=admin)
        url = f"/ws/console?ticket={reply.json['ticket']}"
        assert (await http(gateway.port, url)).status == 200
        assert (await http(gateway.port, url)).status == 401  # it was valid once


@pytest.mark.parametrize("why", ["role", "address", "body"])
async def test_ticket_refused_by_the_console_for_another_reason_stays_valid(
    redis_url: str, why: str
) -> None:
    production = {"environment": "production", "allowed_origins": ("https://a.example",)}
    settings = production if why != "body" else {}
    with redis.Redis.from_url(redis_url) as backend:
        backend.flushall()
        async with serving(redis_url, "direct", ws_max_failed_logins=1, **settings) as gateway:
            role = "MANAGER" if why == "role" else "ADMIN"
            bearer = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=[role])}"}
            reply = await http(gateway.port, "/ws/ticket", method="POST", headers=bearer)
            query = f"?ticket={reply.json['ticket']}"
            if why == "body":
                headers = {"Content-Type": "application/json"}
                reply = await http(
                    gateway.port,
                    f"/ws/console/publish{query}",
                    method="POST",
                    headers=headers,
                    json_body={"event": {"type": "A", "tenant_id": 2, "branch_id": 1}},
                )
                assert reply.status == 403
            else:
                if why == "address":
                    assert (await http(gateway.port, "/ws/console?ticket=made-up")).status == 401
                expected = {"role": 403, "address": 429}[why]
                assert (await http(gateway.port, f"/ws/console{query}")).status == expected
            assert len(backend.keys("gateway:ticket:*")) == 1


@pytest.mark.parametrize("path", ["/ws/console/token", "/ws/console/publish"])
async def test_development_endpoints_are_404_in_production(path: str) -> None:
    body = {"endpoint": "admin", "event": {"type": "A", "tenant_id": 1, "branch_id": 1}}
    client = client_of(environment="production", allowed_origins=("https://a.example",))
    response = await client.post(path, json=body)
    assert response.status_code == 404


def test_production_does_not_start_with_an_open_console() -> None:
    with pytest.raises(ValueError, match="WS_CONSOLE_TOKENS mints tokens without"):
        make_settings(NO_REDIS, environment="production", ws_console_tokens=True)


async def test_tokens_are_minted_only_if_configured() -> None:
    client = make_idle_app(make_settings(NO_REDIS)).test_client()
    response = await client.post(
        "/ws/console/token",
        json={"endpoint": "admin"},
        headers={"Host": "localhost"},
        scope_base={"client": ("127.0.0.1", 5000)},
    )
    assert response.status_code == 404


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"headers": {"Content-Type": "text/plain"}}, 415),  # a form of any page may send this
        ({"headers": {"Host": "rebound.example"}}, 403),
        ({"scope_base": {"client": ("192.0.2.7", 5000)}}, 403),
        ({"headers": {"X-Forwarded-For": "203.0.113.9"}}, 403),  # through a proxy on this machine
        ({"headers": {"Forwarded": "for=203.0.113.9"}}, 403),
        ({}, 200),
    ],
)
async def test_tokens_are_minted_only_for_pages_on_this_machine(
    changes: dict[str, Any], status: int
) -> None:
    headers = {"Content-Type": "application/json", "Host": "localhost:8001"}
    response = await client_of(ws_console_tokens=True).post(
        "/ws/console/token",
        data=json.dumps({"endpoint": "waiter"}),
        headers=headers | changes.get("headers", {}),
        scope_base=changes.get("scope_base", {"client": ("127.0.0.1", 5000)}),
    )
    assert response.status_code == status


async def test_playground_mints_tokens_for_each_endpoint_and_publishes(redis_url: str) -> None:
    async with serving(redis_url, "direct", ws_console_tokens=True) as gateway:

        async def post(path: str, body: dict[str, Any]) -> Any:
            headers = {"Content-Type": "application/json", "Authorization": f"Bearer {admin}"}
            reply = await http(gateway.port, path, method="POST", headers=headers, json_body=body)
            assert reply.status == 200, reply.text
            return reply.json

        admin = "none yet"
        wanted = {"sector_ids": [5], "session_id": 456}
        admin = (await post("/ws/console/token", {"endpoint": "admin"}))["token"]
        event = {
            "type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "sector_id": 5,
            "session_id": 456,
        }  # fmt: skip
        for endpoint in Endpoint:
            token = (await post("/ws/console/token", {"endpoint": endpoint.label, **wanted}))[
                "token"
            ]
            name = "token" if endpoint.staff else "table_token"
            async with admitted(f"{gateway.url}{endpoint.path}?{name}={token}") as client:
                marked = event | {"n": endpoint.label}
                answer = await post("/ws/console/publish", {"event": marked})
                assert answer == {"stream": "events:critical"}
                assert (await receive_event(client))["n"] == endpoint.label
        cart = event | {"type": "CART_CLEARED"}
        answer = await post("/ws/console/publish", {"event": cart})
        assert answer == {"channel": "channel:session:456"}


@pytest.mark.parametrize(
    ("claims", "event", "status"),
    [
        ({"roles": ["ADMIN"]}, {}, 503),  # let through, and there is no Redis
        ({"roles": ["MANAGER"]}, {}, 403),
        ({"roles": ["ADMIN"], "tenant_id": 2}, {}, 403),
        ({"roles": ["ADMIN"]}, {"type": 7}, 422),
        (None, {}, 401),
    ],
)
async def test_samples_are_published_by_admins_for_their_own_tenant(
    claims: dict[str, Any] | None, event: dict[str, Any], status: int
) -> None:
    app = make_idle_app(make_settings(NO_REDIS))
    headers = {}
    if claims is not None:
        headers["Authorization"] = f"Bearer {make_jwt(JWT_SECRET, **claims)}"
    sample = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1} | event

    async with commands_running(app.parts.commands):
        response = await app.test_client().post(
            "/ws/console/publish", json={"event": sample}, headers=headers
        )

    assert response.status_code == status


async def test_a_sample_does_not_trim_the_backends_stream(redis_url: str) -> None:
    backend = redis.Redis.from_url(redis_url)
    app = make_idle_app(make_settings(redis_url))
    headers = {"Authorization": f"Bearer {make_jwt(JWT_SECRET, roles=['ADMIN'])}"}
    sample = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
    before = backend.xlen("events:critical")
    with backend.pipeline() as many:
        for _ in range(10_300):
            many.xadd("events:critical", {"data": "{}"})
        many.execute()

    async with commands_running(app.parts.commands):
        response = await app.test_client().post(
            "/ws/console/publish", json={"event": sample}, headers=headers
        )

    assert response.status_code == 200
    assert backend.xlen("events:critical") == before + 10_301
    backend.close()


async def test_only_an_admin_that_watches_receives_stats(redis_url: str) -> None:
    async with serving(redis_url, "direct") as gateway:
        url = gateway.staff_url("admin", sub="1")
        async with (
            admitted(url) as admin,
            admitted(gateway.staff_url("admin", sub="2", roles=["MANAGER"])) as manager,
            admitted(gateway.staff_url("waiter", sub="3", roles=["ADMIN"])) as elsewhere,
        ):
            for client in (admin, manager, elsewhere):
                await client.send_message('{"type":"watch"}')
            first, second = [await receive_event(admin, 3) for _ in range(2)]
            await admin.send_message('{"type":"unwatch"}')
            await admin.send_message("ping")
            assert (await receive_event(admin))["type"] == "pong"
            for client in (manager, elsewhere):
                await client.send_message("ping")
                assert (await receive_event(client))["type"] == "pong"

    assert first["type"] == second["type"] == "statistics"
    assert second["at"] > first["at"]
    assert first["numbers"]["wsgateway_connections_total"] == {"": 3}
    assert first["breakers"]["pubsub"] == "closed"
    assert first["streams"]["connected"]
    assert first["nodes"] == []
    assert JWT_SECRET not in json.dumps(first)


async def test_stats_have_the_delivery_times_of_the_own_tenant_alone(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        serving(redis_url, "direct") as gateway,
        admitted(gateway.staff_url("admin", tenant_id=1)) as admin,
        admitted(gateway.staff_url("admin", tenant_id=2)) as stranger,
    ):
        for _ in range(3):
            event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
            backend.xadd("events:critical", {"data": json.dumps(event)})
        for client, count in ((admin, 3), (stranger, 0)):
            for _ in range(count):
                await receive_event(client)
            await client.send_message('{"type":"watch"}')
            found = (await receive_event(client))["delivery_times"]
            assert found["last_hour"]["written"]["count"] == count
            assert found["last_5_minutes"]["written"]["count"] == count
            assert found["seconds"] == 1


async def test_stats_name_the_processes_of_the_service(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
        admitted(one.staff_url("admin")) as admin,
    ):
        await admin.send_message('{"type":"watch"}')
        with trio.fail_after(10):
            while len(nodes := (await receive_event(admin, 3))["nodes"]) < 2:
                pass
    names = {each.app.parts.cluster.registry.name for each in (one, other)}  # type: ignore[union-attr]
    assert {each["name"] for each in nodes} == names
    assert {each["connections"] for each in nodes} == {0, 1}


async def test_feed_ends_with_the_role_and_skips_slow_readers(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    app = make_idle_app(make_settings(NO_REDIS))
    feed, socket = StatsFeed(app.parts), FakeSocket()
    admin = Connection(
        make_principal(Endpoint.ADMIN, roles=["ADMIN"]), ConnectionLimits(stale_after=1e9)
    )
    nursery.start_soon(feed.run)
    nursery.start_soon(admin.run, socket, app.parts.hub)
    await trio.testing.wait_all_tasks_blocked()

    feed.command(admin, Command.WATCH)
    await trio.sleep(2.5)
    feed.command(admin, Command.WATCH)  # it does already
    sent = len(socket.texts)
    app.parts.hub.move(admin, make_principal(Endpoint.ADMIN, roles=["MANAGER"]))
    await trio.sleep(5)

    assert sent == 3
    assert len(socket.texts) == sent


async def test_slow_clients_of_other_tenants_are_not_shown(nursery: trio.Nursery) -> None:
    app = make_idle_app(make_settings(NO_REDIS))
    for tenant in (1, 2):
        socket = FakeSocket()
        socket.room = 0
        connection = Connection(make_principal(tenant=tenant, user=tenant), ConnectionLimits())
        nursery.start_soon(connection.run, socket, app.parts.hub)
        await trio.testing.wait_all_tasks_blocked()
        connection.send(b"x" * 100 * tenant)

    (found,) = slow(app.parts.hub, TenantId(1))

    assert found == {"endpoint": "waiter", "user": "1", "session": None, "bytes": 102, "frames": 1}
    nursery.cancel_scope.cancel()


async def test_in_development_only_the_console_page_may_connect_without_an_allowed_origin(
    redis_url: str,
) -> None:
    async with serving(redis_url, "direct") as gateway:
        url, own = gateway.staff_url("admin"), f"http://127.0.0.1:{gateway.port}"
        async with admitted(url, extra_headers=[("Origin", own.encode())]):
            pass
        for origin in (
            "http://127.0.0.1:1",
            "http://rebound.example",
            own.replace("127.0.0.1", "localhost"),
        ):
            async with connect(url, extra_headers=[("Origin", origin.encode())]) as client:
                assert (await closed(client))[0] == 1008
