"""The SSE transport: the rules are those of the other transports."""

import json
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import pytest
import redis
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock, wait_all_tasks_blocked

from tests.support.event_source import Listener, listening
from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Running,
    environment,
    free_port,
    http,
    make_settings,
    metrics,
    process,
    running,
    serving,
    settle,
    until,
    wait,
)
from tests.support.sockets import dialled
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.client_request import ClientRequest
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import text_frame
from trio_gateway.gateway import Gateway, create_app
from trio_gateway.testing import NullAuth, make_jwt, make_payload, make_table_token
from trio_gateway.transports.asgi import TcpControl, with_control
from trio_gateway.transports.sse import EventStream

STREAM: Final = "events:critical"
ORIGIN: Final = "http://localhost:5176"
NO_REDIS: Final = "redis://127.0.0.1:1"
NOBODY: Final = dict.fromkeys(Endpoint, NullAuth())


def staff(endpoint: str = "waiter", more: str = "", **claims: Any) -> str:
    token = make_jwt(JWT_SECRET, **{"roles": [endpoint.upper()]} | claims)
    return f"/ws/{endpoint}/events?token={token}{more}"


def table(more: str = "", **claims: Any) -> str:
    return f"/ws/diner/events?table_token={make_table_token(TABLE_SECRET, **claims)}{more}"


@asynccontextmanager
async def admitted(
    gateway: Running, path: str, headers: dict[str, str] | None = None
) -> AsyncIterator[Listener]:
    """An admitted client, which receives what is published from now on."""
    before = gateway.app.parts.hub.last_number
    async with listening(gateway.port, path, headers) as listener:
        assert listener.status == 200, listener.body
        await until(lambda: gateway.app.parts.hub.last_number > before)
        yield listener


@pytest.fixture
async def gateway(redis_url: str) -> AsyncIterator[Running]:
    async with serving(redis_url, "direct") as found:
        yield found


@pytest.fixture
def backend(redis_url: str) -> "redis.Redis":
    return redis.Redis.from_url(redis_url)


def add(backend: "redis.Redis", n: int, **keys: Any) -> None:
    backend.xadd(STREAM, {"data": make_payload(n=n, **keys)})


# Events


async def test_each_stream_receives_only_its_own_events(
    gateway: Running, backend: "redis.Redis"
) -> None:
    async with (
        admitted(gateway, staff("waiter")) as waiter,
        admitted(gateway, staff("kitchen")) as kitchen,
        admitted(gateway, staff("admin")) as admin,
        admitted(gateway, table()) as diner,
        admitted(gateway, staff("admin", tenant_id=2)) as other_admin,
        admitted(gateway, table(tenant_id=2)) as other_diner,
    ):
        assert waiter.headers["content-type"] == "text/event-stream"
        assert waiter.headers["cache-control"] == "no-store, no-transform"
        assert waiter.headers["x-accel-buffering"] == "no"
        health = (await http(gateway.port, "/ws/health")).json["connections"]
        assert health == {
            "total": 6,
            "by_endpoint": {"waiter": 1, "kitchen": 1, "admin": 2, "diner": 2},
        }

        mine = make_payload("ROUND_READY", session_id=456, name="Ñandú 🙏", n=1)
        backend.publish("branch:1:waiters", mine)
        backend.publish("branch:1:waiters", make_payload("ROUND_SUBMITTED", n=2))
        for tenant in (1, 2):
            end = make_payload("PRODUCT_AVAILABILITY_CHANGED", tenant_id=tenant, n=3)
            backend.publish("branch:1:waiters", end)

        assert (await waiter.next()) == ("message", mine.decode(), "")
        for listener in (kitchen, admin, diner):
            assert (await listener.next()).data == mine.decode()
        for listener in (waiter, admin):
            assert (await listener.next()).json["n"] == 2
        for listener in (waiter, kitchen, admin, diner, other_admin, other_diner):
            assert (await listener.next()).json["n"] == 3
        assert (await metrics(gateway.port)).by_label("connections_by_endpoint")["admin"] == 2


