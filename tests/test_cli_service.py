"""``nodes`` and ``kick``: all processes on one Redis, as a user of the command line sees them."""

import json
from functools import partial
from typing import Any

import pytest
import trio

from tests.support.commands import SECRETS, run
from tests.support.gateways import Running, admitted, closed, received, serving, until
from trio_gateway.cli.nodes import duration, ranges
from trio_gateway.cluster.building import ClusterParts
from trio_gateway.redis_sets import RedisSet


async def command(redis_url: str, *arguments: str, **env: str) -> tuple[int, str, str]:
    """A command's exit status, output and errors."""
    settings = {"REDIS_URL": redis_url, **SECRETS, **env}
    done = await trio.to_thread.run_sync(partial(run, *arguments, env=settings))
    return done.exit_code, done.stdout, done.stderr


def cluster_of(gateway: Running) -> ClusterParts:
    found = gateway.app.parts.cluster
    assert found is not None
    return found


async def alive(*gateways: Running) -> list[str]:
    """Wait until Redis knows all; return their names."""
    names = {cluster_of(each).registry.name for each in gateways}

    async def are_known() -> bool:
        return (await cluster_of(gateways[0]).registry.read()).keys() == names

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
        assert await kick("--session", "456") == (0, "1 connections closed\n", "")
        assert (await closed(diner))[0] == 4001
        assert await received(colleague) == []
        assert (await command(redis_url, "kick", "--tenant", "2", "--jti", "a"))[0] == 1
        assert await received(colleague) == []
        assert await kick("--jti", "a") == (0, "1 connections closed\n", "")
        assert (await closed(colleague))[0] == 4001
        assert await kick("--jti", "a") == (1, "0 connections closed\n", "")


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
        assert (status, out) == (1, "1 connections closed\n")
        assert err == f"1 of 2 processes did not answer: {name}\n"
        assert (await closed(client))[0] == 4001


@pytest.mark.parametrize("arguments", [["nodes"], ["kick", "--tenant", "1", "--user", "21"]])
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
        status, out, err = await command(found.url, "kick", "--tenant", "1", "--user", "21")
        assert (status, out, err) == (0, "1 connections closed\n", "")
        assert (await closed(client))[0] == 4001


def test_durations_and_ranges_are_short() -> None:
    assert [duration(each) for each in (-1, 59, 60, 7200, 200_000)] == [
        "0 s", "59 s", "1 min", "2 h", "2 d",
    ]  # fmt: skip
    assert ranges([]) == "-"
    assert ranges([0, 1, 2, 7, 9, 10]) == "0-2,7,9-10"
