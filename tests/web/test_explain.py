"""``POST /ws/explain``: what an ADMIN is shown, and which callers are refused."""

import json
from typing import Any

import pytest

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    admitted,
    http,
    make_idle_app,
    make_settings,
    running,
)
from trio_gateway.gateway import Gateway
from trio_gateway.testing import make_jwt, make_table_token
from trio_gateway.web.explain import MAX_BYTES, MAX_TOKENS

EVENT = {
    "type": "ROUND_READY",
    "tenant_id": 1,
    "branch_id": 1,
    "sector_id": 5,
    "session_id": 456,
    "entity": {"secret": "sauce"},
}


def gateway(**changes: Any) -> Gateway:
    """A gateway without Redis."""
    return make_idle_app(make_settings("redis://127.0.0.1:1", **changes))


def admin(**claims: Any) -> str:
    return make_jwt(JWT_SECRET, **{"roles": ["ADMIN"]} | claims)


async def ask(
    body: Any, token: str | None = None, *, app: Gateway | None = None
) -> tuple[int, Any]:
    """Status and answer."""
    headers = {} if token is None else {"Authorization": f"Bearer {token}"}
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    client = (app or gateway()).test_client()
    response = await client.post("/ws/explain", headers=headers, data=data)
    return response.status_code, await response.get_json()


async def test_admin_is_shown_the_recipients_and_why_others_receive_nothing() -> None:
    tokens = {
        "waiter of 5": make_jwt(JWT_SECRET, sector_ids=[5]),
        "waiter of 1 and 2": make_jwt(JWT_SECRET, sector_ids=[1, 2]),
        "diner": make_table_token(TABLE_SECRET),
        "diner of another table": make_table_token(TABLE_SECRET, session_id=457),
        "of another branch": make_jwt(JWT_SECRET, branch_ids=[2], roles=["KITCHEN"]),
    }
    status, found = await ask({"event": EVENT, "tokens": [*tokens.values()]}, admin())
    assert status == 200
    verdicts = dict(zip(tokens, found.pop("tokens"), strict=True))
    assert found == {
        "type": "ROUND_READY",
        "known": True,
        "durable": True,
        "receipt": False,
        "steps": [],
        "audiences": [
            {"audience": "admins", "tenant_id": 1, "branch_id": 1},
            {"audience": "waiters", "tenant_id": 1, "branch_id": 1, "sector_id": 5},
            {"audience": "kitchen", "tenant_id": 1, "branch_id": 1},
            {"audience": "diners", "tenant_id": 1, "session_id": 456},
        ],
        "connections": {"waiter": 0, "kitchen": 0, "admin": 0, "diner": 0},
    }
    assert {name: verdict["endpoints"] for name, verdict in verdicts.items()} == {
        "waiter of 5": ["waiter"],
        "waiter of 1 and 2": [],
        "diner": ["diner"],
        "diner of another table": [],
        "of another branch": [],
    }
    assert verdicts["diner"] == {"receives": True, "endpoints": ["diner"], "reasons": {}}
    assert verdicts["waiter of 1 and 2"]["reasons"]["waiter"] == (
        "sector: the event is for sector 5 of branch 1, this waiter has 1, 2"
    )
    assert verdicts["diner of another table"]["reasons"]["diner"].startswith("session: ")
    assert verdicts["of another branch"]["reasons"]["kitchen"].startswith("branch: ")


async def test_invalid_token_is_explained_and_counts_as_no_failed_login() -> None:
    tokens = {
        "expired": make_jwt(JWT_SECRET, life=-1),
        "an expired table token": make_table_token(TABLE_SECRET, life=-1),
        "signed with another key": make_jwt("x" * 32),
        "nonsense": "nonsense",
        "without a role": make_jwt(JWT_SECRET, roles=["COOK"]),
        "without a branch": make_jwt(JWT_SECRET, branch_ids=[]),
    }
    app = gateway(ws_max_failed_logins=1)
    body = {"event": EVENT, "tokens": [*tokens.values()]}
    status, found = await ask(body, admin(), app=app)
    assert status == 200
    verdicts = dict(zip(tokens, found["tokens"], strict=True))
    assert {name: verdict["reasons"] for name, verdict in verdicts.items()} == {
        "expired": {"token": "token: token expired"},
        "an expired table token": {"token": "token: token expired"},
        "signed with another key": {"token": "token: token invalid"},
        "nonsense": {"token": "token: token invalid"},
        "without a role": {"token": "token: role not admitted here"},
        "without a branch": {"token": "token: no branch in the token"},
    }
    assert not any(verdict["receives"] for verdict in verdicts.values())
    assert (await ask(body, admin(), app=app))[0] == 200


