"""Revocations and tickets, with Redis up and down."""

import json
import sqlite3
import time
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import redis
import trio
from structlog.testing import capture_logs

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
    received,
    running,
    settle,
    until,
    valkey,
)
from trio_gateway.access.sector_database import Assignments, SectorDatabase
from trio_gateway.testing import make_jwt, make_table_token

REVOKED = (4001, "token revoked")
TRANSPORTS = pytest.mark.parametrize("transport", ["direct", "asgi"])


def iso(moment: float, zone: timezone = UTC) -> str:
    return datetime.fromtimestamp(moment, zone).isoformat()


async def refusal(url: str) -> tuple[int, str]:
    async with connect(url) as client:
        return await closed(client)


# At connect


@TRANSPORTS
async def test_only_the_token_on_the_blacklist_is_refused(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    backend.set("auth:token:blacklist:stolen", "whatever")
    async with running(make_settings(redis_url), transport=transport) as gateway:
        assert await refusal(gateway.staff_url("waiter", jti="stolen")) == REVOKED
        assert await refusal(gateway.diner_url(jti="stolen")) == REVOKED
        async with (
            admitted(gateway.staff_url("waiter", jti="mine")),
            admitted(gateway.staff_url("waiter")),
            admitted(gateway.diner_url(jti="mine")),
        ):
            figures = await metrics(gateway.port)
            assert figures["connections_rejected_total{revoked}"] == 2
            assert figures["connections_closed_total{4001}"] == 2


@pytest.mark.parametrize(
    ("since", "refused"),
    [
        (lambda iat: iso(iat + 1), True),
        (lambda iat: iso(iat + 0.25), True),
        (lambda iat: iso(iat), False),  # the contract: later than iat
        (lambda iat: iso(iat - 1), False),
        (lambda iat: iso(iat + 1).replace("+00:00", "Z"), True),
        (lambda iat: iso(iat - 1).replace("+00:00", "Z"), False),
        (lambda iat: iso(iat + 1).removesuffix("+00:00"), True),  # without a zone it is UTC
        (lambda iat: iso(iat - 1).removesuffix("+00:00"), False),
        (lambda iat: iso(iat + 1, timezone(timedelta(hours=-5))), True),
        (lambda iat: iso(iat - 1, timezone(timedelta(hours=9, minutes=30))), False),
        (lambda iat: "no time at all", True),  # invalid, so treated as a revocation
        (lambda iat: b"\xff\xfe", True),
    ],
)
async def test_user_revoked_after_the_token_was_issued_is_refused(
    backend: "redis.Redis", redis_url: str, since: Any, refused: bool
) -> None:
    issued_at = int(time.time()) - 60
    backend.set("auth:user:revoked:21", since(issued_at))
    async with running(make_settings(redis_url)) as gateway:
        url = gateway.staff_url("waiter", iat=issued_at)
        if refused:
            assert await refusal(url) == REVOKED
        else:
            async with admitted(url):
                pass
        async with admitted(gateway.staff_url("waiter", sub="22", iat=issued_at)):
            pass


async def test_token_without_iat_counts_as_older_than_any_revocation(
    backend: "redis.Redis", redis_url: str
) -> None:
    backend.set("auth:user:revoked:21", "1970-01-01T00:00:00+00:00")
    async with running(make_settings(redis_url)) as gateway:
        assert await refusal(gateway.staff_url("waiter", iat=...)) == REVOKED
        async with admitted(gateway.staff_url("waiter", iat=1)):
            pass


async def test_renewal_with_a_revoked_token_closes_the_connection(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        fine = make_jwt(JWT_SECRET, jti="fine")
        await client.send_message(json.dumps({"type": "auth", "token": fine}))
        (answer,) = await received(client)
        assert answer["type"] == "auth_ok"
        backend.set("auth:token:blacklist:stolen", "1")
        stolen = make_jwt(JWT_SECRET, jti="stolen")
        await client.send_message(json.dumps({"type": "auth", "token": stolen}))
        assert await closed(client) == REVOKED


# By message


@TRANSPORTS
@pytest.mark.parametrize(
    ("message", "closed_clients"),
    [
        ({"jti": "a"}, {"a", "a of tenant 2", "diner a"}),
        ({"jti": "a", "tenant_id": 1}, {"a", "diner a"}),
        ({"user_id": 21}, {"a", "b", "a of tenant 2"}),
        ({"user_id": "21"}, {"a", "b", "a of tenant 2"}),
        ({"user_id": 21, "tenant_id": 2}, {"a of tenant 2"}),
        ({"user_id": "21", "tenant_id": 1, "reason": "left"}, {"a", "b"}),
        ({"user_id": 22, "jti": "b"}, {"b", "other user"}),
    ],
)
async def test_revocation_on_the_channel_closes_its_connections_at_once(
    backend: "redis.Redis",
    redis_url: str,
    transport: Transport,
    message: dict[str, Any],
    closed_clients: set[str],
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        urls = {
            "a": gateway.staff_url("waiter", jti="a"),
            "b": gateway.staff_url("kitchen", jti="b"),
            "a of tenant 2": gateway.staff_url("admin", tenant_id=2, jti="a"),
            "other user": gateway.staff_url("waiter", sub="22", jti="c"),
            "no jti": gateway.staff_url("waiter", sub="23"),
            "diner a": gateway.diner_url(jti="a"),
            "diner": gateway.diner_url(),
        }
        endings: dict[str, tuple[int, str]] = {}
        joined = trio.Event()
        count = 0

        async def live(who: str, url: str) -> None:
            nonlocal count
            async with admitted(url) as client:
                count += 1
                if count == len(urls):
                    joined.set()
                if who in closed_clients:
                    endings[who] = await closed(client, 2)
                else:
                    await settled.wait()
                    assert await received(client) == []

        settled = trio.Event()
        async with trio.open_nursery() as nursery:
            for who, url in urls.items():
                nursery.start_soon(live, who, url)
            await joined.wait()
            backend.publish("channel:auth:revoked", json.dumps(message))
            await until(lambda: len(endings) == len(closed_clients), 2)
            await settle(gateway)
            settled.set()
        assert endings == dict.fromkeys(closed_clients, REVOKED)


async def test_invalid_revocation_message_closes_no_connection(
    backend: "redis.Redis", redis_url: str
) -> None:
    junk: list[str | bytes] = [
        "", "{", "null", "[]", "21", '"21"', "{}", '{"user_id":null}', '{"jti":null}', '{"jti":""}',
        '{"jti":21}', '{"user_id":21.0}', '{"user_id":true}', '{"user_id":[21]}', '{"user_id":""}',
        '{"user_id":"21 "}', '{"user_id":21,"tenant_id":"1"}', '{"user_id":21,"tenant_id":3}',
        '{"tenant_id":1}', b"\xff\xfe\x00", "[" * 20_000,
    ]  # fmt: skip
    async with (
        running(make_settings(redis_url)) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
        admitted(gateway.diner_url()) as diner,
    ):
        for message in junk:
            backend.publish("channel:auth:revoked", message)
        await settle(gateway)
        assert await received(client) == await received(diner) == []
        assert (await http(gateway.port, "/ws/health/ready")).status == 200


# During admission


@pytest.fixture
def slow_sectors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Settings with a database that takes a third of a second for each waiter."""
    url = f"sqlite:///{tmp_path / 'backend.db'}"
    with sqlite3.connect(tmp_path / "backend.db") as database:
        columns = "tenant_id, branch_id, sector_id, waiter_id, assignment_date, shift, is_active"
        database.execute(f"CREATE TABLE waiter_sector_assignment ({columns})")
    fast = SectorDatabase.of

    async def slow(*arguments: Any) -> Assignments:
        found = await fast(*arguments)
        await trio.sleep(0.3)
        return found

    monkeypatch.setattr(SectorDatabase, "of", slow)
    return {"database_url": url}


@pytest.mark.parametrize("revoke", ["message", "key"])
@pytest.mark.parametrize(
    ("transport", "way"),
    [
        *(("direct", way) for way in ("token", "ticket", "renewal", "stream")),
        *(("asgi", way) for way in ("token", "renewal")),
    ],
)
async def test_token_revoked_during_admission_does_not_stay_connected(
    backend: "redis.Redis",
    redis_url: str,
    slow_sectors: dict[str, Any],
    transport: Transport,
    way: str,
    revoke: str,
) -> None:
    async with running(make_settings(redis_url, **slow_sectors), transport=transport) as gateway:
        token = make_jwt(JWT_SECRET, jti="stolen")
        statuses: list[int] = []

        async def revoke_it() -> None:
            await trio.sleep(0.15)
            if revoke == "message":
                backend.publish("channel:auth:revoked", '{"jti":"stolen"}')
            else:
                backend.set("auth:token:blacklist:stolen", "1")

        async with trio.open_nursery() as nursery:
            if way == "renewal":
                url = gateway.staff_url("waiter", jti="mine", branch_ids=[2])
                async with admitted(url) as client:
                    nursery.start_soon(revoke_it)
                    await client.send_message(json.dumps({"type": "auth", "token": token}))
                    assert await closed(client) == REVOKED
            elif way == "stream":
                nursery.start_soon(revoke_it)
                headers = {"Authorization": f"Bearer {token}"}
                reply = await http(gateway.port, "/ws/waiter/events", headers=headers)
                statuses.append(reply.status)
                assert statuses == [401]
            else:
                query = f"token={token}"
                if way == "ticket":
                    query = f"ticket={await ticket(gateway, token)}"
                    await trio.sleep(0.01)
                    assert gateway.app.parts.sector_assignments is not None
                    gateway.app.parts.sector_assignments.on_subscribed()
                nursery.start_soon(revoke_it)
                assert await refusal(f"{gateway.url}/ws/waiter?{query}") == REVOKED
        assert not gateway.app.parts.hub.connections


@TRANSPORTS
async def test_revocation_published_while_the_link_was_down_is_applied(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    settings = make_settings(redis_url)
    async with (
        running(settings, transport=transport) as gateway,
        admitted(gateway.staff_url("waiter", jti="a")) as client,
        admitted(gateway.staff_url("waiter", sub="22")) as other,
    ):
        backend.client_kill_filter(_type="pubsub")
        backend.set("auth:token:blacklist:a", "1")  # and the message is lost
        assert await closed(client, 3) == REVOKED
        assert await received(other) == []


# Sweeps


@TRANSPORTS
async def test_sweep_closes_only_clients_whose_token_was_revoked(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    settings = make_settings(redis_url, jwt_revalidation_interval=0.1)
    async with (
        running(settings, transport=transport) as gateway,
        admitted(gateway.staff_url("waiter", jti="a")) as by_token,
        admitted(gateway.staff_url("waiter", sub="22")) as by_user,
        admitted(gateway.diner_url(jti="d")) as diner,
        admitted(gateway.staff_url("waiter", sub="23")) as other,
        admitted(gateway.diner_url()) as other_diner,
    ):
        backend.set("auth:token:blacklist:a", "1")
        assert await closed(by_token) == REVOKED
        backend.set("auth:user:revoked:22", iso(time.time() + 60))
        assert await closed(by_user) == REVOKED
        backend.set("auth:token:blacklist:d", "1")
        assert await closed(diner) == REVOKED
        assert await received(other) == await received(other_diner) == []


async def test_sweep_checks_many_with_one_command(backend: "redis.Redis", redis_url: str) -> None:
    settings = make_settings(redis_url, jwt_revalidation_interval=0.05)

    def calls() -> int:
        stats: dict[str, Any] = backend.info("commandstats")
        return sum(each["calls"] for name, each in stats.items() if name in _READS)

    async with running(settings) as gateway, trio.open_nursery() as nursery:
        stay = trio.Event()

        async def live(n: int) -> None:
            async with admitted(gateway.staff_url("waiter", sub=str(n), jti=f"t{n}")):
                await stay.wait()

        for n in range(40):
            nursery.start_soon(live, n)
        await until(lambda: len(gateway.app.parts.hub) == 40)
        before, started = calls(), trio.current_time()
        await trio.sleep(0.5)  # ten sweeps; there is nothing to wait for
        sweeps = (trio.current_time() - started) / 0.05
        assert 1 <= calls() - before <= sweeps + 2
        stay.set()


_READS = {"cmdstat_mget", "cmdstat_get", "cmdstat_exists"}


async def test_live_clients_stay_and_new_ones_get_1013_while_redis_is_down() -> None:
    with valkey() as server, capture_logs() as logs:
        settings = make_settings(server.connection_url, jwt_revalidation_interval=0.05)
        async with (
            running(settings) as gateway,
            admitted(gateway.staff_url("waiter", jti="a")) as waiter,
            admitted(gateway.diner_url()) as diner,
        ):
            server.terminate()
            await until(
                lambda: [line["event"] for line in logs].count("revocations not checked") > 2
            )
            assert await received(waiter) == await received(diner) == []
            code, reason = await refusal(gateway.staff_url("waiter"))
            assert code == 1013
            assert "token" not in reason or "can't check" in reason
            assert (await refusal(gateway.diner_url(jti="d")))[0] == 1013
            # A table token without a jti cannot be revoked, so Redis is not needed.
            async with admitted(gateway.diner_url()):
                pass
            # Renewal: the old credential stays valid until its expiry.
            renewal = make_jwt(JWT_SECRET, jti="b")
            await waiter.send_message(json.dumps({"type": "auth", "token": renewal}))
            assert await received(waiter) == []
            figures = await metrics(gateway.port)
            assert figures["connections_rejected_total{dependency}"] == 2
            assert figures["connections_rejected_total{auth}"] == 0


# Tickets


async def ticket(gateway: Running, token: str) -> str:
    reply = await http(
        gateway.port, "/ws/ticket", method="POST", headers={"Authorization": f"Bearer {token}"}
    )
    assert reply.status == 200
    assert reply.json.keys() == {"ticket", "expires_in"}
    assert reply.json["expires_in"] == 30
    return str(reply.json["ticket"])


@TRANSPORTS
async def test_ticket_opens_one_connection(
    backend: "redis.Redis", redis_url: str, transport: Transport
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        for endpoint, token in {
            "waiter": make_jwt(JWT_SECRET),
            "admin": make_jwt(JWT_SECRET, roles=["ADMIN"]),
            "diner": make_table_token(TABLE_SECRET),
        }.items():
            once = await ticket(gateway, token)
            assert once not in token
            url = f"{gateway.url}/ws/{endpoint}?ticket={once}"
            async with admitted(url):
                pass
            assert await refusal(url) == (4001, "ticket invalid")


@TRANSPORTS
@pytest.mark.parametrize("why", ["origin", "role", "user limit", "total limit", "draining"])
@pytest.mark.parametrize("way", ["socket", "stream"])
async def test_ticket_stays_valid_if_its_client_is_refused_for_another_reason(
    backend: "redis.Redis", redis_url: str, transport: Transport, way: str, why: str
) -> None:
    limits = {
        "user limit": {"ws_max_connections_per_user": 1},
        "total limit": {"ws_max_total_connections": 1},
    }.get(why, {})
    origin = "http://evil.example" if why == "origin" else "http://localhost:5176"
    async with (
        running(make_settings(redis_url), transport=transport) as other,
        running(make_settings(redis_url, **limits), transport=transport) as gateway,
        AsyncExitStack() as stack,
    ):
        if limits:
            await stack.enter_async_context(admitted(gateway.staff_url("waiter", jti="x")))
        once = await ticket(gateway, make_jwt(JWT_SECRET))
        endpoint = "kitchen" if why == "role" else "waiter"
        if why == "draining":
            gateway.app.parts.drain.begun = True
        if way == "stream":
            path = f"/ws/{endpoint}/events?ticket={once}"
            reply = await http(gateway.port, path, headers={"Origin": origin})
            assert reply.status in {403, 429, 503}
        elif why != "draining":  # such an upgrade is refused earlier
            url = f"{gateway.url}/ws/{endpoint}?ticket={once}"
            async with connect(url, extra_headers=[("Origin", origin)]) as client:
                assert (await closed(client))[0] in {1001, 1008, 1013, 4003}
        gateway.app.parts.drain.begun = False
        async with admitted(f"{other.url}/ws/waiter?ticket={once}"):
            pass
        assert await refusal(f"{other.url}/ws/waiter?ticket={once}") == (4001, "ticket invalid")


async def test_two_concurrent_tickets_do_not_share_the_last_place(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, ws_max_total_connections=1)
    async with running(settings) as gateway, trio.open_nursery() as nursery:
        once, twice = [await ticket(gateway, make_jwt(JWT_SECRET)) for _ in range(2)]
        codes: list[int] = []

        async def try_it(found: str) -> None:
            async with connect(f"{gateway.url}/ws/waiter?ticket={found}") as client:
                codes.append((await closed(client))[0])

        nursery.start_soon(try_it, once)
        nursery.start_soon(try_it, twice)
        await until(lambda: codes)
        assert codes == [1013]
        await until(lambda: len(gateway.app.parts.hub) == 1)  # its ticket may still be redeemed
        nursery.cancel_scope.cancel()


async def test_ticket_is_redeemed_once_by_many_concurrent_clients(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as one, running(make_settings(redis_url)) as two:
        once = await ticket(one, make_jwt(JWT_SECRET))
        codes: list[int] = []

        async def try_it(gateway: Running) -> None:
            async with connect(f"{gateway.url}/ws/waiter?ticket={once}") as client:
                codes.append((await closed(client))[0])

        async with trio.open_nursery() as nursery:
            for gateway in (one, two) * 5:
                nursery.start_soon(try_it, gateway)
            await until(lambda: len(codes) == 9)
            await until(lambda: len(one.app.parts.hub) + len(two.app.parts.hub) == 1)
            assert codes == [4001] * 9
            nursery.cancel_scope.cancel()


async def test_redis_keeps_a_ticket_for_thirty_seconds_under_its_hash(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        once = await ticket(gateway, make_jwt(JWT_SECRET))
        (key,) = backend.keys()
        assert 28_000 < backend.pttl(key) <= 30_000
        assert once.encode() not in key
        backend.delete(key)  # as if it had expired
        url = f"{gateway.url}/ws/waiter?ticket={once}"
        assert await refusal(url) == (4001, "ticket invalid")


async def test_ticket_is_redeemed_by_another_process(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as one, running(make_settings(redis_url)) as two:
        once = await ticket(one, make_jwt(JWT_SECRET))
        async with admitted(f"{two.url}/ws/waiter?ticket={once}"):
            pass
        assert await refusal(f"{one.url}/ws/waiter?ticket={once}") == (4001, "ticket invalid")


async def test_ticket_grants_no_more_than_its_token(backend: "redis.Redis", redis_url: str) -> None:
    async with running(make_settings(redis_url)) as gateway:
        staff = make_jwt(JWT_SECRET, jti="a")
        url = gateway.url
        once = await ticket(gateway, staff)
        assert (await refusal(f"{url}/ws/kitchen?ticket={once}"))[0] == 4003
        once = await ticket(gateway, staff)
        assert (await refusal(f"{url}/ws/diner?ticket={once}"))[0] == 4001
        once = await ticket(gateway, make_table_token(TABLE_SECRET))
        assert (await refusal(f"{url}/ws/waiter?ticket={once}"))[0] == 4001
        # Revoked between the two: the token is checked again when the ticket is redeemed.
        once = await ticket(gateway, staff)
        backend.set("auth:token:blacklist:a", "1")
        assert await refusal(f"{url}/ws/waiter?ticket={once}") == REVOKED
        for wrong in ("", "x", "%00", "a" * 1000):
            assert (await refusal(f"{url}/ws/waiter?ticket={wrong}"))[0] == 4001


@pytest.mark.parametrize(
    ("authorization", "status"),
    [
        (None, 401),
        ("", 401),
        ("Bearer", 401),
        ("Basic dXNlcjpwYXNz", 401),
        ("Bearer nonsense", 401),
        (f"Bearer {make_jwt('another secret of thirty-two bytes')}", 401),
        (f"Bearer {make_jwt(JWT_SECRET, life=-10)}", 401),
        (f"Bearer {make_jwt(JWT_SECRET, type='refresh')}", 401),
        (f"Bearer {make_jwt(JWT_SECRET, roles='WAITER')}", 401),
        (f"Bearer {make_jwt(JWT_SECRET, jti='stolen')}", 401),
        (f"Bearer {make_table_token(TABLE_SECRET, jti='stolen')}", 401),
        (f"Bearer {make_jwt(JWT_SECRET, roles=['GARDENER'])}", 403),
        (f"Bearer {make_jwt(JWT_SECRET, roles=[])}", 403),
        (f"Bearer {make_jwt(JWT_SECRET, branch_ids=[])}", 403),
        (f"bearer   {make_jwt(JWT_SECRET)}", 200),
    ],
)
async def test_ticket_is_issued_for_a_credential_that_some_endpoint_admits(
    backend: "redis.Redis", redis_url: str, authorization: str | None, status: int
) -> None:
    backend.set("auth:token:blacklist:stolen", "1")
    async with running(make_settings(redis_url)) as gateway:
        headers = {} if authorization is None else {"Authorization": authorization}
        reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
        assert reply.status == status
        token = (authorization or "").rpartition(" ")[2]
        assert len(token) < 20 or token not in reply.text
        assert len(backend.keys()) == (2 if status == 200 else 1)  # others create no key in Redis
        assert (await http(gateway.port, "/ws/ticket", headers=headers)).status == 405


async def test_ticket_can_neither_be_issued_nor_used_while_redis_is_down() -> None:
    with valkey() as server:
        async with running(make_settings(server.connection_url)) as gateway:
            token = make_jwt(JWT_SECRET)
            once = await ticket(gateway, token)
            server.terminate()
            assert (await refusal(f"{gateway.url}/ws/waiter?ticket={once}"))[0] == 1013
            for bearer in (token, make_table_token(TABLE_SECRET)):
                reply = await http(
                    gateway.port,
                    "/ws/ticket",
                    method="POST",
                    headers={"Authorization": f"Bearer {bearer}"},
                )
                assert reply.status == 503  # not 401 or 403: the token is valid
