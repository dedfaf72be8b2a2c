"""A key that is bound to tenants acts for those alone, whatever it sends; its secret stays one."""

import json
import random
from collections import defaultdict
from contextlib import AsyncExitStack
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
import redis
from trio_websocket import WebSocketConnection

from tests.support.api_keys import call, secret_of, write_keys
from tests.support.gateways import (
    Running,
    admitted,
    http,
    received_texts,
    serving,
    settle,
)
from trio_gateway.core.event_ids import tag
from trio_gateway.web.api.calls import CALLS

TENANTS: Final = (1, 2, 3)
KEYS: Final[dict[str, dict[str, Any]]] = {
    "one": {"tenants": [1]},
    "two": {"tenants": [2]},
    "both": {"tenants": [1, 2]},
}
ROUNDS: Final = 120


class World:
    """A gateway with clients of each tenant, and what Redis has."""

    def __init__(self, gateway: Running, backend: "redis.Redis", stack: AsyncExitStack) -> None:
        self.gateway = gateway
        self.backend = backend
        self.stack = stack
        self.clients: dict[int, dict[str, WebSocketConnection]] = defaultdict(dict)
        self.replies: list[str] = []

    async def connect(self, tenant: int) -> None:
        """Bring in the clients of a tenant that are missing."""
        urls = {
            "admin": self.gateway.staff_url("admin", sub="21", tenant_id=tenant, jti="j"),
            "diner": self.gateway.diner_url(tenant_id=tenant, session_id=456),
        }
        for endpoint in urls.keys() - self.connected()[tenant]:
            client = await self.stack.enter_async_context(admitted(urls[endpoint]))
            self.clients[tenant][endpoint] = client

    def connected(self) -> dict[int, set[str]]:
        """The endpoints at which each tenant has a client."""
        found: dict[int, set[str]] = {tenant: set() for tenant in TENANTS}
        for each in self.gateway.app.parts.hub.connections:
            if not each.ending:
                found[each.principal.tenant].add(each.principal.endpoint.label)
        return found

    def streams(self) -> list[dict[str, Any]]:
        entries: Any = self.backend.xrange("events:critical")
        return [json.loads(fields[b"data"]) for _, fields in entries]

    def entry_of(self, tenant: int) -> str | None:
        """The id of a tracked event of this tenant, if there is one."""
        entries: Any = self.backend.xrange("events:critical")
        for entry_id, fields in entries:
            event = json.loads(fields[b"data"])
            if event["type"] == "ENTITY_CREATED" and event["tenant_id"] == tenant:
                return f"{entry_id.decode()}-{tag('events:critical')}"
        return None

    async def heard(self) -> dict[int, list[str]]:
        """What the clients of each tenant have received since the last time."""
        await settle(self.gateway)
        return {
            tenant: [text for client in clients.values() for text in await received_texts(client)]
            for tenant, clients in self.clients.items()
        }


def an_event(chooser: random.Random, tenant: int) -> str:
    """An event of this tenant, by whatever way its JSON says so."""
    other = chooser.choice(TENANTS)
    keys = [
        f'"tenant_id":{tenant}',
        f'"tenant_id":{other},"tenant_id":{tenant}',  # the last one counts
        f'"tenant\\u005fid":{tenant}',
        f'"data":{{"tenant_id":{other}}},"tenant_id":{tenant}',
        f'"Tenant_id":{other},"tenant_id":{tenant},"tenant_id ":{other}',
    ]
    kind = chooser.choice(["ROUND_READY", "CART_SYNC", "ENTITY_CREATED", "UNHEARD_OF"])
    branch = chooser.choice([0, 1])
    return f'{{"type":"{kind}","branch_id":{branch},"session_id":456,{chooser.choice(keys)}}}'


