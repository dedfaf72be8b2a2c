"""Receipts, paths of events and presence of two tenants: nobody is told of others than its own."""

import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.api_keys import secret_of, write_keys
from tests.support.gateways import JWT_SECRET, Reply, Running, admitted, http, received, until
from tests.support.receipts import one, publish, say
from trio_gateway.testing import make_jwt

TENANTS = (1, 2)
BRANCHES = ([1], [2], [1, 2], [3])
ROUTES = """
[routes.SERVICE_CALL_CREATED]
must_reach = "waiters"
within = 0.2
then = [{to = "floor", within = 0.2}]
[routes.ENTITY_CREATED]
must_reach = "admins"
within = 0.2
[routes.CHECK_PAID]
receipt = true
[routes.PRODUCT_AVAILABILITY_CHANGED]
receipt = true
"""
SITS = 2  # the branch of the only session of each tenant
EVENTS: list[dict[str, Any]] = [
    {"branch_id": 1},
    {"branch_id": 2, "sector_id": 6},
    {"branch_id": 2, "sector_id": None},
    {"branch_id": 3, "sector_id": None},
    {"type": "ENTITY_CREATED", "branch_id": 0, "sector_id": None},
    {"type": "ENTITY_CREATED", "branch_id": 3},
    {"type": "CHECK_PAID", "branch_id": 1, "session_id": ...},  # it sits in another branch
    {"type": "CHECK_PAID", "branch_id": SITS, "session_id": ...},
    {"type": "PRODUCT_AVAILABILITY_CHANGED", "branch_id": SITS},
]


class Person:
    """A client, and where it works or sits."""

    def __init__(self, client: WebSocketConnection, tenant: int, branches: list[int]) -> None:
        self.client = client
        self.tenant = tenant
        self.branches = branches
        self.ids: list[str] = []  # of the events that it was sent

    def hears(self, events: list[dict[str, Any]]) -> None:
        self.ids += [event["event_id"] for event in events if "event_id" in event]


def session_of(tenant: int) -> int:
    return 500 + tenant


@asynccontextmanager
async def people(gateways: list[Running]) -> AsyncIterator[dict[str, Person]]:
    """One on each endpoint for each tenant and set of branches, and a session for each tenant."""
    async with AsyncExitStack() as stack:
        found: dict[str, Person] = {}
        for tenant in TENANTS:
            urls: dict[str, tuple[str, list[int]]] = {}
            for n, branches in enumerate(BRANCHES):
                for k, endpoint in enumerate(("waiter", "kitchen", "admin")):
                    name = f"{tenant}{n}{k}"  # its own among all
                    claims = {"tenant_id": tenant, "branch_ids": branches, "sector_ids": [5]}
                    url = gateways[(n + k) % 2].staff_url(endpoint, sub=name, **claims)
                    urls[name] = url, branches
            session = session_of(tenant)
            urls[str(session)] = (
                gateways[tenant % 2].diner_url(
                    tenant_id=tenant, branch_id=SITS, session_id=session, table_id=session
                ),
                [SITS],
            )
            for name, (url, branches) in urls.items():
                client = await stack.enter_async_context(admitted(url))
                found[name] = Person(client, tenant, branches)
        yield found


def named(answer: Any) -> set[str]:
    """Everybody whom an answer names, at any depth."""
    if isinstance(answer, list):
        return set[str]().union(*map(named, answer))
    if not isinstance(answer, dict):
        return set()
    found = named(list(answer.values()))
    if "state" in answer or "connections" in answer:  # of a client, not of the event
        found |= {str(answer[key]) for key in ("user_id", "session_id") if key in answer}
    return found


async def get(gateway: Running, path: str, bearer: str) -> Reply:
    return await http(gateway.port, path, headers={"Authorization": f"Bearer {bearer}"})


async def test_nobody_is_told_of_another_tenant_or_of_other_branches(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    dice = random.Random(19)
    keys = {f"of{tenant}": {"scopes": ["read"], "tenants": [tenant]} for tenant in TENANTS}
    settings = {"ws_cluster": True, "ws_api_keys_file": write_keys(tmp_path, keys)}
    async with (
        one(redis_url, tmp_path, ROUTES, **settings) as first,
        one(redis_url, tmp_path, ROUTES, **settings) as second,
        people([first, second]) as everybody,
    ):
        published: dict[str, tuple[int, int]] = {}  # entry: tenant and branch
        for tenant in TENANTS:
            for keys_ in EVENTS:
                event = keys_ | (
                    {"session_id": session_of(tenant)} if "session_id" in keys_ else {}
                )
                entry = publish(backend, tenant_id=tenant, **event)
                published[entry] = tenant, event["branch_id"]
        await trio.sleep(0.3)
        for person in everybody.values():
            person.hears(await received(person.client))
        ids = sorted({each for person in everybody.values() for each in person.ids})
        for person in everybody.values():  # also of what others were sent
            for event_id in dice.sample(ids, 8):
                kind = dice.choice(("ack", "ping", "seen"))
                key = "event_id" if kind == "seen" else "last_event_id"
                await say(person.client, **{"type": kind, key: event_id})
        await until(lambda: not len(first.app.parts.reach) + len(second.app.parts.reach))

        answers = 0

        async def check(
            gateway: Running, path: str, bearer: str, tenant: int, branches: list[int] | None
        ) -> None:
            """Ask; whoever is named must be of this tenant and one of these branches."""
            nonlocal answers
            reply = await get(gateway, path, bearer)
            entry = path.partition("event_id=")[2].rpartition("-")[0]
            if entry in published:
                its_tenant, its_branch = published[entry]
                may_know = branches is None or its_branch in (0, *branches)
                assert (reply.status == 200) is (its_tenant == tenant and may_know), path
            if reply.status != 200:
                assert reply.status in (403, 404), reply.text
                assert not any(name in reply.text for name in everybody)
                return
            answers += 1
            for name in named(reply.json):
                assert everybody[name].tenant == tenant, (path, name)
                if branches is not None:
                    assert set(everybody[name].branches) & set(branches), (path, branches, name)

        asked = [f"{call}?event_id={each}" for call in ("receipts", "why") for each in ids]
        for tenant in TENANTS:
            for branches in BRANCHES:
                claims: dict[str, Any] = {"tenant_id": tenant, "branch_ids": branches}
                token = make_jwt(JWT_SECRET, sub=f"9{tenant}", roles=["MANAGER"], **claims)
                present = [f"presence?branch_id={branch}" for branch in (1, 2, 3)]
                for n, path in enumerate([*dice.sample(asked, 16), *present]):
                    await check((first, second)[n % 2], f"/ws/{path}", token, tenant, branches)
            present = [f"presence?branch_id=2&tenant_id={each}" for each in TENANTS]
            for path in [*dice.sample(asked, 16), *present]:
                await check(first, f"/ws/api/{path}", secret_of(f"of{tenant}"), tenant, None)
        assert answers > 40