async def test_browser_that_reconnects_gets_each_event_once(
    gateway: Running, backend: "redis.Redis"
) -> None:
    path = staff("kitchen", "&last_event_id=")  # empty: from the present position of the streams
    async with admitted(gateway, path) as kitchen:
        hello = await kitchen.next()
        assert hello.json["type"] == "resumed"
        assert hello.json["recovered"] is True
        assert hello.last_event_id == hello.json["last_event_id"] != ""
        for n in (1, 2):
            add(backend, n)
        first, second = await kitchen.next(), await kitchen.next()
        assert [first.json["n"], second.json["n"]] == [1, 2]
        assert second.last_event_id == second.json["event_id"] != first.last_event_id
        backend.publish("branch:1:kitchen", make_payload(n="not durable"))
        assert (await kitchen.next()).last_event_id == second.last_event_id

    add(backend, 3)
    add(backend, -1, tenant_id=2)
    add(backend, 4)
    await settle(gateway)
    # EventSource repeats the same URL: the header takes precedence over the parameter.
    last = {"Last-Event-ID": kitchen.parser.last_event_id}
    async with admitted(gateway, path, last) as kitchen:
        add(backend, 5)
        answer = await kitchen.next()
        assert (answer.json["recovered"], answer.json["count"]) == (True, 2)
        assert [(await kitchen.next()).json["n"] for _ in range(3)] == [3, 4, 5]

    async with admitted(gateway, path, {"Last-Event-ID": "junk"}) as kitchen:
        assert (await kitchen.next()).json["recovered"] is False


# Admission


TOKEN: Final = make_jwt(JWT_SECRET)


@pytest.mark.parametrize(
    ("path", "headers", "status", "code"),
    [
        ("/ws/waiter/events", {}, 401, 4001),
        ("/ws/waiter/events?token=abc", {}, 401, 4001),
        (staff(life=-10), {}, 401, 4001),
        (staff("waiter", "&ticket=none"), {}, 401, 4001),
        ("/ws/waiter/events", {"Authorization": f"Bearer {TOKEN}"}, 200, None),
        (staff("kitchen", roles=["WAITER"]), {}, 403, 4003),
        (staff(branch_ids=[]), {}, 403, 4003),
        (f"/ws/diner/events?token={TOKEN}", {}, 401, 4001),
        (table(), {}, 200, None),
        (staff(), {"Origin": ORIGIN}, 200, None),
        (staff(), {"Origin": "https://evil.example"}, 403, 1008),
        (staff(), {"Origin": "null"}, 403, 4003),
        (table(), {"Origin": "https://any.example"}, 200, None),
    ],
)
async def test_refusal_is_a_status_that_stops_the_browsers_retries(
    gateway: Running, path: str, headers: dict[str, str], status: int, code: int | None
) -> None:
    async with listening(gateway.port, path, headers) as listener:
        assert listener.status == status
        if "/diner/" in path:
            assert listener.headers["access-control-allow-origin"] == "*"
        else:
            readable = headers.get("Origin") if code not in {1008, 4003} else None
            assert listener.headers.get("access-control-allow-origin") == readable
            assert listener.headers["vary"] == "Origin"
        if code is not None:
            said = json.loads(listener.body)
            assert (said["code"], listener.headers["cache-control"]) == (code, "no-store")
            assert gateway.app.parts.hub.closed == {code: 1}
        assert ("www-authenticate" in listener.headers) is (status == 401)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),  # such a GET has no Origin
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://evil.example"}, 403),
        ({"Origin": "https://app.example"}, 200),
    ],
)
async def test_origin_is_required_in_production(
    redis_url: str, headers: dict[str, str], status: int
) -> None:
    app = create_app(make_settings(NO_REDIS, allowed_origins=["https://app.example"]), auth=NOBODY)
    app.parts.admission._needs_origin = True
    async with in_memory(app, headers) as response:
        assert response.status == status


async def test_preflight_allows_a_page_to_send_its_own_header(gateway: Running) -> None:
    asked = {"Access-Control-Request-Method": "GET", "Origin": ORIGIN}
    async with listening(gateway.port, "/ws/waiter/events", asked, "OPTIONS") as listener:
        assert listener.status == 204
        assert listener.headers["access-control-allow-origin"] == ORIGIN
        assert "Authorization" in listener.headers["access-control-allow-headers"]
        await listener.ask("/ws/waiter/events", {"Origin": "https://evil.example"}, "OPTIONS")
        assert not [name for name in listener.headers if name.startswith("access-control")]
        for method in ("HEAD", "POST"):
            await listener.ask(staff(), {"Content-Length": "0"}, method)
            assert (listener.status, listener.headers["allow"]) == (405, "GET, OPTIONS")


