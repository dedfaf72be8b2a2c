"""The sample for HAProxy puts the connections of one tenant on one gateway."""

import itertools
import math
import re
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    admitted,
    closed,
    connect,
    http,
    metrics,
    until,
)
from trio_gateway.core.minting import mint_legacy_table_token
from trio_gateway.core.shards import shard_of
from trio_gateway.testing import make_jwt, make_table_token

from .proxies import Behind, behind, require

pytestmark = pytest.mark.deploy
_users = itertools.count(1)


@pytest.fixture
async def three(redis_url: str, tmp_path: Path) -> AsyncIterator[Behind]:
    require("haproxy")
    settings = {"ALLOW_LEGACY_TABLE_TOKENS": "true"}
    async with behind("haproxy", redis_url, tmp_path, settings, 3) as found:
        await until(lambda: all_up(found))
        yield found


async def all_up(at: Behind) -> bool:
    """Whether HAProxy sends clients to all gateways; it has checked them since they are ready."""
    await trio.sleep(1.2)
    ready = [await http(port, "/ws/health/ready") for port in at.ports]
    return all(reply.status == 200 for reply in ready)


def staff(tenant: int) -> str:
    return make_jwt(JWT_SECRET, sub=str(next(_users)), tenant_id=tenant)


def diner(tenant: int) -> str:
    return make_table_token(TABLE_SECRET, session_id=next(_users), tenant_id=tenant)


async def ask(at: Behind, tenant: int, way: str) -> tuple[str, dict[str, Any]]:
    """What a client of this tenant connects with: a target, and options."""
    match way:
        case "token":
            return f"/ws/waiter?token={staff(tenant)}", {}
        case "table token":
            return f"/ws/diner?table_token={diner(tenant)}", {}
        case "legacy table token":
            numbers = {"tenant": tenant, "branch": 1, "table": 1, "session": next(_users)}
            at_last = int(time.time()) + 600
            token = mint_legacy_table_token(TABLE_SECRET, **numbers, expires_at=at_last)
            return f"/ws/diner?table_token={quote(token)}", {}
        case "Authorization":
            header = ("Authorization", f"Bearer {staff(tenant)}")
            return "/ws/waiter", {"extra_headers": [header]}
        case "subprotocol":
            return "/ws/waiter", {"subprotocols": ["gateway.v1", f"bearer.{staff(tenant)}"]}
        case "subprotocol, the other way round":
            return "/ws/waiter", {"subprotocols": [f"bearer.{staff(tenant)}", "gateway.v1"]}
    headers = {"Authorization": f"Bearer {staff(tenant)}"}
    answer = await http(at.port, "/ws/ticket", method="POST", headers=headers)
    return f"/ws/waiter?ticket={answer.json['ticket']}", {}


WAYS = [
    "token",
    "table token",
    "legacy table token",
    "Authorization",
    "subprotocol",
    "subprotocol, the other way round",
    "ticket",
]


async def join(at: Behind, stack: AsyncExitStack, tenant: int) -> WebSocketConnection:
    """A client that stays connected for as long as the stack."""
    target, options = await ask(at, tenant, "token")
    url = f"ws://127.0.0.1:{at.port}{target}"
    return await stack.enter_async_context(admitted(url, **options))


async def closes(at: Behind) -> list[float]:
    """The connections that each gateway has had."""
    found = [await metrics(port) for port in at.ports]
    return [sum(each.by_label("connections_closed_total").values()) for each in found]


async def test_100_of_100_connections_of_a_tenant_are_on_one_gateway_whatever_its_credential(
    three: Behind,
) -> None:
    async with AsyncExitStack() as stack:
        for other in range(1, 31):  # otherwise this tenant would be too large for one gateway
            await join(three, stack, other)
        tenant, place = await of_the_emptiest(three)
        for way in WAYS:
            before = await closes(three)
            for _ in range(100):
                target, options = await ask(three, tenant, way)
                async with admitted(f"ws://127.0.0.1:{three.port}{target}", **options):
                    pass
            await until(lambda before=before: closed_since(three, before, 100))  # type: ignore[misc]
            counts = [after - b for after, b in zip(await closes(three), before, strict=True)]
            assert counts[place] == sum(counts) == 100, way


