"""Pages of allowed origins may call the gateway over HTTP and read every response."""

from collections.abc import AsyncIterator
from typing import Any, Final

import pytest

from tests.support.event_source import listening
from tests.support.gateways import JWT_SECRET, TABLE_SECRET, Reply, Running, http, serving
from trio_gateway.testing import make_jwt, make_table_token
from trio_gateway.web import cors

ALLOWED: Final = "http://localhost:5176"
OTHERS: Final = ["https://evil.example", "null", "http://localhost:5176/", "", f"{ALLOWED}, null"]
CALLS: Final = [(method, path) for path, shared in cors.PATHS.items() for method in shared.methods]
DINER_CALLS: Final = [call for call in CALLS if call[0] in cors.PATHS[call[1]].any_origin]
STAFF_CALLS: Final = [call for call in CALLS if call not in DINER_CALLS]
TOKEN: Final = make_jwt(JWT_SECRET, roles=["ADMIN"])
BEARER: Final = {"Authorization": f"Bearer {TOKEN}"}


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[Running]:
    async with serving(redis_url, "direct") as found:
        yield found


async def preflight(port: int, method: str, path: str, origin: str, **headers: str) -> Reply:
    asked = {
        "Origin": origin,
        "Access-Control-Request-Method": method,
        "Access-Control-Request-Headers": "authorization,content-type",
    }
    return await http(port, path, method="OPTIONS", headers={**asked, **headers})


def cors_headers(reply: Any) -> dict[str, str]:
    return {name: v for name, v in reply.headers.items() if name.startswith("access-control-")}


def test_paths_with_cors_are_those_of_the_contract() -> None:
    streams = {("GET", f"/ws/{each}/events") for each in ("waiter", "kitchen", "admin")}
    calls = {("GET", f"/ws/{each}") for each in ("catchup", "presence", "receipts")}
    assert {*STAFF_CALLS} == calls | streams | {("POST", "/ws/ticket"), ("POST", "/ws/explain")}
    assert {*DINER_CALLS} == {
        ("GET", "/ws/catchup/session"), ("GET", "/ws/diner/events"), ("POST", "/ws/receipts"),
    }  # fmt: skip


@pytest.mark.parametrize(("method", "path"), CALLS)
async def test_preflight_allows_the_methods_and_headers_of_the_path(
    gateway: Running, method: str, path: str
) -> None:
    any_origin = (method, path) in DINER_CALLS
    reply = await preflight(gateway.port, method, path, ALLOWED)
    assert (reply.status, reply.text) == (204, "")
    assert reply.headers["access-control-allow-origin"] == ("*" if any_origin else ALLOWED)
    allowed = [method] if any_origin else cors.PATHS[path].methods
    assert reply.headers["access-control-allow-methods"] == ", ".join(allowed)
    assert "Authorization" in reply.headers["access-control-allow-headers"]
    assert "access-control-allow-credentials" not in reply.headers
    assert "access-control-allow-private-network" not in reply.headers
    assert ("vary" in reply.headers) is not any_origin

    private = {"Access-Control-Request-Private-Network": "true"}
    reply = await preflight(gateway.port, method, path, ALLOWED, **private)
    assert reply.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize("origin", OTHERS)
async def test_page_of_another_origin_may_only_do_what_diners_may(
    gateway: Running, origin: str
) -> None:
    private = {"Access-Control-Request-Private-Network": "true"}
    for method, path in STAFF_CALLS:
        reply = await preflight(gateway.port, method, path, origin, **private)
        assert cors_headers(reply) == {}
        assert reply.headers["vary"] == "Origin"
        reply = await http(gateway.port, path, method=method, headers={"Origin": origin})
        assert cors_headers(reply) == {}
        assert reply.headers["vary"] == "Origin"
    for method, path in DINER_CALLS:
        reply = await preflight(gateway.port, method, path, origin)
        assert reply.headers["access-control-allow-origin"] == "*"
        assert reply.headers["access-control-allow-methods"] == method
        reply = await http(gateway.port, path, method=method, headers={"Origin": origin})
        assert (reply.status, reply.headers["access-control-allow-origin"]) == (401, "*")


