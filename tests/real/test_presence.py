"""Who is present on several processes: over HTTP, to admins that watch, and in the stream."""

import json
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from typing import Any, cast

import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    Reachable,
    Reply,
    admitted,
    http,
    receive_event,
    received,
    serving,
    until,
)
from tests.support.processes import GatewayProcess
from tests.support.stopwatch import Stopwatch
from trio_gateway.testing import make_jwt, make_table_token

STREAM = "presence"


def bearer(**claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_jwt(JWT_SECRET, **{'roles': ['MANAGER']} | claims)}"}


async def ask(gateway: Reachable, branch: object = 1, **claims: Any) -> Reply:
    return await http(gateway.port, f"/ws/presence?branch_id={branch}", headers=bearer(**claims))


def events(backend: "redis.Redis") -> list[dict[str, Any]]:
    entries: Any = backend.xrange(STREAM)
    return [json.loads(fields[b"data"]) for _, fields in entries]


def held(backend: "redis.Redis") -> int:
    """How many users and sessions the processes hold, each counted in each process."""
    keys: Any = backend.keys("{gateway}:here:*")
    return sum(cast(Any, backend.hlen(key)) for key in keys)


def told(backend: "redis.Redis") -> list[tuple[str, str]]:
    return [(e["type"], str(e.get("user_id", e.get("session_id")))) for e in events(backend)]


async def watching(client: WebSocketConnection, branch: int = 1) -> Any:
    """Let an admin watch a branch; returns the first state."""
    await client.send_message(json.dumps({"type": "watch_presence", "branch_id": branch}))
    return await receive_event(client)


def two(redis_url: str, **settings: Any) -> Any:
    return serving(redis_url, "direct", ws_cluster=True, ws_presence_stream=STREAM, **settings)


async def test_presence_is_that_of_all_processes(redis_url: str, backend: "redis.Redis") -> None:
    async with (
        two(redis_url, ws_presence_grace=1) as one,
        two(redis_url, ws_presence_grace=1) as other,
        admitted(one.staff_url("waiter", sub="21", sector_ids=[5])),
        admitted(other.staff_url("waiter", sub="21", sector_ids=[6])),
        admitted(other.staff_url("kitchen", sub="7")),
        admitted(one.diner_url(session_id=456, table_id=10)),
        admitted(other.diner_url(session_id=456, table_id=10)) as diner,
        admitted(other.staff_url("waiter", sub="22", tenant_id=2)),
        admitted(other.staff_url("waiter", sub="23", branch_ids=[2])),
    ):
        await until(lambda: backend.zcard("{gateway}:nodes") == 2)
        for gateway in (one, other):
            reply = await ask(gateway)
            assert reply.status == 200
            assert reply.headers["cache-control"] == "no-store"
            found = reply.json
            sinces = [user.pop("since") for user in found["users"]]
            assert found == {
                "users": [
                    {"user_id": "7", "endpoint": "kitchen", "sector_ids": [], "connections": 1},
                    {"user_id": "21", "endpoint": "waiter", "sector_ids": [5, 6], "connections": 2},
                ],
                "sessions": [{"session_id": 456, "table_id": 10, "connections": 2}],
                "complete": True,
                "missing": [],
            }
            assert all(isinstance(since, float) for since in sinces)
        await diner.aclose()

        async def sessions() -> bool:
            return bool((await ask(one)).json["sessions"][0]["connections"] == 1)

        await until(sessions)
        await until(lambda: len(events(backend)) == 5)
        assert {e["type"] for e in events(backend)} == {"USER_ONLINE", "SESSION_ONLINE"}
        session = next(e for e in events(backend) if e["type"] == "SESSION_ONLINE")
        assert list(session) == [
            "type", "tenant_id", "branch_ids", "session_id", "table_id", "endpoint", "at",
        ]  # fmt: skip
    await until(lambda: len(events(backend)) == 5)


