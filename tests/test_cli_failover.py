"""Commands of the command line on a Sentinel set and on a Cluster."""

import json

import pytest

from tests.support.commands import SECRETS, run
from tests.support.gateways import admitted, make_settings, running
from tests.test_cli_rebalance import proxy, rebalance
from trio_gateway.redis_sets import RedisSet


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


@pytest.mark.parametrize("url", ["redis+sentinel://127.0.0.1:1/m", "redis+cluster://127.0.0.1:1"])
def test_servers_that_cannot_be_reached_end_the_command_with_a_sentence(url: str) -> None:
    done = run("dlq", "list", env={"REDIS_URL": url, **SECRETS})
    assert done.exit_code == 1
    assert done.output.startswith("trio-gateway: Redis: can't connect to 127.0.0.1:1")
