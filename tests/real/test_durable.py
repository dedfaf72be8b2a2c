"""Durable events with a real Redis: history, resume, gaps and catch-up."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import pytest
import redis
import trio
from structlog.testing import capture_logs
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Running,
    admitted,
    connect,
    http,
    make_settings,
    metrics,
    receive_event,
    received,
    received_texts,
    running,
    settle,
    until,
    valkey,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.event_ids import tag
from trio_gateway.testing import make_jwt, make_table_token

STREAM = "events:critical"
TAG = tag(STREAM)
GAP = {"type": "gap"}


def payload(marker: object = 0, **keys: Any) -> str:
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "entity": {"marker": marker}}
    return json.dumps(event | keys)


def markers(found: list[Any]) -> list[Any]:
    return [event["entity"]["marker"] for event in found if "entity" in event]


def add(backend: "redis.Redis", marker: object, stream: str = STREAM, **keys: Any) -> str:
    """Add an event to the stream; return its event id."""
    entry: Any = backend.xadd(stream, {"data": payload(marker, **keys)})
    return f"{entry.decode()}-{tag(stream)}"


@asynccontextmanager
async def resumed(
    url: str, last_event_id: str, **options: Any
) -> AsyncIterator[tuple[WebSocketConnection, dict[str, Any]]]:
    """A client that resumes, and the answer to it."""
    async with connect(f"{url}&last_event_id={quote(last_event_id)}", **options) as client:
        answer = await receive_event(client, 4)
        assert answer["type"] == "resumed"
        yield client, answer


async def recover(url: str, last_event_id: str) -> list[Any] | None:
    """The markers of the recovered events; None if they cannot be recovered."""
    async with resumed(url, last_event_id) as (client, answer):
        found = markers([await receive_event(client) for _ in range(answer["count"])])
        assert await received(client) == []
        return found if answer["recovered"] else None


# Event ids


@pytest.mark.parametrize(
    "text",
    [
        '{"type":"ROUND_READY","tenant_id":1,"branch_id":1}',
        ' { "type" : "ROUND_READY", "tenant_id": 1, "branch_id": 1, "x": "\\u00e9😀\\ud83d" } \n',
        '{"event_id":"mine","tenant_id":1,"branch_id":1,"type":"ROUND_READY","n":1.10e5,"n":2}',
        '{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"entity":{"a":[{}]}}',
    ],
)
async def test_event_id_is_appended_to_the_published_bytes(
    backend: "redis.Redis", redis_url: str, text: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        async with admitted(gateway.staff_url("waiter")) as waiter:
            entry: Any = backend.xadd(STREAM, {"data": text.encode()})
            await settle(gateway)
            (live,) = await received_texts(waiter)
        event_id = f"{entry.decode()}-{TAG}"
        assert live == f'{text.rstrip()[:-1]},"event_id":"{event_id}"}}'
        assert json.loads(live)["event_id"] == event_id
        async with resumed(gateway.staff_url("waiter"), f"0-0-{TAG}") as (client, _):
            assert await received_texts(client) == [live]


async def test_event_id_is_the_same_in_two_gateways_and_resumes_in_either(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url)
    async with running(settings) as one, running(settings) as other:
        async with (
            admitted(one.staff_url("waiter")) as here,
            admitted(other.staff_url("waiter")) as there,
        ):
            for n in range(5):
                add(backend, n)
            await settle(one)
            await settle(other)
            events = await received(here)
            assert events == await received(there)
        for n, event in enumerate(events):
            for gateway in (one, other):
                missed = await recover(gateway.staff_url("waiter"), event["event_id"])
                assert missed == list(range(n + 1, 5))


@pytest.mark.parametrize("way", ["query", "header", "message"])
@pytest.mark.parametrize("transport", ["direct", "asgi"])
async def test_client_resumes_by_query_header_or_first_message(
    backend: "redis.Redis", redis_url: str, way: str, transport: Any
) -> None:
    async with running(make_settings(redis_url), transport=transport) as gateway:
        ids = [add(backend, n) for n in range(3)]
        await settle(gateway)
        url, options = gateway.staff_url("kitchen"), dict[str, Any]()
        if way == "query":
            url += f"&last_event_id={ids[0]}"
        elif way == "header":
            options = {"extra_headers": [(b"Last-Event-ID", ids[0].encode())]}
        async with connect(url, **options) as client:
            if way == "message":
                ask = {"type": "resume", "last_event_id": ids[0]}
                await client.send_message(json.dumps(ask))
            answer, *events = [await receive_event(client) for _ in range(3)]
            add(backend, 3)
            events.append(await receive_event(client))
    assert answer == {
        "type": "resumed", "recovered": True, "count": 2, "last_event_id": ids[0],
    }  # fmt: skip
    assert markers(events) == [1, 2, 3]


async def test_gateway_waits_for_an_id_that_a_faster_gateway_has_read(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        add(backend, 0)
        await settle(gateway)
        ahead = f"{int(time.time() * 1000) + 3_600_000}-0-{TAG}"
        watch = Stopwatch()
        assert await recover(gateway.staff_url("waiter"), ahead) is None
        assert watch.elapsed > 1.9
        assert watch.net < 3


# Start


async def test_restarted_gateway_loads_the_stream_page_by_page(
    backend: "redis.Redis", redis_url: str
) -> None:
    with backend.pipeline(transaction=False) as pipeline:
        for n in range(2500):
            pipeline.xadd(STREAM, {"data": payload(n)})
        ids = [entry.decode() for entry in pipeline.execute()]
    async with running(make_settings(redis_url)) as gateway:
        assert (await metrics(gateway.port))["history_events"] == 2500
        async with admitted(gateway.staff_url("waiter")) as fresh:
            assert await received(fresh) == []  # only clients that resume get the past
        url = gateway.staff_url("waiter")
        for n in (0, 1, 499, 500, 1499, 1500, 2498, 2499):
            assert await recover(url, f"{ids[n]}-{TAG}") == list(range(n + 1, 2500))
        assert await recover(url, f"0-0-{TAG}") == list(range(2500))


async def test_history_is_loaded_up_to_its_limit(backend: "redis.Redis", redis_url: str) -> None:
    ids = [add(backend, n) for n in range(20)]
    settings = make_settings(redis_url, ws_history_events=5, ws_resume_from_stream=0)
    async with running(settings) as gateway:
        url = gateway.staff_url("waiter")
        assert await recover(url, ids[15]) == [16, 17, 18, 19]
        assert await recover(url, ids[13]) is None
        assert await recover(url, f"0-0-{TAG}") is None


async def test_id_before_the_first_entry_of_the_stream_is_too_old(
    backend: "redis.Redis", redis_url: str
) -> None:
    ids = [add(backend, n) for n in range(10)]
    backend.xtrim(STREAM, maxlen=4, approximate=False)
    async with running(make_settings(redis_url)) as gateway:
        url = gateway.staff_url("waiter")
        for too_old in (ids[0], ids[4], f"0-0-{TAG}"):
            assert await recover(url, too_old) is None
        assert await recover(url, ids[6]) == [7, 8, 9]


async def test_id_of_a_deleted_stream_is_unknown_after_a_restart(
    backend: "redis.Redis", redis_url: str
) -> None:
    old = add(backend, 0)
    backend.delete(STREAM)
    time.sleep(0.002)
    new = add(backend, 1)
    add(backend, 2)
    async with running(make_settings(redis_url)) as gateway:
        assert await recover(gateway.staff_url("waiter"), old) is None
        assert await recover(gateway.staff_url("waiter"), new) == [2]


async def test_trimming_a_stream_does_not_change_the_history(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        ids = [add(backend, n) for n in range(10)]
        await settle(gateway)
        backend.xtrim(STREAM, maxlen=1, approximate=False)
        backend.client_kill_filter(_type="normal", skipme=True)
        add(backend, 10)
        await until(lambda: gateway.app.ready)
        await settle(gateway)
        assert await recover(gateway.staff_url("waiter"), ids[0]) == list(range(1, 11))
        assert (await metrics(gateway.port))["stream_gaps_total"] == 0


# Gaps


@asynccontextmanager
async def clients_of_all_kinds(gateway: Running) -> AsyncIterator[list[WebSocketConnection]]:
    """Clients of each kind and of several tenants: a gap concerns all of them."""
    urls = [gateway.staff_url(each) for each in ("waiter", "kitchen")]
    urls += [gateway.staff_url("admin", roles=["ADMIN"], tenant_id=2), gateway.diner_url()]
    async with AsyncExitStack() as stack:
        yield [await stack.enter_async_context(admitted(url)) for url in urls]


async def all_get_a_gap(gateway: Running, clients: list[WebSocketConnection]) -> None:
    streams = gateway.app.parts.streams
    assert streams is not None
    await until(lambda: streams.gaps)
    await until(lambda: gateway.app.ready)
    await settle(gateway)
    for client in clients:
        found = await received(client)
        assert [message for message in found if message == GAP] == [GAP]
        assert markers(found) in ([], ["last"])
        assert found[0] == GAP
    assert (await metrics(gateway.port))["stream_gaps_total"] == 1


def cut_off(backend: "redis.Redis") -> Any:
    """A transaction that begins with the gateway's connection being killed: what follows in it
    happens while the gateway is away.
    """
    pipeline: Any = backend.pipeline(transaction=True)
    pipeline.execute_command("CLIENT KILL TYPE normal SKIPME yes")
    return pipeline


@pytest.mark.parametrize("left", [0, 1, 2])
async def test_stream_trimmed_beyond_the_cursor_while_disconnected_is_a_gap_for_every_client(
    backend: "redis.Redis", redis_url: str, left: int
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_all_kinds(gateway) as clients,
    ):
        before = [add(backend, "before", session_id=456) for _ in range(2)]
        await settle(gateway)
        for client in clients:
            await received(client)
        away = cut_off(backend)
        for _ in range(3):
            away.xadd(STREAM, {"data": payload("lost")})
        if left == 2:
            away.xadd(STREAM, {"data": payload("last")})
        away.xadd(STREAM, {"data": payload("last")})
        away.xtrim(STREAM, maxlen=min(left, 1), approximate=False)
        away.execute()

        await all_get_a_gap(gateway, clients)
        url = gateway.staff_url("waiter")
        for last_event_id in before:
            assert await recover(url, last_event_id) is None
        async with resumed(url, "") as (_, answer):
            assert answer["recovered"]
        add(backend, "next")
        await settle(gateway)
        assert await recover(url, answer["last_event_id"]) == ["next"]
        if left:
            end = gateway.app.parts.extent.end[TAG]
            assert await recover(url, f"{end[0]}-0-{TAG}") == []


@pytest.mark.parametrize("entries", [1, 2, 5])
async def test_stream_recreated_while_disconnected_is_a_gap(
    backend: "redis.Redis", redis_url: str, entries: int
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_all_kinds(gateway) as clients,
    ):
        before = [add(backend, "before", branch_id=9) for _ in range(2)]
        await settle(gateway)
        time.sleep(0.002)
        away = cut_off(backend)
        away.delete(STREAM)
        if entries != 2:
            for _ in range(entries):
                away.xadd(STREAM, {"data": payload("last", branch_id=9)})
        away.execute()
        if entries == 2:
            await until(lambda: gateway.app.parts.streams and gateway.app.parts.streams.gaps)
            add(backend, "last", branch_id=9)

        await all_get_a_gap(gateway, clients)
        for last_event_id in before:
            assert await recover(gateway.staff_url("waiter"), last_event_id) is None


async def test_redis_that_restarts_empty_is_a_gap_and_is_read_again() -> None:
    with valkey() as server:
        settings = make_settings(server.connection_url, circuit_recovery_timeout=0.1)
        async with running(settings) as gateway, clients_of_all_kinds(gateway) as clients:
            with redis.Redis.from_url(server.connection_url) as backend:
                old = [add(backend, n, branch_id=9) for n in range(3)]
                await settle(gateway)
            server.kill()
            server.start_again()
            await until(server.is_running)
            streams = gateway.app.parts.streams
            assert streams is not None
            await until(lambda: streams.gaps, 15)
            await until(lambda: gateway.app.ready, 15)
            with redis.Redis.from_url(server.connection_url) as backend:
                new = add(backend, "last")
                await all_get_a_gap(gateway, clients)
                add(backend, "next")
            await settle(gateway)
            url = gateway.staff_url("waiter")
            assert [await recover(url, each) for each in (*old, new)] == [
                None,
                None,
                None,
                ["next"],
            ]


async def test_entry_trimmed_between_two_reads_is_a_gap(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with (
        running(make_settings(redis_url)) as gateway,
        clients_of_all_kinds(gateway) as clients,
    ):
        at_once = backend.pipeline(transaction=True)
        for marker in ("lost", "last"):
            at_once.xadd(STREAM, {"data": payload(marker)})
        at_once.xtrim(STREAM, maxlen=1, approximate=False)
        at_once.execute()
        streams = gateway.app.parts.streams
        assert streams is not None
        await until(lambda: streams.gaps, 5)
        for client in clients:
            assert [m for m in await received(client) if m == GAP] == [GAP]
        add(backend, "next")
        await settle(gateway)
        assert streams.gaps == 1


def has_read(gateway: Running, entry_id: str) -> bool:
    assert gateway.app.parts.streams is not None
    return gateway.app.parts.streams.cursors[STREAM] == entry_id


async def test_connection_dropped_by_redis_is_not_a_gap(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        async with admitted(gateway.staff_url("waiter")) as waiter:
            for n in range(0, 9, 3):
                add(backend, n)
                await settle(gateway)
                away = cut_off(backend)
                away.xadd(STREAM, {"data": payload(n + 1)})
                away.xadd(STREAM, {"data": payload(n + 2)})
                [*_, last] = away.execute()
                # It may be back too soon to be seen disconnected.
                await until(partial(has_read, gateway, last.decode()))
                await until(lambda: gateway.app.ready)
            await settle(gateway)
            assert [m["entity"]["marker"] for m in await received(waiter)] == list(range(9))
        assert (await metrics(gateway.port))["stream_gaps_total"] == 0


# Invalid entries


async def test_invalid_entry_is_counted_logged_with_its_id_and_skipped(
    backend: "redis.Redis", redis_url: str
) -> None:
    poison: dict[str, list[Any]] = {
        "not_json": [{"data": "{"}, {"data": b"\x00\x01"}],
        "no_data": [{"payload": payload()}, {"Data": "x"}],
        "not_object": [{"data": "[1,2]"}, {"data": '"text"'}],
        "not_utf8": [{"data": b'{"type":"\xff"}'}],
        "too_big": [{"data": b"x" * 10_000_000}],
        "tenant_id": [{"data": payload(tenant_id=True)}],
    }
    with capture_logs() as logs:
        async with running(make_settings(redis_url)) as gateway:
            async with admitted(gateway.staff_url("waiter")) as waiter:
                entries: dict[str, list[str]] = {}
                for n, (reason, fields) in enumerate(poison.items()):
                    entries[reason] = []
                    for each in fields:
                        entry: Any = backend.xadd(STREAM, each)
                        entries[reason].append(entry.decode())
                    watch = Stopwatch()
                    add(backend, n)
                    assert markers([await receive_event(waiter)]) == [n]
                    assert watch.net < 0.5
                last: Any = backend.xadd(STREAM, {"data": "poison"})
                await settle(gateway)
            invalid = (await metrics(gateway.port)).by_label("events_invalid_total")
            expected = {reason: len(ids) for reason, ids in entries.items()}
            assert invalid == expected | {"not_json": 3}
            # The position of an invalid entry is a valid position.
            at_the_end = f"{last.decode()}-{TAG}"
            assert await recover(gateway.staff_url("waiter"), at_the_end) == []
        async with running(
            make_settings(redis_url)
        ) as again:  # the same when the history is loaded
            assert await recover(again.staff_url("waiter"), f"0-0-{TAG}") == list(range(6))
    for reason, ids in entries.items():
        lines = [
            line for line in logs
            if line["event"] == "invalid event" and line["reason"] == reason
        ]  # fmt: skip
        assert lines[0]["entry_id"] == ids[0]  # and one line a second
    assert "xxxxx" not in repr(logs)


# Catch-up over HTTP


def staff(*roles: str, **claims: Any) -> str:
    return make_jwt(JWT_SECRET, **{"roles": list(roles)} | claims)


async def catch_up(gateway: Running, token: str | None, **query: object) -> Any:
    """The markers that staff get, or the status if it is not 200."""
    text = "&".join(f"{name}={value}" for name, value in query.items())
    reply = await http(gateway.port, f"/ws/catchup?{text}" + (f"&token={token}" if token else ""))
    if reply.status != 200:
        return reply.status
    assert reply.json["count"] == len(reply.json["events"])
    assert all(list(event)[-1] == "event_id" for event in reply.json["events"])
    return markers(reply.json["events"])


async def catch_up_session(gateway: Running, token: str | None, **query: object) -> Any:
    text = "&".join(f"{name}={value}" for name, value in query.items())
    path = f"/ws/catchup/session?{text}" + (f"&table_token={token}" if token else "")
    reply = await http(gateway.port, path)
    return markers(reply.json["events"]) if reply.status == 200 else reply.status


def publish_samples(backend: "redis.Redis") -> None:
    add(backend, "round", session_id=456)
    add(backend, "submitted", type="ROUND_SUBMITTED", session_id=456)
    add(backend, "entity", type="ENTITY_UPDATED")
    add(backend, "sector 5", type="SERVICE_CALL_CREATED", sector_id=5)
    add(backend, "sector 6", type="SERVICE_CALL_CREATED", sector_id=6)
    add(backend, "ticket", type="TICKET_READY")
    add(backend, "menu", type="PRODUCT_AVAILABILITY_CHANGED")
    add(backend, "tenant", type="ENTITY_DELETED", branch_id=0)
    add(backend, "other session", session_id=457)
    add(backend, "other branch", branch_id=2, session_id=456)
    add(backend, "other tenant", tenant_id=2, session_id=456)
    add(backend, "cart", type="CART_SYNC", session_id=456)


async def test_staff_catch_up_with_the_events_of_their_endpoints(
    backend: "redis.Redis", redis_url: str
) -> None:
    kitchen = ["round", "ticket", "menu", "other session"]
    waiter = ["round", "submitted", "ticket", "menu", "other session"]
    everything = [
        "round", "submitted", "entity", "sector 5", "sector 6", "ticket", "menu", "tenant",
        "other session",
    ]  # fmt: skip
    async with running(make_settings(redis_url)) as gateway:
        publish_samples(backend)
        await settle(gateway)
        for token, expected in [
            (staff("WAITER"), waiter),
            (staff("WAITER", sector_ids=[5]), [*waiter[:2], "sector 5", *waiter[2:]]),
            (staff("KITCHEN"), kitchen),
            (staff("WAITER", "KITCHEN"), waiter),
            (staff("ADMIN"), everything),
            (staff("MANAGER", branch_ids=[1, 2]), everything),
            (staff("WAITER", tenant_id=3), []),
        ]:
            assert await catch_up(gateway, token, branch_id=1, since=0) == expected
        both = staff("WAITER", branch_ids=[1, 2])
        assert await catch_up(gateway, both, branch_id=2, since=0) == ["other branch"]


async def test_diners_catch_up_with_the_events_of_their_session_and_of_all_diners(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        publish_samples(backend)
        await settle(gateway)
        mine = make_table_token(TABLE_SECRET)
        other = make_table_token(TABLE_SECRET, session_id=457)
        assert await catch_up_session(gateway, mine, session_id=456, since=0) == [
            "round", "submitted", "menu", "other branch",
        ]  # fmt: skip
        assert await catch_up_session(gateway, other, session_id=457, since=0) == [
            "menu", "other session",
        ]  # fmt: skip


async def test_since_is_a_time_or_an_event_id(backend: "redis.Redis", redis_url: str) -> None:
    async with running(make_settings(redis_url)) as gateway:
        ids = []
        for n in range(4):
            ids.append(add(backend, n))
            time.sleep(0.003)
        await settle(gateway)
        token = staff("WAITER")
        for n, event_id in enumerate(ids):
            found = await catch_up(gateway, token, branch_id=1, since=event_id)
            assert found == list(range(n + 1, 4))
            moment = int(event_id.split("-")[0]) / 1000 + 0.0001
            found = await catch_up(gateway, token, branch_id=1, since=moment)
            assert found == list(range(n, 4))
        for early in (-1, 0, "1e3", "-1e300"):
            found = await catch_up(gateway, token, branch_id=1, since=early)
            assert found == [0, 1, 2, 3]
        for late in (time.time() + 60, time.time() + 3600):
            assert await catch_up(gateway, token, branch_id=1, since=late) == []


async def test_incomplete_catch_up_is_marked(backend: "redis.Redis", redis_url: str) -> None:
    settings = make_settings(redis_url, ws_history_events=2, ws_resume_from_stream=0)
    async with running(settings) as gateway:
        ids = [add(backend, n) for n in range(4)]
        await settle(gateway)
        for since, complete in (
            (0, False),
            (ids[0], False),
            (ids[1], True),
            (time.time() + 9, True),
        ):
            path = f"/ws/catchup?branch_id=1&since={since}&token={staff('WAITER')}"
            async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
                head = f"GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
                await stream.send_all(head.encode())
                reply = b"".join([chunk async for chunk in stream]).lower()
            assert (b"gateway-complete: false" not in reply) is complete


BAD_TOKENS = [
    None, "", "nonsense", make_jwt("another secret that is long enough!!"),
    make_jwt(JWT_SECRET, life=-1), make_table_token(TABLE_SECRET),
]  # fmt: skip


@pytest.mark.parametrize("query", [{"branch_id": 1, "since": 0}, {"branch_id": "x"}, {}])
async def test_401_takes_precedence_over_other_errors(
    backend: "redis.Redis", redis_url: str, query: dict[str, object]
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        for token in BAD_TOKENS:
            assert await catch_up(gateway, token, **query) == 401
        session = {"session_id" if k == "branch_id" else k: v for k, v in query.items()}
        for token in (*BAD_TOKENS[:3], staff("ADMIN"), make_table_token(TABLE_SECRET, life=-1)):
            assert await catch_up_session(gateway, token, **session) == 401


async def test_403_is_for_branches_and_sessions_of_others(
    backend: "redis.Redis", redis_url: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        assert await catch_up(gateway, staff("WAITER"), branch_id=2, since=0) == 403
        assert await catch_up(gateway, staff("COOK"), branch_id=1, since=0) == 403
        assert await catch_up(gateway, staff("ADMIN", branch_ids=[]), branch_id=1, since=0) == 403
        mine = make_table_token(TABLE_SECRET)
        assert await catch_up_session(gateway, mine, session_id=457, since=0) == 403


@pytest.mark.parametrize(
    "branch", ["", "x", "-1", "0", "1.0", "1e0", "%D9%A1", str(2**63), "9" * 99]
)
async def test_422_is_for_an_invalid_branch_or_session(
    backend: "redis.Redis", redis_url: str, branch: str
) -> None:
    async with running(make_settings(redis_url)) as gateway:
        assert await catch_up(gateway, staff("ADMIN"), branch_id=branch, since=0) == 422
        mine = make_table_token(TABLE_SECRET)
        assert await catch_up_session(gateway, mine, session_id=branch, since=0) == 422


async def test_422_is_for_an_invalid_time(backend: "redis.Redis", redis_url: str) -> None:
    mine = make_table_token(TABLE_SECRET)
    async with running(make_settings(redis_url)) as gateway:
        far = [time.time() + 2 * 86_400, time.time() * 1000, int(time.time() * 1000), "1e300"]
        for since in (
            *far,
            "",
            "x",
            "nan",
            "inf",
            "-inf",
            "1e308",
            "1e999",
            "1-1",
            "2026-05-20",
            "%00",
        ):
            assert await catch_up(gateway, staff("ADMIN"), branch_id=1, since=since) == 422, since
            assert await catch_up_session(gateway, mine, session_id=456, since=since) == 422, since
        assert await catch_up(gateway, staff("ADMIN"), branch_id=1) == 422


# Several streams


async def test_each_of_two_streams_is_resumed_by_its_own_ids(
    backend: "redis.Redis", redis_url: str
) -> None:
    """The events of a tenant are all in one of them."""
    settings = make_settings(redis_url, redis_streams=("orders", "payments"))
    async with running(settings) as gateway:
        orders = [add(backend, n, "orders") for n in range(3)]
        payments = [add(backend, 10 + n, "payments", tenant_id=2) for n in range(3)]
        await settle(gateway)
        one, two = gateway.staff_url("waiter"), gateway.staff_url("waiter", tenant_id=2)
        assert await recover(one, orders[0]) == [1, 2]
        assert await recover(two, payments[1]) == [12]
        async with resumed(one, "") as (_, answer):
            pass
        add(backend, 3, "orders")
        await settle(gateway)
        assert await recover(one, answer["last_event_id"]) == [3]
        token = staff("WAITER", tenant_id=2)
        assert await catch_up(gateway, token, branch_id=1, since=0) == [10, 11, 12]
    async with running(settings) as gateway:
        assert await recover(gateway.staff_url("waiter"), orders[0]) == [1, 2, 3]
        two = gateway.staff_url("waiter", tenant_id=2)
        assert await recover(two, payments[0]) == [11, 12]


async def test_gap_in_one_stream_leaves_the_ids_of_the_other_valid(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, redis_streams=("orders", "payments"))
    async with running(settings) as gateway:
        orders = [add(backend, n, "orders") for n in range(3)]
        payments = [add(backend, 10 + n, "payments") for n in range(3)]
        await settle(gateway)
        away = cut_off(backend)
        away.xadd("payments", {"data": payload("lost")})
        away.xtrim("payments", maxlen=0, approximate=False)
        away.execute()
        streams = gateway.app.parts.streams
        assert streams is not None
        await until(lambda: streams.gaps)
        await until(lambda: gateway.app.ready)
        url = gateway.staff_url("waiter")
        assert await recover(url, payments[2]) is None
        assert await recover(url, orders[0]) == [1, 2]