async def test_presence_of_one_process_is_that_of_its_connections(redis_url: str) -> None:
    async with (
        two(redis_url) as one,
        two(redis_url) as other,
        admitted(one.staff_url("waiter", sub="21")),
        admitted(other.staff_url("waiter", sub="21")),
        admitted(other.staff_url("kitchen", sub="7")),
        admitted(other.diner_url(session_id=456)),
    ):
        clusters = [each.app.parts.cluster for each in (one, other)]
        names = [each.registry.name for each in clusters if each is not None]

        async def present(node: str) -> tuple[list[tuple[str, int]], int]:
            found = (await ask(one, f"1&node={node}")).json
            assert found["complete"]
            users = [(user["user_id"], user["connections"]) for user in found["users"]]
            return users, len(found["sessions"])

        assert await present(names[0]) == ([("21", 1)], 0)
        assert await present(names[1]) == ([("7", 1), ("21", 1)], 1)
        assert await present("*") == ([("7", 1), ("21", 2)], 1)
        reply = await ask(one, "1&node=nobody-1-aaaa")
        assert (reply.status, "no live process" in reply.text) == (404, True)
        reply = await ask(one, f"1&node={names[1]}", tenant_id=2)
        assert (reply.json["users"], reply.json["sessions"]) == ([], [])


async def test_refusals_of_presence(redis_url: str) -> None:
    async with two(redis_url) as gateway:
        no_token = await http(gateway.port, "/ws/presence?branch_id=x")
        assert no_token.status == 401
        for branch in ("", "x", "0", "-1", "1.0", str(2**63)):
            assert (await ask(gateway, branch)).status == 422
        assert (await ask(gateway, 2)).status == 403
        assert (await ask(gateway, roles=["WAITER"])).status == 403
        assert (await ask(gateway, roles=["ADMIN"])).status == 200
        table_token = {"Authorization": f"Bearer {make_table_token('x' * 64)}"}
        reply = await http(gateway.port, "/ws/presence?branch_id=1", headers=table_token)
        assert reply.status == 401


async def test_without_cluster_there_is_no_presence(redis_url: str, backend: "redis.Redis") -> None:
    async with (
        serving(redis_url, "direct") as gateway,
        admitted(gateway.staff_url("admin", sub="9")) as admin,
    ):
        reply = await ask(gateway)
        assert reply.status == 404
        assert "WS_CLUSTER" in reply.json["error"]
        await admin.send_message('{"type":"watch_presence","branch_id":1}')
        assert await received(admin) == []
        assert gateway.app.parts.hub.observer is None
        assert backend.keys("{gateway}*") == []


async def test_admin_is_told_the_state_and_then_each_change(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        two(redis_url, ws_presence_grace=0.3) as one,
        two(redis_url, ws_presence_grace=0.3) as other,
        admitted(one.staff_url("admin", sub="9")) as admin,
        admitted(other.staff_url("waiter", sub="21", sector_ids=[5])) as waiter,
    ):
        await until(lambda: backend.zcard("{gateway}:nodes") == 2)
        await until(lambda: len(events(backend)) == 2)
        state = await watching(admin)
        assert list(state) == ["type", "branch_id", "users", "sessions"]
        assert [(u["user_id"], u["connections"]) for u in state["users"]] == [("9", 1), ("21", 1)]
        async with admitted(other.diner_url(session_id=456, table_id=10)):
            item = {"session_id": 456, "table_id": 10, "connections": 1}
            change = {"type": "presence", "branch_id": 1, "joined": [item], "left": []}
            assert await receive_event(admin) == change
        item["connections"] = 0
        assert await receive_event(admin) == change | {"joined": [], "left": [item]}
        # Another device, another tenant and another branch are not told.
        async with (
            admitted(one.staff_url("waiter", sub="21", sector_ids=[5])),
            admitted(one.staff_url("waiter", sub="21", tenant_id=2)),
            admitted(one.staff_url("waiter", sub="22", branch_ids=[2])),
        ):
            await until(lambda: len(events(backend)) == 6)
        assert await received(admin) == []
        await until(lambda: held(backend) == 2)  # that they have left is written
        # Other sectors are.
        token = make_jwt(JWT_SECRET, sub="21", roles=["WAITER"], sector_ids=[6])
        await waiter.send_message(json.dumps({"type": "auth", "token": token}))
        changed = await receive_event(admin)
        assert changed["left"] == []
        assert changed["joined"] == [state["users"][1] | {"sector_ids": [6]}]
        # Another branch is a leave for those who watch this one, and nothing in the stream.
        before = len(events(backend))
        token = make_jwt(JWT_SECRET, sub="21", roles=["WAITER"], branch_ids=[3])
        await waiter.send_message(json.dumps({"type": "auth", "token": token}))
        changed = await receive_event(admin)
        assert [each["user_id"] for each in changed["left"]] == ["21"]
        await admin.send_message('{"type":"unwatch_presence"}')
        async with admitted(other.diner_url(session_id=457)):
            await until(lambda: len(events(backend)) == before + 1)
        assert await received(admin) == []


