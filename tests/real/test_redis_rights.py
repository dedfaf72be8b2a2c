"""A Redis with minimal rights: an ACL, or a proxy with few commands."""

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from click.testing import CliRunner
from structlog.testing import capture_logs

from tests.support import receipts
from tests.support.api_keys import publish, write_keys
from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    http,
    make_settings,
    receive_event,
    received,
    running,
    until,
    valkey,
)
from tests.support.redis_server import RedisServer
from trio_gateway.cli import main
from trio_gateway.core.control_messages import Disconnect
from trio_gateway.publisher import Publisher
from trio_gateway.redis_sets import Cluster, Node, RedisSet, SentinelSet
from trio_gateway.testing import make_jwt

STREAM, DLQ, PRESENCE = "events:critical", "events:dlq", "presence"
ALL: dict[str, Any] = {
    "redis_dlq_stream": DLQ,
    "ws_cluster": True,
    "ws_presence_stream": PRESENCE,
}


@pytest.fixture(scope="module", autouse=True)
def _with_files(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("files")
    ALL["ws_api_keys_file"] = write_keys(folder)
    ALL["ws_routes_file"] = routes = folder / "routes.toml"
    routes.write_text(
        '[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 0.1\n'
        'then = [{to = "floor", within = 0.1}]\n'
    )


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with valkey() as found:
        yield found


def check(url: str, monkeypatch: pytest.MonkeyPatch) -> tuple[int, str]:
    for name, value in {
        "REDIS_URL": url,
        "JWT_SECRET": JWT_SECRET,
        "REDIS_DLQ_STREAM": DLQ,
        "WS_CLUSTER": "true",
        "WS_PRESENCE_STREAM": PRESENCE,
        "WS_API_KEYS_FILE": str(ALL["ws_api_keys_file"]),
        "WS_ROUTES_FILE": str(ALL["ws_routes_file"]),
    }.items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["check"])
    return done.exit_code, done.output


async def works(gateway: Running, backend: "redis.Redis") -> None:
    """Both sources, tickets, revocations, dead letters, scans, and what is set."""
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
    token = make_jwt(JWT_SECRET, roles=["WAITER"])
    bearer = {"Authorization": f"Bearer {token}"}
    assert (await http(gateway.port, "/ws/health/ready")).status == 200
    assert (await http(gateway.port, "/ws/health/detailed")).status == 200
    issued = await http(gateway.port, "/ws/ticket", method="POST", headers=bearer)
    ticket = issued.json["ticket"]
    async with admitted(f"{gateway.url}/ws/waiter?ticket={ticket}") as waiter:
        backend.publish("branch:1:waiters", json.dumps(event | {"entity": 1}))
        backend.xadd(STREAM, {"data": json.dumps(event | {"entity": 2})})
        backend.xadd(STREAM, {"data": "no json"})
        found: list[int] = []

        async def both() -> bool:
            found.extend(each["entity"] for each in await received(waiter))
            return len(found) == 2

        await until(both)
        assert sorted(found) == [1, 2]
        await until(lambda: backend.xlen(DLQ) == 1)
    commands = gateway.app.parts.commands  # for clients that resume from the stream
    assert len(await commands.read_back(STREAM, "+", 9)) == 2
    assert len(await commands.read_on(STREAM, "0-0", 9)) == 2
    if (cluster := gateway.app.parts.cluster) is not None:
        answers = await cluster.control.order("disconnect", Disconnect(1, user_id=21))
        assert answers.by_node.keys() == {cluster.registry.name}
        presence = cluster.presence
        assert presence is not None
        await until(lambda: presence.present["waiter"] == 1)  # it is in its grace
        assert backend.xlen(PRESENCE) == 1
        async with admitted(gateway.staff_url("admin", sub="9")) as admin:
            await admin.send_message('{"type":"watch_presence","branch_id":1}')
            assert len((await receive_event(admin))["users"]) == 2
    if gateway.app.parts.reach.watches:
        await has_receipts(gateway, backend)
    if gateway.app.parts.api is not None:
        cart = event | {"type": "CART_SYNC", "session_id": 456}
        added, sent = await publish(gateway.port, [event | {"id": "a"}, cart], "?confirm=all")
        assert added["event_id"] is not None
        assert sent == {"event_id": None}
    assert all(breaker.failures == 0 for breaker in gateway.app.parts.breakers.values())


async def has_receipts(gateway: Running, backend: "redis.Redis") -> None:
    """An event is confirmed, and another one is not."""

    def unheard() -> int:
        entries: Any = backend.xrange(STREAM)
        return sum(b'"EVENT_UNHEARD"' in fields[b"data"] for _, fields in entries)

    async with admitted(gateway.staff_url("waiter", sub="30", sector_ids=[5])) as waiter:
        receipts.publish(backend)
        event = await receive_event(waiter)
        await receipts.say(waiter, type="ack", last_event_id=event["event_id"])
        found = await receipts.receipts(gateway, event["event_id"])
        assert receipts.numbers(found) == (1, 1, 0)
        token = make_jwt(JWT_SECRET, roles=["MANAGER"])
        path = f"/ws/why?event_id={event['event_id']}&token={token}"
        assert (await http(gateway.port, path)).json["delivered"] == 1
    receipts.publish(backend)
    await until(lambda: unheard() == 2)