async def test_ticket_opens_one_stream(gateway: Running) -> None:
    bearer = {"Authorization": f"Bearer {TOKEN}"}
    ticket = (await http(gateway.port, "/ws/ticket", method="POST", headers=bearer)).json["ticket"]
    path = f"/ws/waiter/events?ticket={ticket}"
    async with admitted(gateway, path), listening(gateway.port, path) as second:
        assert second.status == 401


async def test_limits_are_those_of_the_other_transports(redis_url: str) -> None:
    limits = {"ws_max_connections_per_user": 1, "ws_max_failed_logins": 1}
    async with serving(redis_url, "direct", **limits) as gateway:
        async with admitted(gateway, staff()), listening(gateway.port, staff()) as second:
            assert (second.status, second.headers["retry-after"]) == (429, "5")
            assert json.loads(second.body)["code"] == 1013
        await until(lambda: not gateway.app.parts.hub.connections)
        async with listening(gateway.port, staff("waiter", life=-1)) as third:
            assert third.status == 401
            await third.ask(staff(), {})
            assert (third.status, third.headers["retry-after"]) == (429, "60")


@pytest.mark.parametrize(
    ("limits", "second", "status"),
    [
        ({"ws_max_connections_per_user": 1}, staff("waiter"), 429),
        ({"ws_max_connections_per_session": 1}, table(), 429),
        ({"ws_max_connections_per_address": 1}, staff("waiter", sub="22"), 429),
        ({"ws_max_total_connections": 1}, staff("waiter", sub="22"), 503),
    ],
    ids=["user", "session", "address", "process"],
)
async def test_limit_of_one_client_is_429_and_a_shared_limit_503(
    redis_url: str, limits: dict[str, int], second: str, status: int
) -> None:
    """Load balancers avoid a server that answers 503 for a while."""
    first = table() if "diner" in second else staff()
    async with (
        serving(redis_url, "direct", **limits) as gateway,
        admitted(gateway, first),
        listening(gateway.port, second) as refused,
    ):
        assert refused.status == status
        assert refused.headers["retry-after"] == {429: "5", 503: "1"}[status]
        assert json.loads(refused.body)["code"] == Close.SERVER_OVERLOADED


async def test_dependency_that_is_down_is_a_server_error() -> None:
    settings = make_settings(NO_REDIS)
    async with (
        running(settings, wait_ready=False) as gateway,
        listening(gateway.port, staff()) as refused,
    ):
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")


# The end of a stream


async def test_disconnected_client_leaves_the_hub_at_once(gateway: Running) -> None:
    with capture_logs() as logs:
        async with admitted(gateway, staff()):
            assert len(gateway.app.parts.hub) == 1
        await until(lambda: not gateway.app.parts.hub.connections)
        await gateway.app.parts.hub.wait_empty()
    (line,) = [line for line in logs if line["event"] == "closed"]
    assert (line["endpoint"], line["tenant"], line["code"]) == ("waiter", 1, Close.ABNORMAL)


async def test_expiry_is_sent_and_the_connection_is_closed(gateway: Running) -> None:
    """On a connection that stays open the client would return to a process that is about to end."""
    async with admitted(gateway, table(life=2)) as diner:
        (connection,) = gateway.app.parts.hub.connections
        connection.renew(trio.current_time())
        assert await diner.close_event() == (Close.AUTH_FAILED, "token expired")
        assert diner.complete
        with trio.fail_after(1):
            assert await diner.stream.receive_some() == b""


async def test_request_with_a_body_is_refused(gateway: Running) -> None:
    async with admitted(gateway, staff(), {"Transfer-Encoding": "chunked"}) as listener:
        await listener.stream.send_all(b"2\r\nhm\r\n")
        assert (await listener.close_event())[0] == Close.UNSUPPORTED_DATA