async def act(world: World, chooser: random.Random, name: str, key: str, tenant: int) -> set[int]:
    """Make a call for a tenant; return the tenants that it names."""
    port = world.gateway.port
    named = {tenant}
    match name:
        case "publish":
            named = {tenant, *chooser.choices(TENANTS, k=chooser.choice([0, 0, 1, 2]))}
            events = [an_event(chooser, each) for each in named]
            chooser.shuffle(events)
            reply = await call(port, name, f'{{"events":[{",".join(events)}]}}'.encode(), key=key)
        case "disconnect":
            whose: dict[str, Any] = chooser.choice(
                [{"user_id": "21"}, {"session_id": 456}, {"jti": "j"}]
            )
            reply = await call(port, name, {"tenant_id": tenant} | whose, key=key)
        case "refresh":
            reply = await call(port, name, {"tenant_id": tenant, "waiter_id": 21}, key=key)
        case "receipts" | "why":
            if (entry := world.entry_of(tenant)) is None:
                return set()
            reply = await call(port, f"{name}?event_id={entry}", key=key)
            assert reply.status == (200 if tenant in KEYS[key]["tenants"] else 404), reply.text
            world.replies.append(reply.text)
            return set()
        case "nodes":
            named = set()
            reply = await call(port, name, key=key)
        case "slo":
            named = chooser.choice([named, set()])
            reply = await call(port, name + "".join(f"?tenant_id={t}" for t in named), key=key)
            if reply.status == 200:
                told = {each["tenant_id"] for each in reply.json["tenants"]}
                assert told <= (named or set(KEYS[key]["tenants"]))
                assert reply.json["others"] is None
        case _:
            chosen = chooser.choice([0, 1]) if name == "history" else 1
            query = f"{name}?tenant_id={tenant}&branch_id={chosen}"
            query += "&since=0" if name == "history" else ""
            reply = await call(port, query, key=key)
            if reply.status == 200 and name == "history":
                assert {event["tenant_id"] for event in reply.json["events"]} <= {tenant}
            if reply.status == 200 and name == "presence":  # ids are the same in all tenants
                items = reply.json["users"] + reply.json["sessions"]
                assert [each["connections"] for each in items] == [1] * len(items)
    allowed = named <= set(KEYS[key]["tenants"])
    assert reply.status == (200 if allowed else 403), reply.text
    world.replies.append(reply.text)
    return named if allowed else set()


@pytest.mark.parametrize("seed", [1, 2])
async def test_no_call_of_a_key_reaches_another_tenant(
    redis_url: str,
    backend: "redis.Redis",
    tmp_path: Path,
    seed: int,
    capfd: pytest.CaptureFixture[str],
) -> None:
    chooser = random.Random(seed)
    routes = tmp_path / "routes.toml"
    routes.write_text("[routes.ENTITY_CREATED]\nreceipt = true\n")
    changes: dict[str, Any] = {
        "ws_api_keys_file": write_keys(tmp_path, KEYS),
        "ws_routes_file": routes,
        "ws_cluster": True,
        "ws_message_rate_limit": 10_000,
    }
    async with serving(redis_url, "direct", **changes) as gateway, AsyncExitStack() as stack:
        world = World(gateway, backend, stack)
        for tenant in TENANTS:
            await world.connect(tenant)
        done: set[object] = set()
        for _ in range(ROUNDS):
            before, connected = len(world.streams()), world.connected()
            name, key = chooser.choice(CALLS).name, chooser.choice(list(KEYS))
            reached = await act(world, chooser, name, key, chooser.choice(TENANTS))
            mine = set(KEYS[key]["tenants"])
            assert {event["tenant_id"] for event in world.streams()[before:]} <= reached
            for tenant, endpoints in world.connected().items():
                if endpoints != connected[tenant]:
                    assert tenant in reached & mine
                    await world.connect(tenant)
                    done.add("disconnected")
            for tenant, texts in (await world.heard()).items():
                assert not texts or tenant in reached & mine, (name, key)
                assert all(json.loads(text)["tenant_id"] == tenant for text in texts)
                done |= {"heard"} if texts else set()
            done.add((name, bool(reached)))
        assert {"heard", "disconnected"} < done
        metrics = (await http(gateway.port, "/ws/metrics")).text
    out, err = capfd.readouterr()
    told = "".join([*world.replies, metrics, out, err])
    for key in KEYS:
        assert secret_of(key) not in told
        assert sha256(secret_of(key).encode()).hexdigest() not in told