@pytest.fixture
def granted(server: RedisServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of a user with exactly the rights that check proposes."""
    url, proposed = f"redis://few:pw@127.0.0.1:{server.port}/1", set[str]()
    with redis.Redis(port=server.port) as admin:
        admin.execute_command("ACL SETUSER few reset on >pw")
        while True:  # without the right to SELECT it stops there
            status, printed = check(url, monkeypatch)
            lines = [line for line in printed.splitlines() if "ACL SETUSER" in line]
            words = set(re.findall(r"(?<= )(?:[+~]\S+|allchannels)", " ".join(lines)))
            if words <= proposed:
                break
            proposed |= words
            admin.execute_command("ACL", "SETUSER", "few", *sorted(words))
    assert status == 0, printed
    assert proposed.isdisjoint({"+@all", "~*"})
    return url


async def test_rights_that_check_proposes_are_sufficient(server: RedisServer, granted: str) -> None:
    with redis.Redis(port=server.port, db=1) as admin:
        admin.execute_command("ACL LOG RESET")
        async with running(make_settings(granted, **ALL)) as gateway:
            await works(gateway, admin)
        refused: Any = admin.acl_log()
        assert {entry["object"] for entry in refused} <= {"client|setname", "client|setinfo"}


async def grant_and_work(
    servers: RedisSet,
    url: str,
    others: Sequence[Node],
    backend: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Give a user on all servers what check proposes, and run a gateway with it."""
    everywhere = (*servers.nodes, *others)
    granted: set[str] = set()
    for node in everywhere:
        node.ask("ACL", "SETUSER", "few", "reset", "on", ">pw")
    while True:
        await until(servers.is_healthy, 30)  # on a busy machine its servers lose each other
        status, printed = await trio.to_thread.run_sync(check, url, monkeypatch)
        lines = {line for line in printed.splitlines() if "ACL SETUSER" in line}
        is_whole = "has no replica" not in printed  # one may just connect again
        if lines <= granted and is_whole and servers.is_healthy():
            break
        granted |= lines
        for line in lines:
            words = re.findall(r"(?<= )(?:[+~]\S+|allchannels)", line)
            for node in others if "of the Sentinels" in line else servers.nodes:
                node.ask("ACL", "SETUSER", "few", *words)
    assert status == 0, printed
    for node in everywhere:
        node.ask("ACL", "LOG", "RESET")
    async with running(make_settings(url, **ALL)) as gateway:
        await works(gateway, backend)
    refused = {
        dict(zip(entry[::2], entry[1::2], strict=True))["object"]
        for node in everywhere
        for entry in node.ask("ACL", "LOG")
    }
    assert refused <= {"client|setname", "client|setinfo"}


async def test_rights_that_check_proposes_are_sufficient_in_a_cluster(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = cluster.url.replace("://", "://few:pw@")
    with redis.RedisCluster(host="127.0.0.1", port=cluster.nodes[0].port) as backend:
        await grant_and_work(cluster, url, (), backend, monkeypatch)


async def test_rights_that_check_proposes_are_sufficient_with_sentinels(
    sentinels: SentinelSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = "?sentinel_username=few&sentinel_password=pw"
    url = sentinels.url.replace("://", "://few:pw@") + own
    with redis.Redis(port=sentinels.primary().port) as backend:
        await grant_and_work(sentinels, url, sentinels.sentinels, backend, monkeypatch)


async def test_without_the_right_to_the_probe_all_works_and_one_warning_says_so(
    server: RedisServer,
) -> None:
    settings = make_settings(f"redis://few:pw@127.0.0.1:{server.port}", redis_dlq_stream=DLQ)
    channels = [*settings.redis_channel_patterns, "channel:auth:revoked", "channel:gateway:*"]
    with redis.Redis(port=server.port) as admin:
        admin.acl_setuser(
            "few", enabled=True, reset=True, passwords=["+pw"], keys=["*"], categories=["+@all"],
            channels=channels,
        )  # fmt: skip
        with capture_logs() as logs:
            async with running(settings) as gateway:
                await works(gateway, admin)
    warnings = [line["event"] for line in logs if "probe" in line["event"]]
    assert len(warnings) == 1
    assert "&gateway:probe:*" in warnings[0]


async def test_breaker_of_the_other_processes_tells_what_is_refused(server: RedisServer) -> None:
    with redis.Redis(port=server.port) as admin, capture_logs() as logs:
        admin.acl_setuser(
            "few", enabled=True, reset=True, passwords=["+pw"], keys=["*"], channels=["*"],
            categories=["+@all"], commands=["-eval"],
        )  # fmt: skip
        url = f"redis://few:pw@127.0.0.1:{server.port}"
        async with running(make_settings(url, ws_cluster=True)):
            await until(lambda: any(line["event"] == "breaker opened" for line in logs))
    [line] = [each for each in logs if each["event"] == "breaker opened"]
    assert line["source"] == "cluster"
    assert line["error"].startswith("NoPermissionError: ")
    assert "'eval'" in line["error"]


async def test_proxy_without_client_and_hello_is_sufficient(tmp_path: Path) -> None:
    (tmp_path / "few.conf").write_text('rename-command CLIENT ""\nrename-command HELLO ""\n')
    with (
        valkey(include=str(tmp_path / "few.conf")) as proxy,
        redis.Redis(port=proxy.port, protocol=2) as backend,
        Publisher(proxy.connection_url) as publisher,
    ):
        with pytest.raises(redis.ResponseError, match="unknown command"):
            backend.execute_command("CLIENT", "LIST")
        async with running(make_settings(proxy.connection_url, redis_dlq_stream=DLQ)) as gateway:
            await works(gateway, backend)
        publisher.publish({"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1})