async def test_token_of_another_tenant_is_not_described() -> None:
    tokens = [admin(tenant_id=2), make_table_token(TABLE_SECRET, tenant_id=2)]
    _, found = await ask({"event": EVENT, "tokens": tokens}, admin())
    other = {
        "receives": False,
        "endpoints": [],
        "reasons": {"token": "tenant: the token is of another tenant"},
    }
    assert found["tokens"] == [other, other]


@pytest.mark.parametrize(
    ("token", "status"),
    [
        (None, 401),
        ("nonsense", 401),
        (make_table_token(TABLE_SECRET), 401),
        (make_jwt(JWT_SECRET), 403),
        (make_jwt(JWT_SECRET, roles=["MANAGER"]), 403),
        (admin(tenant_id=2), 403),
        (admin(branch_ids=[2]), 403),
    ],
    ids=["no token", "nonsense", "diner", "waiter", "manager", "other tenant", "other branch"],
)
async def test_only_an_admin_of_the_tenant_and_branch_of_the_event_is_answered(
    token: str | None, status: int
) -> None:
    got, body = await ask({"event": EVENT}, token)
    assert got == status
    assert list(body) == ["error"]


async def test_admin_of_any_branch_may_ask_about_events_of_the_whole_tenant() -> None:
    status, found = await ask({"event": EVENT | {"branch_id": 0}}, admin(branch_ids=[7]))
    assert (status, found["audiences"]) == (200, [{"audience": "tenant_admins", "tenant_id": 1}])


@pytest.mark.parametrize(
    ("body", "status", "error"),
    [
        (b"", 422, "not a JSON object"),
        (b"[]", 422, "Expected `object`"),
        (b'{"event":"\xff"}', 422, "event: event is not UTF-8"),
        ({}, 422, "missing required field `event`"),
        ({"event": EVENT | {"tenant_id": "1"}}, 422, "event: Expected `int`"),
        ({"event": EVENT, "tokens": "t"}, 422, "$.tokens"),
        ({"event": EVENT, "tokens": ["t"] * (MAX_TOKENS + 1)}, 422, "$.tokens"),
        ({"event": EVENT | {"x": "x" * 65_536}}, 422, "event: event is over 65536 bytes"),
        ({"event": EVENT, "tokens": ["x" * MAX_BYTES]}, 413, "at most"),
    ],
)
async def test_invalid_body_is_refused(body: Any, status: int, error: str) -> None:
    got, answer = await ask(body, admin())
    assert got == status
    assert error in answer["error"]
    assert "sauce" not in answer["error"]


async def test_too_many_invalid_tokens_are_refused_for_a_while() -> None:
    app = gateway(ws_max_failed_logins=1)
    assert (await ask({"event": EVENT}, "nonsense", app=app))[0] == 401
    assert (await ask({"event": EVENT}, admin(), app=app))[0] == 429


async def test_live_connections_are_counted_by_endpoint(redis_url: str) -> None:
    async with (
        running(make_settings(redis_url, ws_uncovered_sector="branch")) as here,
        admitted(here.staff_url("waiter", sector_ids=[5])),
        admitted(here.staff_url("waiter", sector_ids=[6])) as other,
        admitted(here.staff_url("admin", roles=["ADMIN"])),
        admitted(here.diner_url()),
        admitted(here.diner_url(session_id=457)),
        admitted(here.staff_url("waiter", tenant_id=2, sector_ids=[5])),
    ):

        async def count(**keys: Any) -> Any:
            reply = await http(
                here.port,
                "/ws/explain",
                method="POST",
                headers={"Authorization": f"Bearer {admin()}"},
                json_body={"event": EVENT | keys},
            )
            return reply.json["connections"]

        assert await count() == {"waiter": 1, "kitchen": 0, "admin": 1, "diner": 1}
        assert await count(sector_id=None) == {"waiter": 2, "kitchen": 0, "admin": 1, "diner": 1}
        # No waiter covers sector 9: WS_UNCOVERED_SECTOR sends it to the waiters of the branch.
        assert (await count(sector_id=9))["waiter"] == 2
        await other.aclose()
        assert (await count(sector_id=9))["waiter"] == 1