async def test_staff_confirm_from_allowed_origins_and_diners_from_any(gateway: Running) -> None:
    own = "http://localhost"  # its console: the Host header is localhost
    for token, origin, status in [
        (TOKEN, ALLOWED, 204), (TOKEN, own, 204), (TOKEN, None, 204), (TOKEN, OTHERS[0], 403),
        (TOKEN, "null", 403), (make_table_token(TABLE_SECRET), OTHERS[0], 204),
    ]:  # fmt: skip
        headers = {"Authorization": f"Bearer {token}"}
        headers |= {} if origin is None else {"Origin": origin}
        body = {"event_id": "1-0-4723"}
        reply = await http(
            gateway.port, "/ws/receipts", method="POST", headers=headers, json_body=body
        )
        assert (reply.status, origin) == (status, origin)


@pytest.mark.parametrize(
    ("method", "path", "headers", "body", "status"),
    [
        ("POST", "/ws/ticket", BEARER, None, 200),
        ("POST", "/ws/ticket", {}, None, 401),
        ("GET", "/ws/ticket", {}, None, 405),
        ("GET", "/ws/catchup?branch_id=1&since=0", BEARER, None, 200),
        ("GET", "/ws/catchup?branch_id=9&since=0", BEARER, None, 403),
        ("GET", "/ws/catchup?branch_id=1&since=never", BEARER, None, 422),
        ("PUT", "/ws/catchup", {}, None, 405),
        ("POST", "/ws/explain", BEARER, {"event": "x" * 300_000}, 413),
        ("POST", "/ws/explain", BEARER, {"event": {}}, 422),
        ("PUT", "/ws/waiter/events", {}, None, 405),
        ("GET", "/ws/waiter/events", {}, None, 401),
        ("GET", "/ws/kitchen/events", {"Authorization": "Bearer x.y"}, None, 401),
    ],
)
async def test_every_response_can_be_read(
    gateway: Running, method: str, path: str, headers: dict[str, str], body: Any, status: int
) -> None:
    sent = {**headers, "Origin": ALLOWED}
    reply = await http(gateway.port, path, method=method, headers=sent, json_body=body)
    assert reply.status == status
    assert reply.headers["access-control-allow-origin"] == ALLOWED
    assert "Retry-After" in reply.headers["access-control-expose-headers"]
    assert reply.headers["vary"] == "Origin"


async def test_event_stream_can_be_read(gateway: Running) -> None:
    async with listening(gateway.port, f"/ws/admin/events?token={TOKEN}", {"Origin": ALLOWED}) as s:
        assert (s.status, s.headers["access-control-allow-origin"]) == (200, ALLOWED)
    path = f"/ws/diner/events?table_token={make_table_token(TABLE_SECRET)}"
    async with listening(gateway.port, path, {"Origin": "https://any.example"}) as s:
        assert (s.status, s.headers["access-control-allow-origin"]) == (200, "*")


async def test_bugs_limits_and_outages_can_be_read(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    origin = {"Origin": ALLOWED}
    async with serving(redis_url, "direct", ws_max_failed_logins=1) as gateway:
        app = gateway.app

        async def asked(headers: dict[str, str]) -> int:
            for path, method in {"/ws/ticket": "POST", "/ws/kitchen/events": "GET"}.items():
                reply = await http(gateway.port, path, method=method, headers=headers)
                assert reply.headers["access-control-allow-origin"] == ALLOWED
            return reply.status

        async def broken(*_: Any, **__: Any) -> Any:
            raise RuntimeError("a bug")

        with monkeypatch.context() as broken_app:
            broken_app.setattr(app.parts.admission, "identify", broken)
            broken_app.setattr(app.parts.admission, "admit", broken)
            broken_app.setattr(app.parts.admission, "try_admit", broken)
            assert await asked(origin) == 500
        assert await asked(origin | {"Authorization": "Bearer x"}) == 429
        await app.drain()
        assert await asked(origin) == 503


async def test_operator_paths_have_no_cors_headers(gateway: Running) -> None:
    for path in ("/ws/metrics", "/ws/health/detailed", "/ws/console", "/ws/nowhere"):
        for method in ("GET", "OPTIONS"):
            reply = await http(gateway.port, path, method=method, headers={"Origin": ALLOWED})
            assert cors_headers(reply) == {}
