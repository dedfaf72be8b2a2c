"""Which clients ``trio-gateway rebalance`` moves."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from tests.support.gateways import (
    JWT_SECRET,
    Running,
    admitted,
    closed,
    make_settings,
    received,
    running,
)
from trio_gateway.cli import main
from trio_gateway.cli.rebalance import plan
from trio_gateway.testing import make_jwt

PROCESSES = ("a", "b", "c")


def test_tenants_move_to_the_process_that_was_added() -> None:
    held = {"a": {1: 10, 2: 10, 3: 10}, "b": {4: 10, 5: 10, 6: 10}, "c": {}}
    found = plan(held, {1: "a", 2: "a", 3: "c", 4: "b", 5: "b", 6: "c"}, 1.5)

    assert found.places == {3: "c", 6: "c"}
    assert found.leaving == {"a": 10, "b": 10}
    assert found.coming == {"c": 20}
    assert found.staying == 0


def test_a_tenant_that_is_in_two_places_comes_together() -> None:
    found = plan({"a": {1: 5}, "b": {1: 3}, "c": {2: 40}}, {1: "b", 2: "c"}, 3)

    assert found.places == {1: "b"}
    assert found.leaving == {"a": 5}


def test_a_tenant_for_which_its_process_has_no_room_stays() -> None:
    found = plan({"a": {1: 60}, "b": {1: 30, 2: 10}, "c": {1: 20}}, {1: "a", 2: "b"}, 1.5)

    assert found.places == {}
    assert found.staying == 50


counts = st.dictionaries(st.integers(1, 9), st.integers(1, 50), max_size=9)


@given(
    st.fixed_dictionaries(dict.fromkeys(PROCESSES, counts)),
    st.lists(st.sampled_from([*PROCESSES, "gone"]), min_size=10, max_size=10),
    st.floats(1, 3),
)
def test_nothing_is_lost_and_no_process_gets_more_than_its_bound(
    held: dict[str, dict[int, int]], drawn: list[str], at_most: float
) -> None:
    places = {tenant: drawn[tenant] for each in held.values() for tenant in each}
    found = plan(held, places, at_most)

    total = sum(sum(each.values()) for each in held.values())
    assert sum(found.leaving.values()) == sum(found.coming.values())
    for process in PROCESSES:
        before = sum(held[process].values())
        after = before - found.leaving.get(process, 0) + found.coming.get(process, 0)
        assert after >= 0
        if process in found.coming:
            assert after <= at_most * total / 3 + 1e-6
    assert all(places[tenant] == place for tenant, place in found.places.items())
    assert "gone" not in found.places.values()


async def test_the_command_sends_clients_to_the_process_that_the_proxy_names(
    redis_url: str,
) -> None:
    async with (
        running(make_settings(redis_url)) as old,
        running(make_settings(redis_url)) as new,
        proxy(new) as url,
        admitted(f"{old.url}/ws/waiter?token={make_jwt(JWT_SECRET, sub='1')}") as client,
        admitted(f"{new.url}/ws/waiter?token={make_jwt(JWT_SECRET, sub='2')}") as other,
    ):
        status, text = await rebalance(redis_url, url, "--at-most", "2", "--dry-run")
        assert (status, json.loads(text)["clients_moving"]) == (0, 1)
        status, text = await rebalance(redis_url, url)
        assert json.loads(text)["clients_without_room"] == 1
        assert await received(client) == []

        status, text = await rebalance(redis_url, url, "--at-most", "2")
        assert (status, json.loads(text)["clients_moving"]) == (0, 1)
        code, reason = await closed(client)
        assert code == 1001
        assert reason.startswith("retry in ")
        assert await received(other) == []
        assert "token" not in text

    status, text = await rebalance(redis_url, url)
    assert (status, text) == (
        1,
        "trio-gateway: no gateway listens on this Redis: check REDIS_URL\n",
    )


@asynccontextmanager
async def proxy(gateway: Running) -> AsyncIterator[str]:
    """What places every tenant at this gateway."""
    answer = json.dumps({"process": gateway.app.parts.placement.process}).encode()

    async def serve(stream: trio.SocketStream) -> None:
        async with stream:
            while b"/ws/placement?ticket=1. " in await stream.receive_some(4096):
                head = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(answer)
                await stream.send_all(head + answer)

    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, serve, [listener])
        yield f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        nursery.cancel_scope.cancel()


async def rebalance(redis_url: str, url: str, *options: str) -> tuple[int, str]:
    """Its exit status, and what it prints."""
    arguments = ["rebalance", "--json", "--url", url, *options]
    env = {"REDIS_URL": redis_url, "JWT_SECRET": JWT_SECRET}
    run = partial(CliRunner().invoke, main, arguments, env=env)
    done = await trio.to_thread.run_sync(run)
    return done.exit_code, done.output