async def test_only_admins_watch_and_only_their_branches(redis_url: str) -> None:
    async with (
        two(redis_url) as gateway,
        admitted(gateway.staff_url("admin", sub="9", branch_ids=[1, 2])) as admin,
        admitted(gateway.staff_url("waiter", sub="8", roles=["MANAGER"])) as other,
    ):
        for branch in (3, 0, True, "1", 1.0, None):
            message = json.dumps({"type": "watch_presence", "branch_id": branch})
            await admin.send_message(message)
        await admin.send_message('{"type":"watch_presence"}')
        await other.send_message('{"type":"watch_presence","branch_id":1}')
        await trio.sleep(0.3)
        assert await received(admin) == await received(other) == []
        for branch in (1, 2):
            assert (await watching(admin, branch))["branch_id"] == branch
        # A renewal that loses a branch ends its watch.
        token = make_jwt(JWT_SECRET, sub="9", roles=["ADMIN"], branch_ids=[2])
        await admin.send_message(json.dumps({"type": "auth", "token": token}))
        assert (await receive_event(admin))["type"] == "auth_ok"
        async with admitted(gateway.staff_url("waiter", sub="21", branch_ids=[1, 2])):
            assert (await receive_event(admin))["branch_id"] == 2
            assert await received(admin) == []


