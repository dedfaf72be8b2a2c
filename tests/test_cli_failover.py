"""Commands of the command line on a Sentinel set and on a Cluster."""

import json

import pytest

from tests.support.commands import SECRETS, run
from tests.support.gateways import admitted, make_settings, running
from tests.test_cli_rebalance import proxy, rebalance
from trio_gateway.broker import connection
from trio_gateway.redis_sets import Cluster, RedisSet, SentinelSet, sentinel_set
from trio_gateway.redis_sets.node import wait_until


@pytest.fixture(scope="module", params=["sentinels", "cluster"])
def servers(request: pytest.FixtureRequest) -> RedisSet:
    found: RedisSet = request.getfixturevalue(request.param)
    return found


def dlq(servers: RedisSet, *arguments: str) -> tuple[int, str]:
    done = run("dlq", *arguments, env={"REDIS_URL": servers.url, **SECRETS})
    return done.exit_code, done.output


def test_dead_letters_are_shown_and_replayed(servers: RedisSet) -> None:
    event = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'
    stream = "events:critical:{3}"
    fields = {"stream": stream, "entry_id": "1-1", "reason": "r", "error": "e", "size": "9"}
    words = [word for pair in fields.items() for word in pair]
    letter = servers.primary("events:dlq").ask("XADD", "events:dlq", "*", *words, "data", event)
    assert f"{letter}  {stream} 1-1  r" in dlq(servers, "list")[1]
    assert event in dlq(servers, "show", letter)[1]
    done = f"{letter} -> {stream}\n1 replayed, 0 still invalid\n"
    assert dlq(servers, "replay", "--all") == (0, done)
    ((_, added),) = servers.primary(stream).ask("XRANGE", stream, "-", "+")
    assert added == {"data": event}
    assert servers.primary("events:dlq").ask("XLEN", "events:dlq") == 0


async def test_clients_are_rebalanced(servers: RedisSet) -> None:
    async with (
        running(make_settings(servers.url)) as old,
        running(make_settings(servers.url)) as new,
        proxy(new) as url,
        admitted(old.staff_url("waiter")),
    ):
        status, text = await rebalance(servers.url, url, "--at-most", "2", "--dry-run")
        assert (status, json.loads(text)["clients_moving"]) == (0, 1)
        assert len(json.loads(text)["processes"]) == 2


def check(url: str) -> tuple[int, str]:
    done = run("check", env={"REDIS_URL": url, **SECRETS})
    return done.exit_code, done.output


def test_check_finds_no_problem_in_a_healthy_set(servers: RedisSet) -> None:
    servers.wait_healthy()
    status, text = check(servers.url)
    assert (status, text.splitlines()[-1]) == (0, "The gateway can start."), text
    assert f"the same rights on the {len(servers.nodes) - 1} other servers" in text
    assert "appendonly is no" in text


def test_check_looks_at_the_rights_on_every_server(servers: RedisSet) -> None:
    """A replica with fewer rights would be found out by a failover."""
    few = servers.nodes[-1]
    for node in servers.nodes:
        node.ask("ACL", "SETUSER", "u", "on", ">p", "~*", "&*", "+@all")
    few.ask("ACL", "SETUSER", "u", "-getdel")
    status, text = check(servers.url.replace("://", "://u:p@"))
    assert status == 1
    assert f"server at 127.0.0.1:{few.port}: tickets (SET, GET, GETDEL): GETDEL failed" in text
    assert "1 problem\n" in text


def test_check_names_the_scheme_that_fits(sentinels: SentinelSet, cluster: Cluster) -> None:
    sentinel, data, node = (
        f"127.0.0.1:{each.port}"
        for each in (sentinels.sentinels[0], sentinels.primary(), cluster.primary("k"))
    )
    for url, problem, remedy in (
        (f"redis://{sentinel}", "is a Sentinel", "write redis+sentinel://HOST:PORT/NAME"),
        (f"redis://{node}", "is a node of a Cluster", "write redis+cluster://"),
        (f"redis+sentinel://{data}/m", "is not a Sentinel", "write redis:// for a single Redis"),
        (f"redis+cluster://{data}", "is not a node of a Cluster", "write redis:// for a single"),
        (f"redis+cluster://{sentinel}", "is not a node of a Cluster", "redis+sentinel:// for a"),
    ):
        status, text = check(url)
        assert status == 1
        assert problem in text
        assert remedy in text


