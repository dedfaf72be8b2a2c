"""``nodes``, ``who``, ``kick`` and ``check``, with all processes that run on one Redis."""

import json
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import trio
from structlog.testing import capture_logs

from tests.support.api_keys import write_keys
from tests.support.commands import SECRETS, run
from tests.support.gateways import (
    Running,
    admitted,
    closed,
    receive_event,
    received,
    serving,
    until,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.cli.check_processes import differences
from trio_gateway.cli.nodes import duration, ranges
from trio_gateway.cluster.building import ClusterParts
from trio_gateway.redis_sets import RedisSet

_PAUSE = 0.5  # seconds of those in which the processes must answer


@pytest.fixture(autouse=True)
def _no_logs() -> Iterator[None]:
    """The gateways are in this process: their log would be in the output of the commands."""
    with capture_logs():
        yield


async def command(redis_url: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    """A command's exit status, output and errors.

    One that only asks is repeated if the machine gave the gateways no time to answer: who answers
    too late is missing.
    """
    settings = {"REDIS_URL": redis_url, **SECRETS, **env}
    for _ in range(5):
        watch = Stopwatch()
        done = await trio.to_thread.run_sync(partial(run, *arguments, env=settings))
        if watch.taken < _PAUSE or arguments[0] == "kick":
            break
    return done.exit_code, done.stdout, done.stderr


def cluster_of(gateway: Running) -> ClusterParts:
    found = gateway.app.parts.cluster
    assert found is not None
    return found


async def alive(*gateways: Running) -> list[str]:
    """Wait until Redis knows all, and all listen; return their names."""
    names = {cluster_of(each).registry.name for each in gateways}

    async def are_known() -> bool:
        known = (await cluster_of(gateways[0]).registry.read()).keys() == names
        return known and all(cluster_of(each).link.connected for each in gateways)

    await until(are_known)
    return sorted(names)


async def test_nodes_lists_all_processes(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
    ):
        names = await alive(one, other)
        status, out, err = await command(redis_url, "nodes", "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)["nodes"]
        assert [each["name"] for each in found] == names
        assert set(found[0]) == {
            "name", "version", "started_at", "draining", "connections", "lag", "shards",
        }  # fmt: skip
        status, out, err = await command(redis_url, "nodes")
        header, *rows = out.splitlines()
        assert (status, err) == (0, "")
        assert header.split() == [
            "process", "version", "up", "state", "connections", "lag", "shards",
        ]  # fmt: skip
        assert [row.split()[0] for row in rows] == names


async def test_kick_closes_the_connections_on_all_processes(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
        admitted(one.staff_url("waiter", sub="21")) as first,
        admitted(other.staff_url("admin", sub="21")) as second,
        admitted(one.staff_url("waiter", sub="22", jti="a")) as colleague,
        admitted(other.diner_url(session_id=456)) as diner,
    ):
        await alive(one, other)
        kick = partial(command, redis_url, "kick", "--tenant", "1")
        status, out, _ = await kick("--user", "21", "--reason", "shift is over", "--json")
        assert (status, json.loads(out)) == (0, {"closed": 2, "complete": True, "missing": []})
        assert await closed(first) == await closed(second) == (4001, "shift is over")
        assert await kick("--session", "456") == (0, "1 connection closed\n", "")
        assert (await closed(diner))[0] == 4001
        assert await received(colleague) == []
        assert (await command(redis_url, "kick", "--tenant", "2", "--jti", "a"))[0] == 1
        assert await received(colleague) == []
        assert await kick("--jti", "a") == (0, "1 connection closed\n", "")
        assert (await closed(colleague))[0] == 4001
        assert await kick("--jti", "a") == (1, "0 connections closed\n", "")


async def test_who_lists_the_connected_of_a_tenant_on_all_processes(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
        admitted(one.staff_url("waiter", sub="21", branch_ids=[1, 2], sector_ids=[5, 6])),
        admitted(other.staff_url("waiter", sub="21", branch_ids=[1], sector_ids=[5])),
        admitted(other.staff_url("admin", sub="30", branch_ids=[2])),
        admitted(other.staff_url("waiter", sub="40", tenant_id=2)),
        admitted(one.diner_url(session_id=456, table_id=10, branch_id=1)),
    ):
        await alive(one, other)
        who = partial(command, redis_url, "who", "--tenant", "1")
        status, out, err = await who("--branch", "1", "--json")
        found = json.loads(out)
        assert (status, err) == (0, "")
        assert (found["complete"], found["missing"]) == (True, [])
        (user,) = found["users"]
        assert (user["user_id"], user["endpoint"], user["connections"]) == ("21", "waiter", 2)
        assert user["sector_ids"] == [5, 6]
        assert found["sessions"] == [{"session_id": 456, "table_id": 10, "connections": 1}]
        status, out, err = await who()
        assert (status, err) == (0, "")
        assert [line.split()[:6] for line in out.splitlines()] == [
            ["endpoint", "user", "session", "table", "sectors", "connections"],
            ["admin", "30", "-", "-", "-", "1"],
            ["waiter", "21", "-", "-", "5,6", "2"],
            ["diner", "-", "456", "10", "-", "1"],
        ]
        nobody = await command(redis_url, "who", "--tenant", "9")
        assert nobody == (0, "", "nobody is connected\n")


async def test_slo_lists_the_slowest_tenants_of_all_processes_first(
    redis_url: str, backend: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"ws_cluster": True, "ws_slo_seconds": 5}
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings) as other,
        admitted(one.staff_url("waiter")) as first,
        admitted(other.staff_url("waiter", tenant_id=2)) as second,
    ):
        await alive(one, other)
        assert await command(redis_url, "slo") == (
            0, "", "no event was delivered in the last hour\n",
        )  # fmt: skip
        now = int(time.time() * 1000)
        for tenant, ago in ((1, 20_000), (2, 10_000)):
            event = {"type": "ROUND_READY", "tenant_id": tenant, "branch_id": 1}
            backend.xadd("events:critical", {"data": json.dumps(event)}, id=f"{now - ago}-0")
        await receive_event(first)
        await receive_event(second)
        status, out, err = await command(redis_url, "slo", "--json")
        assert (status, err) == (0, "")
        found = json.loads(out)
        assert [each["tenant_id"] for each in found["tenants"]] == [1, 2]
        assert found["seconds"] == 5
        written = found["tenants"][0]["last_5_minutes"]["written"]
        assert (written["count"], written["over"]) == (1, 1)
        assert 20 <= written["p50"] < 30
        status, out, err = await command(redis_url, "slo", "--limit", "1")
        assert (status, err) == (0, "late: over 5 s\n1 more tenants: see --limit\n")
        header, five, hour = (line.split() for line in out.splitlines())
        assert header[:7] == ["tenant", "last", "written", "p50", "p95", "p99", "late"]
        assert (five[:4], hour[:3]) == (["1", "5", "min", "1"], ["1", "hour", "1"])
        monkeypatch.setitem(cluster_of(one).control._handlers, "delivery_times", None)
        status, out, err = await command(redis_url, "slo", "--tenant", "2")
        assert (status, out.split()[13]) == (1, "2")
        assert f"1 of 2 processes did not answer: {cluster_of(one).registry.name}" in err


async def test_who_says_what_processes_need_to_know_it(redis_url: str, tmp_path: Path) -> None:
    async with serving(redis_url, "direct", ws_api_keys_file=write_keys(tmp_path)) as gateway:
        (name,) = await alive(gateway)
        status, out, err = await command(redis_url, "who", "--tenant", "1")
        assert (status, out) == (1, "")
        assert err == (
            f"1 of 1 processes do not know their users, because WS_CLUSTER is off there: {name}\n"
        )
        status, out, _ = await command(redis_url, "who", "--tenant", "1", "--json")
        found = {"users": [], "sessions": [], "complete": False, "missing": [name]}
        assert (status, json.loads(out)) == (1, found)


async def test_kick_names_the_process_that_does_not_answer(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as silent,
        admitted(one.staff_url("waiter", sub="21")) as client,
    ):
        await alive(one, silent)
        name = cluster_of(silent).registry.name

        async def no_answer(*_: Any) -> None:
            pass

        monkeypatch.setattr(cluster_of(silent).control, "_reply", no_answer)
        status, out, err = await command(redis_url, "kick", "--tenant", "1", "--user", "21")
        assert (status, out) == (1, "1 connection closed\n")
        assert err == f"1 of 2 processes did not answer: {name}\n"
        assert (await closed(client))[0] == 4001


@pytest.mark.parametrize(
    "arguments",
    [["nodes"], ["slo"], ["who", "--tenant", "1"], ["kick", "--tenant", "1", "--user", "21"]],
)
async def test_without_a_gateway_the_text_says_what_to_look_at(
    redis_url: str, backend: Any, arguments: list[str]
) -> None:
    async with serving(redis_url, "direct"):  # without WS_CLUSTER nobody knows it
        status, out, err = await command(redis_url, *arguments)
    assert (status, out) == (1, "")
    assert err.startswith(f"trio-gateway: no gateway is known on Redis at {redis_url[8:]}")
    assert "WS_CLUSTER=true or WS_API_KEYS_FILE" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize("scheme", ["redis", "redis+sentinel", "redis+cluster"])
async def test_redis_that_does_not_answer_is_one_sentence(scheme: str) -> None:
    name = "/m" if scheme == "redis+sentinel" else ""
    status, out, err = await command(f"{scheme}://:hunter2@127.0.0.1:1{name}", "nodes")
    assert (status, out) == (1, "")
    assert err.startswith(f"trio-gateway: Redis at 127.0.0.1:1{name}: ")
    assert "refused" in err
    assert err.endswith("; run trio-gateway check\n")
    assert "hunter2" not in err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ("--user 21", "--tenant"),
        ("--tenant 1", "pass one of --user, --session and --jti"),
        ("--tenant 1 --user 21 --jti a", "pass one of --user, --session and --jti"),
        ("--tenant 1 --user alice", "the id of a user is a number"),
        ("--tenant 0 --user 1", "--tenant"),
        (f"--tenant {2**63} --user 1", "--tenant"),
        (f"--tenant 1 --session {2**63}", "--session"),
        ("--tenant 1 --jti=", "--jti must not be empty"),
    ],
)
async def test_kick_refuses_what_it_does_not_understand(options: str, problem: str) -> None:
    status, _, err = await command("redis://127.0.0.1:1", "kick", *options.split())
    assert status == 2
    assert problem in err