async def test_grace_is_in_the_state_but_not_in_the_answer(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with two(redis_url) as gateway:
        async with admitted(gateway.staff_url("waiter", sub="21")):
            await until(lambda: len(events(backend)) == 1)
        async with admitted(gateway.staff_url("admin", sub="9")) as admin:
            await until(lambda: backend.zcard("{gateway}:leaving") == 1)
            found = {u["user_id"]: u["connections"] for u in (await watching(admin))["users"]}
            assert found == {"9": 1, "21": 0}
        assert (await ask(gateway)).json["users"] == []


async def test_watchers_get_the_whole_state_again_after_changes_may_have_been_lost(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        two(redis_url) as one,
        admitted(one.staff_url("admin", sub="9")) as admin,
        admitted(one.staff_url("admin", sub="9")) as second,
    ):
        state = await watching(admin)
        assert await watching(second) == state
        backend.client_kill_filter(_type="pubsub")
        for client in (admin, second):
            assert await receive_event(client, 10) == state
        # A change that was missed shows in the number of the next one.
        backend.hincrby("{gateway}:presence:state", "rev", 1)
        async with admitted(one.staff_url("waiter", sub="21")):
            again = await receive_event(admin)
            assert [each["user_id"] for each in again["users"]] == ["9", "21"]


async def test_present_users_are_a_metric_of_the_whole_service(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        two(redis_url) as one,
        two(redis_url) as other,
        admitted(one.staff_url("waiter", sub="21")),
        admitted(other.staff_url("waiter", sub="21")),
        admitted(other.staff_url("waiter", sub="22")),
    ):

        async def both_say_two() -> bool:
            texts = [(await http(each.port, "/ws/metrics")).text for each in (one, other)]
            return all('wsgateway_present{endpoint="waiter"} 2' in text for text in texts)

        await until(both_say_two)


async def test_a_stream_that_cannot_be_written_costs_only_the_stream(
    redis_url: str, backend: "redis.Redis"
) -> None:
    backend.set(STREAM, "not a stream")
    async with two(redis_url) as gateway, admitted(gateway.staff_url("admin", sub="9")) as admin:
        assert [each["user_id"] for each in (await watching(admin))["users"]] == ["9"]
        assert (await ask(gateway)).json["complete"]


async def test_process_that_does_not_answer_is_named_within_two_seconds(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    settings = {"WS_CLUSTER": "true", "WS_PRESENCE_STREAM": STREAM, "WS_PRESENCE_GRACE": "0.5"}
    process = GatewayProcess(redis_url, tmp_path, **settings)
    try:
        async with two(redis_url, ws_presence_grace=0.5) as gateway:
            await process.start()
            assert process.process is not None
            async with (
                admitted(gateway.staff_url("waiter", sub="21")),
                admitted(Reachable(process.port).staff_url("waiter", sub="22")) as far,
            ):
                await until(lambda: len(events(backend)) == 2)
                assert [u["user_id"] for u in (await ask(gateway)).json["users"]] == ["21", "22"]
                process.process.send_signal(signal.SIGSTOP)
                watch = Stopwatch()
                found = (await ask(gateway)).json
                assert watch.net < 2
                assert [user["user_id"] for user in found["users"]] == ["21"]
                assert not found["complete"]
                [name] = found["missing"]
                assert f"-{process.process.pid}-" in name
                process.process.send_signal(signal.SIGCONT)

                async def is_complete() -> bool:
                    return bool((await ask(gateway)).json["complete"])

                await until(is_complete)
                await far.send_message("ping")
                assert await far.get_message() == '{"type":"pong"}'
            await until(lambda: len(events(backend)) == 4)
        assert sorted(told(backend)) == [
            (f"USER_{kind}", user) for kind in ("OFFLINE", "ONLINE") for user in ("21", "22")
        ]
    finally:
        process.kill()


async def test_admins_of_two_tenants_never_see_each_other(
    redis_url: str, backend: "redis.Redis"
) -> None:
    """Users of tenant n have numbers from n * 100 on."""
    random = Random(7)
    async with two(redis_url) as one, two(redis_url) as other, AsyncExitStack() as stack:
        watchers = {}
        for tenant in (1, 2):
            url = one.staff_url("admin", sub=str(tenant * 100), tenant_id=tenant, branch_ids=[1, 2])
            watchers[tenant] = await stack.enter_async_context(admitted(url))
            for branch in (1, 2):
                assert (await watching(watchers[tenant], branch))["branch_id"] == branch
        for _ in range(30):
            tenant, gateway = random.choice((1, 2)), random.choice((one, other))
            claims = {"tenant_id": tenant, "branch_ids": random.choice(([1], [2], [1, 2]))}
            number = tenant * 100 + random.randrange(1, 9)
            endpoint = random.choice(("waiter", "kitchen", "diner"))
            url = gateway.diner_url(tenant_id=tenant, session_id=number)
            if endpoint != "diner":
                url = gateway.staff_url(endpoint, sub=str(number), **claims)
            await stack.enter_async_context(admitted(url))
            caller = random.choice((1, 2))
            reply = await ask(gateway, random.choice((1, 2)), tenant_id=caller, branch_ids=[1, 2])
            assert reply.json["complete"]
            assert numbers(reply.json) <= set(range(caller * 100, caller * 100 + 100))
        await trio.sleep(0.3)
        for tenant, watcher in watchers.items():
            seen = set().union(*map(numbers, await received(watcher)))
            assert seen
            assert seen <= set(range(tenant * 100, tenant * 100 + 100))


def numbers(message: Any) -> set[int]:
    """The users and sessions in an answer, or in a message."""
    items = [
        each for key in ("users", "sessions", "joined", "left") for each in message.get(key, ())
    ]
    return {int(each.get("user_id", each.get("session_id"))) for each in items}