async def test_stuck_client_delays_no_other_and_is_aborted_after_the_write_timeout() -> None:
    settings = make_settings(NO_REDIS, ws_write_timeout=0.3, ws_outbox_bytes=50_000_000)
    async with (
        running(settings, auth=NOBODY, wait_ready=False) as gateway,
        dialled(gateway.port, receive_buffer=4096) as stuck,
        listening(gateway.port, "/ws/kitchen/events") as other,
    ):
        await stuck.send(b"GET /ws/waiter/events HTTP/1.1\r\nHost: a\r\n\r\n")
        await until(lambda: len(gateway.app.parts.hub) == 2)
        watch = Stopwatch()
        for connection in gateway.app.parts.hub.connections:
            waiter = connection.principal.endpoint is Endpoint.WAITER
            connection.send(b"1" * (8_000_000 if waiter else 10))
        assert (await other.next()).data == "1" * 10
        assert watch.net < 0.3
        with capture_logs() as logs:
            await until(lambda: len(gateway.app.parts.hub) == 1, 3)
            await until(lambda: any(line["event"] == "closed" for line in logs), 3)
        assert gateway.app.parts.hub.closed == {Close.SLOW_CONSUMER: 1}


async def test_drain_closes_streams_at_once_and_aborts_the_stuck_ones() -> None:
    settings = make_settings(NO_REDIS, ws_outbox_bytes=50_000_000)
    async with (
        running(settings, auth=NOBODY, wait_ready=False) as gateway,
        dialled(gateway.port, receive_buffer=4096) as stuck,
        listening(gateway.port, "/ws/kitchen/events") as other,
        dialled(gateway.port) as late,
    ):
        await stuck.send(b"GET /ws/waiter/events HTTP/1.1\r\nHost: a\r\n\r\n")
        await late.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        await late.response()
        await until(lambda: len(gateway.app.parts.hub) == 2)
        gateway.app.parts.drain.patience = 0.5
        for connection in gateway.app.parts.hub.connections:
            if connection.principal.endpoint is Endpoint.WAITER:
                connection.send(b"1" * 8_000_000)
        await wait_all_tasks_blocked()

        watch = Stopwatch()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(gateway.app.drain)
            code, reason = await other.close_event()
            assert watch.net < 0.5
            assert code == Close.GOING_AWAY
            assert other.parser.retry == round(float(reason.split()[2][:-1]) * 1000)
            await late.send(b"GET /ws/kitchen/events HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await late.response())[0] == 503
        with trio.fail_after(1):  # of a write timeout of 10
            await gateway.app.parts.hub.wait_empty()
            assert len(await stuck.rest()) < 8_000_000


async def test_sigterm_with_open_streams_exits_with_0(redis_url: str) -> None:
    port = free_port()
    command = ("trio_gateway", "serve", "--bind", f"127.0.0.1:{port}")
    async with process(*command, env=environment(redis_url), port=port) as started:
        async with listening(port, staff()) as waiter, listening(port, table()) as diner:
            assert (waiter.status, diner.status) == (200, 200)
            os.kill(started.pid, signal.SIGTERM)
            for listener in (waiter, diner):
                assert (await listener.close_event())[0] == Close.GOING_AWAY
        watch = Stopwatch()
        status, _, errors = await wait(started)
        assert (status, watch.net < 3) == (0, True)
        assert b"Traceback" not in errors


# The socket, in virtual time


class Response:
    """The server's side of one ASGI request. The client reads nothing while ``stuck``."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.gone = trio.Event()
        self.moving = trio.Event()
        self.moving.set()

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def body(self) -> bytes:
        return b"".join(message.get("body", b"") for message in self.sent)

    @property
    def complete(self) -> bool:
        return not self.sent[-1].get("more_body", True)

    async def send(self, message: Any) -> None:
        await self.moving.wait()
        self.sent.append(message)

    async def receive(self) -> Any:
        await self.gone.wait()
        return {"type": "http.disconnect"}


@asynccontextmanager
async def in_memory(app: Gateway, headers: dict[str, str] | None = None) -> AsyncIterator[Response]:
    """A client of ``/ws/waiter/events`` that has been admitted or refused."""
    response = Response()
    scope = {
        "type": "http", "http_version": "2", "method": "GET", "path": "/ws/waiter/events",
        "query_string": b"", "client": ("192.0.2.1", 5000),
        "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
    }  # fmt: skip
    async with trio.open_nursery() as nursery:
        nursery.start_soon(app, scope, response.receive, response.send)
        await wait_all_tasks_blocked()
        yield response
        response.gone.set()


def make_app(**changes: Any) -> Gateway:
    return create_app(make_settings(NO_REDIS, **changes), auth=NOBODY)


async def test_silent_client_stays_connected_and_is_sent_comments(
    autojump_clock: MockClock,
) -> None:
    app = make_app()
    async with in_memory(app) as response:
        await trio.sleep(3600)
        (connection,) = app.parts.hub.connections
        connection.ping(trio.current_time())
        await wait_all_tasks_blocked()
        assert response.body == b"retry: 3000\n\n: ping\n\n"
    assert app.parts.hub.closed == {Close.ABNORMAL: 1}


async def test_full_outbox_is_4009_after_the_frame_in_progress(autojump_clock: MockClock) -> None:
    app = make_app(ws_outbox_bytes=100)
    async with in_memory(app) as response:
        (connection,) = app.parts.hub.connections
        response.moving = trio.Event()
        connection.send(b"1" * 60)
        await wait_all_tasks_blocked()  # the writer has begun to send it
        for _ in range(3):
            connection.send(b"2" * 60)
        assert connection.ending
        await trio.sleep(5)
        response.moving.set()
        await app.parts.hub.wait_empty()
        assert response.body.endswith(
            b"data: %b\n\nevent: close\n"
            b'data: {"code":4009,"reason":"too slow: outbox is full"}\n\n' % (b"1" * 60)
        )
        assert response.complete


async def test_stuck_client_is_closed_after_the_write_timeout(
    autojump_clock: MockClock,
) -> None:
    app = make_app()
    async with in_memory(app) as response:
        (connection,) = app.parts.hub.connections
        response.moving = trio.Event()
        connection.send(b"unread")
        await app.parts.hub.wait_empty()
        assert trio.current_time() == 10
        assert not response.complete
    assert app.parts.hub.closed == {Close.SLOW_CONSUMER: 1}


async def test_aborted_stream_resets_the_connection_and_sends_nothing_more() -> None:
    resets: list[bool] = []
    response = Response()
    control = TcpControl(lambda: resets.append(True), lambda: (0, 0), lambda: True, 10.0)
    scope = {"http_version": "1.1", "state": with_control({}, control)}
    stream = EventStream(scope, response.receive, response.send)
    assert stream.has_left()
    stream.abort()
    stream.abort()
    with pytest.raises(BrokenPipeError):
        stream.try_write(text_frame(b"late"))
    await stream.close(Close.GOING_AWAY, "")
    assert (resets[0], response.sent) == (True, [])


PLACE: Final = {"last-event-id": "2-2-abcd"}


@pytest.mark.parametrize("one_way", [True, False])
@pytest.mark.parametrize(
    ("query", "headers", "place"),
    [
        ({}, {}, None),
        ({}, PLACE, "2-2-abcd"),
        ({"last_event_id": ""}, {}, ""),
        ({"last_event_id": "1-1-abcd"}, {}, "1-1-abcd"),
        ({"last_event_id": "1-1-abcd"}, PLACE, "2-2-abcd"),  # the URL of the first attempt
        ({"last_event_id": "1-1-abcd"}, {"last-event-id": ""}, "1-1-abcd"),
        ({"lastEventId": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"last_event_id": "", "lastEventId": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"last_event_id": "1-1-abcd", "lastEventId": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"last_event_id": "1-1-abcd", "Last-Event-Id": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"Last-Event-ID": "3-3-abcd"}, PLACE, "2-2-abcd"),
        ({"evs_last_event_id": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"lastEventID": "3-3-abcd"}, {}, "3-3-abcd"),
        ({"lastEventId": ""}, {}, ""),
        ({"lastEvent": "3-3-abcd", "id": "3-3-abcd"}, {}, None),
    ],
    ids=str,
)
def test_position_is_read_from_header_or_query(
    query: dict[str, str], headers: dict[str, str], place: str | None, one_way: bool
) -> None:
    handshake = ClientRequest(Endpoint.DINER, query, headers, one_way=one_way)
    assert handshake.last_event_id == place