@pytest.mark.parametrize("kind", ["sentinels", "cluster"])
async def test_processes_are_asked_on_redis_sets(request: pytest.FixtureRequest, kind: str) -> None:
    found: RedisSet = request.getfixturevalue(kind)
    async with (
        serving(found.url, "direct", ws_cluster=True) as one,
        serving(found.url, "direct", ws_cluster=True) as other,
        admitted(other.staff_url("waiter", sub="21")) as client,
    ):
        names = await alive(one, other)
        _, out, _ = await command(found.url, "nodes", "--json")
        assert [each["name"] for each in json.loads(out)["nodes"]] == names
        _, out, _ = await command(found.url, "who", "--tenant", "1", "--json")
        assert [each["user_id"] for each in json.loads(out)["users"]] == ["21"]
        status, out, err = await command(found.url, "kick", "--tenant", "1", "--user", "21")
        assert (status, out, err) == (0, "1 connection closed\n", "")
        assert (await closed(client))[0] == 4001


async def check(redis_url: str, **env: str) -> tuple[int, str]:
    """Its exit status, and what it says of processes."""
    status, out, _ = await command(redis_url, "check", WS_CLUSTER="true", **env)
    return status, "".join(
        line
        for line in out.splitlines(keepends=True)
        if "processes: " in line or "differs" in line or "fix" in line
    )