def test_check_asks_about_tls_if_there_is_no_answer(
    sentinels: SentinelSet, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port without TLS waits for the rest of a TLS handshake, which it takes for a command."""
    monkeypatch.setattr(connection, "CONNECT_TIMEOUT", 0.1)
    for servers in (sentinels, cluster):
        status, text = check(servers.url.replace("redis+", "rediss+"))
        assert status == 1
        assert "no answer in 0.1 s" in text
        assert "if, and only if, the port speaks TLS" in text


def test_check_knows_the_problems_of_sentinels() -> None:
    with sentinel_set(replicas=1, password="p", sentinel_password="s") as found:
        first, *others = found.sentinels
        for url, problem, remedy in (
            (found.url.replace("mymaster", "other"), "knows no primary other", "mymaster"),
            (found.url.replace("sentinel_password=s", "sentinel_password=hunter2"), "WRONGPASS",
             "sentinel_password"),
            (found.url.partition("?")[0], "NOAUTH", "sentinel_password"),
            (found.url.replace(":p@", ""), "NOAUTH", "requires a password"),
        ):  # fmt: skip
            status, text = check(url)
            assert (status, problem in text, remedy in text) == (1, True, True), text
            assert "hunter2" not in text
        first.ask("ACL", "SETUSER", "few", "on", ">s", "+@connection")
        status, text = check(f"{found.url}&sentinel_username=few")
        assert "SENTINEL failed: NOPERM" in text
        assert "+sentinel|get-master-addr-by-name" in text
        for node in (*others, found.nodes[1]):
            node.kill()
        wait_until(lambda: "no quorum" in check(found.url)[1], 10, "it is not said")
        wait_until(lambda: "reach no replica" in check(found.url)[1], 10, "it is not said")
        assert f"Sentinel at 127.0.0.1:{others[0].port}: can't connect" in check(found.url)[1]
    with sentinel_set(replicas=0, sentinels=1) as found:
        status, text = check(found.url)
        assert status == 1
        assert "the primary has no replica" in text
        assert "1 Sentinel: without one" in text


def test_check_knows_the_problems_of_a_cluster(cluster: Cluster) -> None:
    owner, slot = cluster.primary("k"), cluster.slot("k")
    for node in cluster.nodes:
        node.try_ask("CLUSTER", "DELSLOTS", slot)
    try:
        status, text = check(cluster.url)
    finally:
        owner.ask("CLUSTER", "ADDSLOTS", slot)
    assert status == 1
    assert "1 of 16384 slots have no primary" in text
    assert "cluster_state:fail" in text


@pytest.mark.chaos
def test_check_knows_that_a_primary_of_a_cluster_has_no_replica(cluster: Cluster) -> None:
    cluster.wait_healthy()
    replica = next(node for node in cluster.nodes if node not in cluster.primaries())
    replica.kill()
    status, text = check(cluster.url)
    assert status == 1
    assert f"node at 127.0.0.1:{replica.port}: can't connect" in text
    wait_until(lambda: "has no replica" in check(cluster.url)[1], 10, "it is not said")


@pytest.mark.parametrize("url", ["redis+sentinel://127.0.0.1:1/m", "redis+cluster://127.0.0.1:1"])
def test_servers_that_cannot_be_reached_end_the_command_with_a_sentence(url: str) -> None:
    done = run("dlq", "list", env={"REDIS_URL": url, **SECRETS})
    assert done.exit_code == 1
    assert done.output.startswith("trio-gateway: Redis: can't connect to 127.0.0.1:1")