async def of_the_emptiest(at: Behind) -> tuple[int, int]:
    """A tenant of the gateway that has the fewest connections, and that gateway."""
    before = await at.connections()
    place = before.index(min(before))
    for tenant in itertools.count(1_234_567):
        async with AsyncExitStack() as probe:
            await join(at, probe, tenant)
            if (await at.connections())[place] > before[place]:
                return tenant, place
        await until(lambda: same(at, before))
    raise AssertionError("unreachable")


async def same(at: Behind, connections: list[int]) -> bool:
    return await at.connections() == connections


async def closed_since(at: Behind, before: list[float], count: int) -> bool:
    return sum(await closes(at)) - sum(before) >= count


async def test_tenants_are_spread_and_a_large_one_leaves_room_for_others(three: Behind) -> None:
    async with AsyncExitStack() as stack:
        for tenant in range(1, 61):
            await join(three, stack, tenant)
        spread = await three.connections()
        assert sum(spread) == 60
        assert min(spread) >= 8
        for _ in range(60):
            await join(three, stack, 7)
        found = await three.connections()
        assert sum(found) == 120
        assert max(found) <= math.ceil(1.5 * 120 / 3) + 1
        gained = sorted(now - before for now, before in zip(found, spread, strict=True))
        assert gained[-1] >= 30  # most of it is still together


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_clients_of_a_gateway_that_ends_go_elsewhere_and_return_with_it(
    three: Behind, how: signal.Signals
) -> None:
    async with AsyncExitStack() as stack:
        for other in range(1, 13):
            await join(three, stack, other)
        tenant, place = await of_the_emptiest(three)
        before = await three.connections()
        mine = [await join(three, stack, tenant) for _ in range(2)]
        assert (await three.connections())[place] == before[place] + 2
        three.gateways[place].send_signal(how)
        for client in mine:
            assert (await closed(client))[0] == (1001 if how is signal.SIGTERM else 1006)
        again = [await join(three, stack, tenant) for _ in range(2)]
        assert all(not client.closed for client in again)
        three.gateways[place].wait(10)
        await three.start(place)
        await until(lambda: all_up(three))
        assert (await three.connections())[place] == 0
        await join(three, stack, tenant)
        assert (await three.connections())[place] == 1


async def test_workers_with_ports_of_their_own_are_replaced_and_no_client_is_refused(
    redis_url: str, tmp_path: Path
) -> None:
    require("haproxy")
    async with behind("haproxy", redis_url, tmp_path, count=3, workers=True) as at:
        await until(lambda: all_up(at))
        async with AsyncExitStack() as stack:
            for tenant in range(1, 31):
                await join(at, stack, tenant)
            tenant, place = await of_the_emptiest(at)
            assert sum(await at.connections()) == 30
            at.gateways[0].send_signal(signal.SIGHUP)
            log = at.gateways[0].stderr
            assert log is not None
            replaced = 0
            while replaced < 3:
                line = await trio.to_thread.run_sync(log.readline)
                replaced += b"worker replaced" in line
                async with AsyncExitStack() as one:  # the old worker is still draining
                    for _ in range(3):
                        await join(at, one, tenant)
        await until(lambda: all_up(at))
        async with AsyncExitStack() as stack:
            await join(at, stack, tenant)
            assert (await at.connections())[place] == 1


GARBAGE = [
    "nonsense",
    "a.b.c",
    "....",
    "%00%ff.%00.%ff",
    "9" * 40 + ".x",
    "-1:2:3",
    "7.",
    ":.",
    "%2e%2e%3a",
    "e" * 6000,
]


