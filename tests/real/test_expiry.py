"""Expiry, renewal and a frozen Redis: expired clients are closed, and no other client waits."""

import json
import time
from contextlib import AsyncExitStack
from typing import Any, Final

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Running,
    Transport,
    admitted,
    closed,
    connect,
    http,
    make_settings,
    metrics,
    receive_event,
    received,
    running,
    settle,
    until,
    valkey,
)
from tests.support.sockets import dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.testing import make_jwt, make_payload, make_table_token

TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "asgi"])
STREAM: Final = "events:critical"


async def renew(client: WebSocketConnection, token: str) -> None:
    await client.send_message(json.dumps({"type": "auth", "token": token}))


def staff(**claims: Any) -> str:
    return make_jwt(JWT_SECRET, **claims)


def table(**claims: Any) -> str:
    return make_table_token(TABLE_SECRET, **claims)


# Expiry


@TRANSPORTS
async def test_silent_clients_are_closed_when_their_tokens_expire(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        AsyncExitStack() as stack,
    ):
        ends = time.time() + 1.5
        urls = [gateway.staff_url(name, exp=ends) for name in ("waiter", "kitchen")]
        urls += [gateway.staff_url("admin", exp=ends), gateway.diner_url(exp=ends)]
        clients = [await stack.enter_async_context(admitted(url)) for url in urls]
        watch = Stopwatch()
        later = await stack.enter_async_context(admitted(gateway.staff_url("waiter")))
        for client in clients:
            assert await closed(client) == (4001, "token expired")
            assert 0 <= time.time() - ends < 0.3 + watch.taken
        assert await received(later) == []
        await until(lambda: not gateway.app.parts.hub.leaving)
        figures = await metrics(gateway.port)
        assert figures["connections_closed_total{4001}"] == len(urls)


@TRANSPORTS
async def test_expiry_is_exact_and_the_leeway_allows_an_issuers_clock_ahead(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        now = time.time()
        for url in (
            gateway.staff_url("waiter", exp=now - 0.4),
            gateway.staff_url("waiter", iat=now + 60),
            gateway.staff_url("waiter", nbf=now + 60),
            gateway.diner_url(iat=now + 60),
        ):
            async with connect(url) as client:
                assert (await closed(client))[0] == 4001
        ends = time.time() + 1.2
        watch = Stopwatch()
        ahead = {"iat": now + 5, "nbf": now + 5, "exp": ends}
        async with (
            admitted(gateway.staff_url("waiter", **ahead)) as client,
            admitted(gateway.diner_url(**ahead)) as diner,
        ):
            for each in (client, diner):
                assert await closed(each) == (4001, "token expired")
                assert 0 <= time.time() - ends < 0.3 + watch.taken


@TRANSPORTS
async def test_renewal_moves_the_expiry_in_both_directions(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        started = time.time()
        async with (
            admitted(gateway.staff_url("waiter", exp=started + 1.4)) as longer,
            admitted(gateway.diner_url(exp=started + 600)) as shorter,
        ):
            await renew(longer, staff(exp=started + 600))
            await renew(shorter, table(exp=started + 1.6))
            watch = Stopwatch()
            assert await closed(shorter) == (4001, "token expired")
            assert 0 <= time.time() - started - 1.6 < 0.3 + watch.taken
            (answer,) = await received(longer)
            assert answer == {"type": "auth_ok", "expires_at": int(started + 600)}


@TRANSPORTS
async def test_no_event_is_missed_or_doubled_across_renewals(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    number, renewals = 400, 10
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        admitted(gateway.staff_url("admin")) as client,
    ):

        def publish() -> None:
            for n in range(number):
                backend.xadd(STREAM, {"data": make_payload("ENTITY_UPDATED", n=n)})
                backend.publish("channel:branch:1:admin", make_payload("ENTITY_CREATED", n=n))
                time.sleep(0.001)

        events: list[dict[str, Any]] = []

        async def listen() -> None:
            while len(events) < 2 * number + renewals:
                events.append(json.loads(await client.get_message()))

        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(listen)
                nursery.start_soon(trio.to_thread.run_sync, publish)
                for n in range(renewals):
                    await renew(client, staff(roles=["ADMIN", f"R{n}"], exp=time.time() + 600 + n))
                    await trio.sleep(0.06)
        assert await received(client) == []
        for kind in ("ENTITY_UPDATED", "ENTITY_CREATED"):
            assert [each["n"] for each in events if each["type"] == kind] == list(range(number))
        assert sum(each["type"] == "auth_ok" for each in events) == renewals


@TRANSPORTS
async def test_new_roles_branches_and_sectors_apply_at_once(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    def publish_all() -> None:
        for branch in (1, 2):
            for sector in (5, 6):
                payload = make_payload("ROUND_READY", branch_id=branch, sector_id=sector)
                backend.xadd(STREAM, {"data": payload})
            backend.publish(
                "channel:branch:1:admin", make_payload("ENTITY_CREATED", branch_id=branch)
            )

    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5])) as client,
    ):
        for claims, expected in (
            ({"branch_ids": [1], "sector_ids": [5]}, [(1, 5)]),
            ({"branch_ids": [2], "sector_ids": [5, 6]}, [(2, 5), (2, 6)]),
            ({"branch_ids": [1, 2], "sector_ids": [6]}, [(1, 6), (2, 6)]),
            ({"branch_ids": [1], "roles": ["MANAGER"]}, [(1, 5), (1, 6), (1, None)]),
            ({"branch_ids": [2]}, []),
        ):
            await renew(client, staff(**claims))
            assert [each["type"] for each in await received(client)] == ["auth_ok"]
            publish_all()
            await settle(gateway)
            events = [(each["branch_id"], each.get("sector_id")) for each in await received(client)]
            assert sorted(events, key=str) == expected