async def test_check_finds_processes_that_agree_and_answer(redis_url: str, backend: Any) -> None:
    none = "ok       processes: none is alive on this Redis yet\n"
    assert await check(redis_url) == (0, none)
    assert backend.keys() == []
    settings: dict[str, Any] = {
        "ws_cluster": True,
        "ws_max_connections_per_user": 3,
        "ws_max_connections_per_session": 20,
    }
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings) as other,
    ):
        await alive(one, other)
        both = "ok       processes: 2 answer, with the same settings\n"
        found = await check(redis_url)
        assert found == (0, both), found[1]


async def test_check_names_settings_that_differ_and_who_does_not_answer(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"ws_cluster": True, "ws_presence_grace": 30}
    async with (
        serving(redis_url, "direct", **settings) as one,
        serving(redis_url, "direct", **settings, redis_stream_shards=4) as other,
    ):
        await alive(one, other)
        first, second = (cluster_of(each).registry.name for each in (one, other))
        cluster_of(other).control._handlers.clear()
        limits = {
            "WS_MAX_CONNECTIONS_PER_USER": "1000", "WS_MAX_CONNECTIONS_PER_SESSION": "1000",
        }  # fmt: skip
        status, said = await check(redis_url, **limits)
    assert status == 1
    assert f"processes: 1 of 2 do not answer: {second}\n" in said
    assert "WS_PRESENCE_GRACE differs: 15 (this check), 30 (" in said
    assert f"REDIS_STREAM_SHARDS differs: 1 (this check, {first}), 4 ({second})\n" in said
    assert said.count("differs") == 2
    assert said.count("fix: ") == 3


def test_settings_are_compared_where_both_have_them() -> None:
    a = {"A": True, "B": ["x", "y"], "C": None, "D": 0.5}
    assert differences({"a": a, "b": {**a, "new": 1}, "old": {}}) == []
    assert differences({"a": a, "b": {**a, "B": ["x"], "A": False, "C": "s"}}) == [
        "A differs: true (a), false (b)", "B differs: x y (a), x (b)", "C differs: none (a), s (b)",
    ]  # fmt: skip


def test_durations_and_ranges_are_short() -> None:
    assert [duration(each) for each in (-1, 59, 60, 7200, 200_000)] == [
        "0 s", "59 s", "1 min", "2 h", "2 d",
    ]  # fmt: skip
    assert ranges([]) == "-"
    assert ranges([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