@pytest.mark.parametrize("key", ["token", "table_token", "ticket"])
async def test_garbage_is_rejected_with_4001_and_harms_nobody(three: Behind, key: str) -> None:
    endpoint = "diner" if key == "table_token" else "waiter"
    for each in GARBAGE:
        url = f"ws://127.0.0.1:{three.port}/ws/{endpoint}?{key}={each}"
        async with connect(url) as client:
            assert (await closed(client))[0] == 4001, each
    for protocol in ("bearer.", "bearer.nonsense", "bearer", "x.bearer.7.y"):
        url = f"ws://127.0.0.1:{three.port}/ws/waiter"
        async with connect(url, subprotocols=["gateway.v1", protocol]) as client:
            assert (await closed(client))[0] == 4001, protocol
    async with AsyncExitStack() as stack:
        await join(three, stack, 1)
    assert re.search(r"\bALERT\b|panic|fatal", three.log.read_text()) is None


SHARDED = {
    "ALLOW_LEGACY_TABLE_TOKENS": "true",
    "REDIS_STREAM_SHARDS": "64",
    "REDIS_STREAM_SHARDS_PREVIOUS": "64",
}
ONE_OF_EACH_SHARD = {shard_of(tenant, 64): tenant for tenant in range(2000)}


async def homes(at: Behind) -> dict[int, str]:
    """The process that HAProxy chooses for each shard."""
    found = {}
    for shard, tenant in ONE_OF_EACH_SHARD.items():
        answer = await http(at.port, f"/ws/placement?ticket={tenant}.")
        assert answer.status == 200
        found[shard] = str(answer.json["process"])
    return found


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_each_shard_has_a_home_and_a_gateway_that_ends_moves_its_own_shards_only(
    redis_url: str, tmp_path: Path, how: signal.Signals
) -> None:
    require("haproxy")
    assert len(ONE_OF_EACH_SHARD) == 64
    async with behind("haproxy with shards", redis_url, tmp_path, SHARDED, 3) as at:
        await until(lambda: all_up(at))
        before = await homes(at)
        assert sorted(Counter(before.values()).values()) == [21, 21, 22]
        at.gateways[1].send_signal(how)
        at.gateways[1].wait(10)
        gone = ({*before.values()} - {*(now := await homes(at)).values()}).pop()
        moved = {shard: now[shard] for shard in now if before[shard] == gone}
        assert {**before, **moved} == now
        assert len(set(moved.values())) == 2  # they are spread
        await at.start(1)
        await until(lambda: all_up(at))
        after = await homes(at)
        assert {s for s in after if after[s] != before[s]} == moved.keys()  # it has another name
        assert len({after[s] for s in moved}) == 1


async def test_large_tenant_leaves_its_home_when_that_has_far_more_than_the_others(
    redis_url: str, tmp_path: Path
) -> None:
    require("haproxy")
    async with behind("haproxy with shards", redis_url, tmp_path, SHARDED, 3) as at:
        await until(lambda: all_up(at))
        async with AsyncExitStack() as stack:
            for _ in range(130):
                await join(at, stack, 7)
            found = sorted(await at.connections())
        assert sum(found) == 130
        assert 100 <= found[2] <= 1.5 * 130 / 3 + 52


async def test_tenants_of_one_shard_are_on_one_gateway_and_shards_are_spread(
    redis_url: str, tmp_path: Path
) -> None:
    require("haproxy")
    async with behind("haproxy with shards", redis_url, tmp_path, SHARDED, 3) as at:
        await until(lambda: all_up(at))
        async with AsyncExitStack() as stack:
            for tenant in range(1, 61):
                await join(at, stack, tenant)
            # Each gateway reads the shards of its clients, and hardly any that another reads.
            read = [(await metrics(port))["streams_followed"] for port in at.ports]
            assert min(read) >= 5
            different = {shard_of(tenant, 64) for tenant in range(1, 61)}
            assert sum(read) == len(different)
            tenant, place = await of_the_emptiest(at)
            shard = shard_of(tenant, 64)
            neighbours = [other for other in range(100, 2000) if shard_of(other, 64) == shard]
            before = await closes(at)
            for way in ("token", "legacy table token", "ticket"):
                for neighbour in neighbours[:10]:
                    target, options = await ask(at, neighbour, way)
                    async with admitted(f"ws://127.0.0.1:{at.port}{target}", **options):
                        pass
            await until(lambda: closed_since(at, before, 30))
            counts = [after - b for after, b in zip(await closes(at), before, strict=True)]
            assert counts[place] == sum(counts) == 30