@TRANSPORTS
@pytest.mark.parametrize(
    ("token", "code"),
    [
        (staff(sub="22"), 4003),
        (staff(tenant_id=2), 4003),
        (staff(roles=["KITCHEN"]), 4003),
        (table(), 4001),
        (make_jwt("x" * 64), 4001),
        (staff(life=-1), 4001),
        (staff(type="refresh"), 4001),
        ("", 4001),
    ],
)
async def test_invalid_renewal_closes_the_connection_and_stops_its_events(
    backend: "redis.Redis", redis_url: str, transport: Transport, token: str, code: int
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        await renew(client, token)
        with trio.fail_after(3):
            ended = await closed(client)
        assert ended[0] == code
        assert not token or token not in ended[1]
        assert len(gateway.app.parts.hub) == 0


@TRANSPORTS
@pytest.mark.parametrize(
    ("token", "code"),
    [
        (table(session_id=457), 4003),
        (table(tenant_id=2), 4003),
        (staff(), 4001),
        (table(life=4 * 3600), 4001),
    ],
)
async def test_invalid_renewal_of_a_diner_closes_the_connection(
    backend: "redis.Redis", redis_url: str, transport: Transport, token: str, code: int
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        admitted(gateway.diner_url()) as client,
    ):
        await renew(client, token)
        assert (await closed(client))[0] == code


# Redis frozen


async def test_frozen_redis_delays_no_ping_and_connects_end_with_1013_in_bounded_time() -> None:
    with valkey() as server:
        settings = make_settings(
            server.connection_url, ws_max_handshakes=30, ws_accept_timeout=1, ws_max_failed_logins=1
        )
        async with (
            running(settings) as gateway,
            admitted(gateway.staff_url("waiter", jti="a")) as waiter,
            admitted(gateway.diner_url()) as diner,
        ):
            with server.frozen():
                await _while_frozen(gateway, waiter, diner)


async def _while_frozen(
    gateway: Running, waiter: WebSocketConnection, diner: WebSocketConnection
) -> None:
    endings: list[int] = []
    slowest = 0.0

    async def one(n: int) -> None:
        async with dialled(gateway.port) as client:
            try:
                await client.upgrade(f"/ws/waiter?token={staff(sub=str(n))}")
                endings.append((await client.closed())[0])
            except (
                EOFError,
                trio.BrokenResourceError,
            ):  # not even read, because there are too many
                endings.append(0)

    whole = Stopwatch()
    async with trio.open_nursery() as nursery:
        for n in range(60):
            nursery.start_soon(one, n)
        while len(endings) < 60:
            watch = Stopwatch()
            assert await received(waiter) == await received(diner) == []
            slowest = max(slowest, watch.net)
            assert gateway.app.parts.admissions.inside <= 30
            await trio.sleep(0.12)
    assert set(endings) <= {0, 1013}
    assert endings.count(1013) >= 30
    assert whole.net < 4
    assert slowest < 0.25
    assert len(gateway.app.parts.hub) == 2
    assert (
        gateway.app.parts.counts.rejected["auth"]
        == gateway.app.parts.counts.rejected["failed_logins"]
        == 0
    )


# Isolation: the cases that other tests leave out


@TRANSPORTS
async def test_event_id_of_another_tenant_replays_none_of_its_events(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    def publish_all(n: int) -> None:
        for tenant in (1, 2):
            payload = make_payload("ROUND_READY", tenant_id=tenant, session_id=456, n=n)
            backend.xadd(STREAM, {"data": payload})

    async with running(make_settings(redis_url), transport=transport) as gateway:
        async with admitted(gateway.diner_url(tenant_id=2)) as other:
            publish_all(1)
            await settle(gateway)
            (event,) = await received(other)
        publish_all(2)
        await settle(gateway)
        last = event["event_id"]
        urls = [
            gateway.diner_url(), gateway.staff_url("admin"), gateway.staff_url("kitchen"),
            gateway.staff_url("waiter", branch_ids=[2]), gateway.diner_url(session_id=457),
        ]  # fmt: skip
        expected = [1, 1, 1, 0, 0]
        for url, count in zip(urls, expected, strict=True):
            async with connect(f"{url}&last_event_id={last}") as client:
                answer = await receive_event(client)
                assert (answer["type"], answer["count"]) == ("resumed", count)
                missed = [await receive_event(client) for _ in range(count)]
                assert await received(client) == []
                assert [(each["tenant_id"], each["n"]) for each in missed] == [(1, 2)] * count


async def test_catch_up_returns_nothing_beyond_the_token(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        for tenant in (1, 2):
            for branch in (1, 2):
                payload = make_payload(
                    "ROUND_READY", tenant_id=tenant, branch_id=branch, session_id=456, sector_id=5
                )
                backend.xadd(STREAM, {"data": payload})
        await settle(gateway)

        async def asked(path: str, token: str) -> tuple[int, list[tuple[int, int]]]:
            headers = {"Authorization": f"Bearer {token}"}
            reply = await http(gateway.port, path, headers=headers)
            found = reply.json.get("events", [])
            return reply.status, [(each["tenant_id"], each["branch_id"]) for each in found]

        mine = "/ws/catchup?since=0&branch_id="
        session = "/ws/catchup/session?since=0&session_id="
        admin = staff(roles=["ADMIN"])
        assert await asked(mine + "1", admin) == (200, [(1, 1)])
        assert await asked(mine + "2", admin) == (403, [])
        assert await asked(mine + "1", staff(tenant_id=2)) == (200, [])  # without its sector
        assert await asked(mine + "1", staff(tenant_id=2, sector_ids=[5])) == (200, [(2, 1)])
        assert await asked(mine + "1", staff(roles=["CHEF"])) == (403, [])
        assert await asked(mine + "1", table()) == (401, [])
        assert await asked(mine + "1&branch_id=2", staff(branch_ids=[2])) == (403, [])
        assert (await asked(session + "456", table()))[0] == 200
        assert {tenant for tenant, _ in (await asked(session + "456", table()))[1]} == {1}
        assert await asked(session + "457", table()) == (403, [])
        assert await asked(session + "456", table(session_id=457)) == (403, [])
        assert await asked(session + "456", admin) == (401, [])


@TRANSPORTS
async def test_refreshed_sectors_are_the_clients_own(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with (
        running(make_settings(redis_url), transport=transport) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5])) as one,
        admitted(gateway.staff_url("waiter", tenant_id=2, sector_ids=[6])) as other,
    ):
        say = '{"type":"refresh_sectors","sector_ids":[6],"tenant_id":2,"branch_ids":[2]}'
        await one.send_message(say)
        assert await received(one) == [{"type": "sectors_updated", "sector_ids": [5]}]
        for tenant in (1, 2):
            payload = make_payload("ROUND_READY", tenant_id=tenant, sector_id=6)
            backend.publish("channel:branch:1:waiters", payload)
        await settle(gateway)
        assert await received(one) == []
        assert [each["tenant_id"] for each in await received(other)] == [2]


@TRANSPORTS
async def test_ticket_for_a_table_token_opens_no_staff_endpoint_and_vice_versa(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:

        async def ticket(token: str) -> str:
            headers = {"Authorization": f"Bearer {token}"}
            reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
            return str(reply.json["ticket"])

        for endpoint, token in (
            *((name, table()) for name in ("waiter", "kitchen", "admin")),
            ("diner", staff()),
            ("diner", staff(roles=["ADMIN"])),
        ):
            once = await ticket(token)
            async with connect(f"{gateway.url}/ws/{endpoint}?ticket={once}") as client:
                assert (await closed(client))[0] == 4001
            own = "waiter" if endpoint == "diner" else "diner"  # where it is still valid
            async with admitted(f"{gateway.url}/ws/{own}?ticket={once}"):
                pass
        await until(lambda: not gateway.app.parts.hub.connections)
        assert len(gateway.app.parts.hub) == 0
        await until(lambda: not gateway.app.parts.hub.leaving)
