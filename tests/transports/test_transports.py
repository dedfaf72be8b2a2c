"""The contract holds on every transport."""

import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any, Final, cast

import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    Transport,
    admitted,
    closed,
    connect,
    http,
    make_settings,
    received_texts,
    running,
    serving,
    settle,
    until,
)
from tests.support.sockets import (
    BINARY,
    CONTINUATION,
    PONG_TEXT,
    client_frame,
    close_payload,
    dialled,
    make_head,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT
from trio_gateway.testing import make_jwt, make_payload, make_table_token
from trio_gateway.transports.asgi import AsgiSocket

ORIGIN: Final = "http://localhost:5176"
NO_REDIS: Final = "redis://127.0.0.1:1"
STAFF: Final = ("waiter", "kitchen", "admin")


def staff(**claims: Any) -> str:
    return make_jwt(JWT_SECRET, **claims)


def table(**claims: Any) -> str:
    return make_table_token(TABLE_SECRET, **claims)


async def refusal(url: str, origin: str | None = None, **kwargs: Any) -> tuple[int, str]:
    """Close code and reason of a client whose upgrade was accepted first."""
    headers = [*kwargs.pop("extra_headers", []), *([("Origin", origin)] if origin else [])]
    async with connect(url, extra_headers=headers, **kwargs) as client:
        return await closed(client)


async def is_admitted(url: str, origin: str | None = None) -> bool:
    async with connect(url, extra_headers=[("Origin", origin)] if origin else None) as client:
        await client.send_message("ping")
        with trio.fail_after(3):
            return bool(await client.get_message() == PONG_TEXT)


# Credentials


STAFF_TOKENS: Final = {
    "none": ("", Close.AUTH_FAILED),
    "no token at all": ("abc", Close.AUTH_FAILED),
    "another secret": (make_jwt("x" * 64), Close.AUTH_FAILED),
    "alg none": (staff().split(".")[0] + ".e30.", Close.AUTH_FAILED),
    "another algorithm": (staff(algorithm="HS512"), Close.AUTH_FAILED),
    "expired": (staff(life=-10), Close.AUTH_FAILED),
    "no end": (staff(exp=...), Close.AUTH_FAILED),
    "a refresh token": (staff(type="refresh"), Close.AUTH_FAILED),
    "roles as a string": (staff(roles="WAITER"), Close.AUTH_FAILED),
    "branches null": (staff(branch_ids=None), Close.AUTH_FAILED),
    "tenant as a string": (staff(tenant_id="1"), Close.AUTH_FAILED),
    "a table token": (table(), Close.AUTH_FAILED),
    "no branch": (staff(branch_ids=[]), Close.FORBIDDEN),
    "no role": (staff(roles=[]), Close.FORBIDDEN),
    "an unknown role": (staff(roles=["CHEF"]), Close.FORBIDDEN),
}
TABLE_TOKENS: Final = {
    "none": ("", Close.AUTH_FAILED),
    "no token at all": ("1:2:3:4:5:6", Close.AUTH_FAILED),
    "a staff token": (staff(), Close.AUTH_FAILED),
    "a staff token with the table's secret": (make_jwt(TABLE_SECRET), Close.AUTH_FAILED),
    "expired": (table(life=-10), Close.AUTH_FAILED),
    "too long a life": (table(life=4 * 3600), Close.AUTH_FAILED),
    "session as a string": (table(session_id="456"), Close.AUTH_FAILED),
}


async def test_invalid_credential_is_refused_with_its_code(
    redis_url: str, transport: Transport
) -> None:
    async with serving(redis_url, transport) as gateway:
        for name, (token, code) in STAFF_TOKENS.items():
            found, reason = await refusal(f"{gateway.url}/ws/waiter?token={token}")
            assert (name, found) == (name, code)
            assert reason
            assert not token or token not in reason
        for name, (token, code) in TABLE_TOKENS.items():
            found, reason = await refusal(f"{gateway.url}/ws/diner?table_token={token}")
            assert (name, found) == (name, code)
        refused = len(STAFF_TOKENS) + len(TABLE_TOKENS)
        assert (
            gateway.app.parts.counts.rejected.total()
            == gateway.app.parts.hub.closed.total()
            == refused
        )
        assert len(gateway.app.parts.hub) == 0


@pytest.mark.parametrize("role", ["WAITER", "KITCHEN", "MANAGER", "ADMIN"])
async def test_role_is_admitted_where_the_contract_says(
    redis_url: str, transport: Transport, role: str
) -> None:
    everywhere = role in {"MANAGER", "ADMIN"}
    async with serving(redis_url, transport) as gateway:
        for endpoint in STAFF:
            url = gateway.staff_url(endpoint, roles=[role])
            if everywhere or endpoint == role.lower():
                assert await is_admitted(url)
            else:
                assert (await refusal(url))[0] == Close.FORBIDDEN


async def test_token_may_be_sent_outside_the_url(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        for path, token in (("/ws/waiter", staff()), ("/ws/diner", table())):
            url = gateway.url + path
            headers = [("Authorization", f"Bearer {token}")]
            async with admitted(url, extra_headers=headers) as client:
                assert client.subprotocol is None
            offered = ["gateway.v1", f"bearer.{token}"]
            async with admitted(url, subprotocols=offered) as client:
                assert client.subprotocol == "gateway.v1"
            assert (await refusal(url, subprotocols=["gateway.v1", "bearer.x"]))[0] == 4001
            assert (await refusal(url, extra_headers=[("Authorization", "Bearer x")]))[0] == 4001


async def test_ticket_is_valid_once(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        for path, token in (("/ws/waiter", staff()), ("/ws/diner", table())):
            headers = {"Authorization": f"Bearer {token}"}
            reply = await http(gateway.port, "/ws/ticket", method="POST", headers=headers)
            assert (reply.status, reply.json["expires_in"]) == (200, 30)
            url = f"{gateway.url}{path}?ticket={reply.json['ticket']}"

            assert await is_admitted(url)
            assert await refusal(url) == (Close.AUTH_FAILED, "ticket invalid")
        assert (await refusal(f"{gateway.url}/ws/waiter?ticket="))[0] == Close.AUTH_FAILED


async def test_revoked_token_is_refused(redis_url: str, transport: Transport) -> None:
    with redis.Redis.from_url(redis_url) as backend:
        backend.set("auth:token:blacklist:gone", "1", ex=60)
    async with serving(redis_url, transport) as gateway:
        url = gateway.staff_url("waiter", jti="gone")
        assert await refusal(url) == (Close.AUTH_FAILED, "token revoked")


async def test_without_redis_no_token_is_called_invalid(transport: Transport) -> None:
    made = make_settings(NO_REDIS)
    async with running(made, transport=transport, wait_ready=False) as gateway:
        assert (await refusal(gateway.staff_url("waiter")))[0] == Close.SERVER_OVERLOADED


async def test_expired_credential_closes_the_connection(
    redis_url: str, transport: Transport
) -> None:
    async with (
        serving(redis_url, transport) as gateway,
        admitted(gateway.staff_url("waiter", exp=int(time.time()) + 2)) as client,
    ):
        assert await closed(client) == (Close.AUTH_FAILED, "token expired")


# Origins


@pytest.mark.parametrize(
    ("origin", "development", "production"),
    [
        (ORIGIN, None, None),
        (ORIGIN.upper(), None, None),
        (None, None, Close.POLICY_VIOLATION),
        ("http://localhost:5175", Close.POLICY_VIOLATION, Close.POLICY_VIOLATION),
        ("https://localhost:5176", Close.POLICY_VIOLATION, Close.POLICY_VIOLATION),
        ("http://localhost", Close.POLICY_VIOLATION, Close.POLICY_VIOLATION),
        ("http://evil.example", Close.POLICY_VIOLATION, Close.POLICY_VIOLATION),
        ("null", Close.FORBIDDEN, Close.FORBIDDEN),
        ("localhost:5176", Close.FORBIDDEN, Close.FORBIDDEN),
        (ORIGIN + "/", Close.FORBIDDEN, Close.FORBIDDEN),
        (ORIGIN + ".evil.example", Close.FORBIDDEN, Close.FORBIDDEN),
        (f"{ORIGIN} {ORIGIN}", Close.FORBIDDEN, Close.FORBIDDEN),
    ],
)
async def test_origin_is_checked_for_staff_only(
    redis_url: str,
    transport: Transport,
    origin: str | None,
    development: int | None,
    production: int | None,
) -> None:
    for environment, code in (("development", development), ("production", production)):
        async with serving(redis_url, transport, environment=environment) as gateway:
            for endpoint in STAFF:
                url = gateway.staff_url(endpoint)
                if code is None:
                    assert await is_admitted(url, origin)
                else:
                    assert (await refusal(url, origin))[0] == code
            assert await is_admitted(gateway.diner_url(), origin)


@pytest.mark.parametrize(
    ("listed", "sent"),
    [
        ("https://app.example:443", "https://app.example"),
        ("http://app.example", "HTTP://App.Example:80"),
        ("http://[::1]:5176", "http://[0:0::1]:5176"),
        ("https://café.example", "https://xn--caf-dma.example"),
    ],
)
async def test_origins_are_compared_as_origins(
    redis_url: str, transport: Transport, listed: str, sent: str
) -> None:
    async with serving(redis_url, transport, allowed_origins=(listed,)) as gateway:
        assert await is_admitted(gateway.staff_url("waiter"), sent)
        code, _ = await refusal(gateway.staff_url("waiter"), sent.replace("://", "://x."))
        assert code in {Close.POLICY_VIOLATION, Close.FORBIDDEN}  # x.[::1] is not an origin


async def test_origin_is_checked_before_the_token(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        code, _ = await refusal(f"{gateway.url}/ws/waiter?token=x", "http://evil.example")
        assert code == Close.POLICY_VIOLATION


# Messages of clients


@pytest.mark.parametrize(
    "ping",
    [
        "ping",
        '{"type":"ping"}',
        '{ "type" : "ping" }',
        '\n{"ts":1,\n"type":"ping","data":{"type":"x"}}\n',
        '{"type":"\\u0070ing"}',
    ],
)
async def test_ping_is_answered_in_all_its_forms(
    redis_url: str, transport: Transport, ping: str
) -> None:
    async with serving(redis_url, transport) as gateway:
        for url in (gateway.staff_url("kitchen"), gateway.diner_url()):
            async with connect(url) as client:
                await client.send_message(ping)
                with trio.fail_after(3):
                    assert await client.get_message() == PONG_TEXT


async def test_intervals_are_answered_with_the_values_in_force(
    redis_url: str, transport: Transport
) -> None:
    intervals = {
        "ws_heartbeat_timeout": 7,
        "ws_receive_timeout": 8.5,
        "ws_ping_interval": 2,
    }
    async with (
        serving(redis_url, transport, **intervals) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        await client.send_message('{"type":"intervals"}')
        assert [json.loads(text) for text in await received_texts(client)] == [
            {
                "type": "intervals",
                "heartbeat_timeout": 7,
                "receive_timeout": 8.5,
                "ping_interval": 2,
            }
        ]


async def test_other_text_is_ignored_and_counted(redis_url: str, transport: Transport) -> None:
    junk = ["", "hello", "PING", "pong", "{", "[]", "null", "{}", '{"type":1}', '{"typ":"ping"}']
    async with (
        serving(redis_url, transport) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        for text in junk:
            await client.send_message(text)
        assert await received_texts(client) == []
        (connection,) = gateway.app.parts.hub.connections
        assert connection.messages == len(junk) + 2  # admitted() and received_texts() ping


async def test_protocol_ping_is_answered(redis_url: str, transport: Transport) -> None:
    async with (
        serving(redis_url, transport) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        with trio.fail_after(3):
            await client.ping(b"there?")


async def test_silent_client_is_closed_when_stale(redis_url: str, transport: Transport) -> None:
    async with (
        serving(redis_url, transport, ws_heartbeat_timeout=0.3) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        watch = Stopwatch()
        assert await closed(client) == (Close.HEARTBEAT_TIMEOUT, "no heartbeat")
        assert watch.elapsed > 0.2
        assert watch.net < 1


async def test_one_message_over_the_rate_limit_is_4029(
    redis_url: str, transport: Transport
) -> None:
    async with (
        serving(redis_url, transport, ws_message_rate_window=30) as gateway,
        connect(gateway.staff_url("waiter")) as client,
    ):
        for _ in range(20):
            await client.send_message("ping")
        for _ in range(20):
            assert await client.get_message() == PONG_TEXT
        await client.send_message("anything")
        assert await closed(client) == (Close.RATE_LIMITED, "too many messages")


async def test_binary_is_1003(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        for data in (b"\0\xff", b"ping", b""):
            async with admitted(gateway.staff_url("waiter")) as client:
                await client.send_message(data)
                assert (await closed(client))[0] == Close.UNSUPPORTED_DATA


async def test_size_of_a_message_is_counted_in_bytes(redis_url: str, transport: Transport) -> None:
    longest = '{"type":"ping","x":"' + "€" * 21_838 + '"}'
    async with (
        serving(redis_url, transport) as gateway,
        connect(gateway.staff_url("waiter")) as client,
    ):
        await client.send_message(longest)
        await client.send_message("x" * 65_536)
        assert await client.get_message() == PONG_TEXT
        assert await received_texts(client) == []
        await client.send_message("€" * 21_846)
        assert (await closed(client))[0] == Close.MESSAGE_TOO_BIG


async def test_message_with_too_many_characters_is_1009(
    redis_url: str, transport: Transport
) -> None:
    """On the ASGI transport Hypercorn closes the connection, without a reason."""
    async with (
        serving(redis_url, transport) as gateway,
        connect(gateway.staff_url("waiter")) as client,
    ):
        await client.send_message("x" * 65_537)
        code, reason = await closed(client)
        assert code == Close.MESSAGE_TOO_BIG
        assert reason == ("message is over 65536 bytes" if transport == "direct" else "")


async def test_fragments_with_control_frames_between_are_one_message(
    redis_url: str, transport: Transport
) -> None:
    async with serving(redis_url, transport) as gateway, dialled(gateway.port) as client:
        await client.upgrade(f"/ws/waiter?token={staff()}")
        await client.send(client_frame(TEXT, '{"type":', fin=False))
        await client.send(client_frame(PING, b"between"))
        await client.send(client_frame(CONTINUATION, '"ping"}'))

        frames = [frame async for frame in some_frames(client)]
        assert (PONG, b"between") in frames
        assert frames[-1] == (TEXT, PONG_TEXT.encode())


async def some_frames(client: Any) -> AsyncIterator[tuple[int, bytes]]:
    """The frames up to the first text. Hypercorn sends a ping at once."""
    with trio.fail_after(3):
        while True:
            frame = await client.frame()
            yield frame
            if frame[0] == TEXT:
                return


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (client_frame(TEXT, b"\xff"), Close.INVALID_DATA),
        (client_frame(TEXT, "ping", masked=False), Close.PROTOCOL_ERROR),
        (client_frame(0x3, "x"), Close.PROTOCOL_ERROR),
    ],
    ids=["not UTF-8", "unmasked", "reserved opcode"],
)
async def test_invalid_frame_is_closed_with_its_code(
    redis_url: str, transport: Transport, data: bytes, code: Close
) -> None:
    """On the ASGI transport Hypercorn closes TCP without a code, and the app does not see it."""
    async with serving(redis_url, transport) as gateway, dialled(gateway.port) as client:
        await client.upgrade(f"/ws/waiter?token={staff()}")
        await until(lambda: len(gateway.app.parts.hub))
        await client.send(data)
        with trio.fail_after(3):
            if transport == "direct":
                assert (await client.closed())[0] == code
            else:
                with pytest.raises(EOFError):
                    await client.closed()
        await client.leave()
        counted = code if transport == "direct" else Close.ABNORMAL
        await until(lambda: gateway.app.parts.hub.closed == {counted: 1})


async def test_clients_own_code_is_answered_and_counted(
    redis_url: str, transport: Transport
) -> None:
    """Hypercorn does not pass it on: over ASGI every disconnect counts as 1006."""
    async with serving(redis_url, transport) as gateway:
        async with dialled(gateway.port) as client:
            await client.upgrade(f"/ws/waiter?token={staff()}")
            await until(lambda: len(gateway.app.parts.hub))
            await client.send(client_frame(CLOSE, close_payload(3999, "lunch")))
            with trio.fail_after(3):
                assert await client.closed() == (3999, "lunch")
        counted = 3999 if transport == "direct" else int(Close.ABNORMAL)
        await until(lambda: gateway.app.parts.hub.closed == {counted: 1})
        assert len(gateway.app.parts.hub) == 0


async def test_client_that_vanishes_counts_as_1006(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        async with dialled(gateway.port) as client:
            await client.upgrade(f"/ws/waiter?token={staff()}")
            await until(lambda: len(gateway.app.parts.hub))
        await until(lambda: gateway.app.parts.hub.closed == {Close.ABNORMAL: 1})
        assert len(gateway.app.parts.hub) == 0


async def test_client_that_disconnects_during_a_flood_leaks_nothing(
    redis_url: str, transport: Transport
) -> None:
    """Quart's inbound channel holds ten messages. If left full, it and two tasks would leak."""
    async with serving(redis_url, transport, ws_message_rate_limit=5) as gateway:
        assert await is_admitted(gateway.staff_url("waiter"))  # the shared objects exist now
        await until(lambda: not gateway.app.parts.hub.leaving)
        await trio.sleep(0.1)
        before = trio.lowlevel.current_statistics().tasks_living
        for _ in range(5):
            async with dialled(gateway.port) as client:
                await client.upgrade(f"/ws/waiter?token={staff()}")
                await client.send(client_frame(TEXT, "ping") * 100)
                with trio.fail_after(3):
                    assert (await client.closed())[0] == Close.RATE_LIMITED
        await until(lambda: trio.lowlevel.current_statistics().tasks_living <= before)


# Renewal


async def renew(client: WebSocketConnection, token: Any) -> None:
    await client.send_message(json.dumps({"type": "auth", "token": token}))


async def test_credential_is_renewed_in_place(redis_url: str, transport: Transport) -> None:
    expires_at = int(time.time()) + 5000
    async with serving(redis_url, transport) as gateway:
        for url, token in (
            (gateway.staff_url("waiter"), staff(exp=expires_at)),
            (gateway.diner_url(), table(exp=expires_at)),
        ):
            async with admitted(url) as client:
                await renew(client, token)
                answer = f'{{"type":"auth_ok","expires_at":{expires_at}}}'
                assert await received_texts(client) == [answer]


@pytest.mark.parametrize(
    ("token", "code"),
    [
        (staff(life=-10), Close.AUTH_FAILED),
        ("x", Close.AUTH_FAILED),
        (None, Close.AUTH_FAILED),
        (12, Close.AUTH_FAILED),
        (table(), Close.AUTH_FAILED),
        (staff(sub="22"), Close.FORBIDDEN),
        (staff(tenant_id=2), Close.FORBIDDEN),
        (staff(roles=["KITCHEN"]), Close.FORBIDDEN),
        (staff(branch_ids=[]), Close.FORBIDDEN),
    ],
)
async def test_failed_renewal_closes_the_connection(
    redis_url: str, transport: Transport, token: Any, code: Close
) -> None:
    async with (
        serving(redis_url, transport) as gateway,
        admitted(gateway.staff_url("waiter")) as client,
    ):
        await renew(client, token)
        assert (await closed(client))[0] == code


async def test_diner_cannot_renew_with_another_session(
    redis_url: str, transport: Transport
) -> None:
    async with serving(redis_url, transport) as gateway, admitted(gateway.diner_url()) as client:
        await renew(client, table(session_id=457))
        assert (await closed(client))[0] == Close.FORBIDDEN


async def test_new_branches_and_roles_apply_at_once(redis_url: str, transport: Transport) -> None:
    with redis.Redis.from_url(redis_url) as backend:
        async with (
            serving(redis_url, transport) as gateway,
            admitted(gateway.staff_url("waiter")) as client,
        ):
            await renew(client, staff(roles=["MANAGER"], branch_ids=[2]))
            assert '"auth_ok"' in (await received_texts(client))[0]
            counts = []
            for branch in (1, 2):
                payload = make_payload("ENTITY_CREATED", branch_id=branch)
                backend.publish(f"channel:branch:{branch}:admin", payload)
                await settle(gateway)
                counts.append(len(await received_texts(client)))
            assert counts == [0, 1]


async def test_sectors_are_refreshed_in_both_forms(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        async with admitted(gateway.staff_url("waiter", sector_ids=[6, 5])) as client:
            await client.send_message("refresh_sectors")
            await client.send_message('{"type": "refresh_sectors"}')
            assert await received_texts(client) == [
                "sectors_updated:5,6",
                '{"type":"sectors_updated","sector_ids":[5,6]}',
            ]
        for url in (gateway.staff_url("kitchen", sector_ids=[5]), gateway.diner_url()):
            async with admitted(url) as client:
                await client.send_message("refresh_sectors")
                assert await received_texts(client) == []


# Limits


@pytest.mark.parametrize("limit", ["user", "session", "total"])
async def test_connection_over_a_limit_is_1013(
    redis_url: str, transport: Transport, limit: str
) -> None:
    name = f"ws_max_{limit}_connections" if limit == "total" else f"ws_max_connections_per_{limit}"
    async with serving(redis_url, transport, **{name: 2}) as gateway, AsyncExitStack() as stack:
        url, other = gateway.staff_url("waiter"), gateway.staff_url("waiter", tenant_id=2)
        if limit == "session":
            url, other = gateway.diner_url(), gateway.diner_url(session_id=457)
        first = await stack.enter_async_context(admitted(url))
        await stack.enter_async_context(admitted(url))

        code, reason = await refusal(url)
        assert (code, bool(reason)) == (Close.SERVER_OVERLOADED, True)
        assert gateway.app.parts.counts.rejected == {f"{limit}_limit": 1}
        if limit == "total":
            assert (await refusal(other))[0] == Close.SERVER_OVERLOADED
        else:
            assert await is_admitted(other)
        await first.aclose()
        await until(lambda: len(gateway.app.parts.hub) == 1)
        assert await is_admitted(url)


# Events


async def test_event_reaches_its_audiences_byte_for_byte(
    redis_url: str, transport: Transport
) -> None:
    payloads = [
        make_payload("TABLE_CLEARED", session_id=456, n=1),
        b'{ "type":"TABLE_CLEARED","tenant_id":1,"branch_id":1,"session_id":456, "x":1.50,"y":1e3}',
        '{"tenant_id":1,"branch_id":1,"session_id":456,"z":"\\u00f1ñ","type":"CHECK_PAID"}'.encode(),
        make_payload("TABLE_CLEARED", session_id=456, n=2, data="x" * 60_000),
    ]
    with redis.Redis.from_url(redis_url) as backend:
        async with serving(redis_url, transport) as gateway, AsyncExitStack() as stack:
            urls = {
                "waiter": gateway.staff_url("waiter"),
                "admin": gateway.staff_url("admin"),
                "diner": gateway.diner_url(),
                "kitchen": gateway.staff_url("kitchen"),
                "other session": gateway.diner_url(session_id=457),
                "other branch": gateway.staff_url("waiter", branch_ids=[2]),
                "other tenant": gateway.staff_url("admin", tenant_id=2),
            }
            clients = {
                name: await stack.enter_async_context(admitted(url)) for name, url in urls.items()
            }
            for payload in payloads:
                backend.publish("channel:branch:1:waiters", payload)
            await settle(gateway)

            for name, client in clients.items():
                is_recipient = name in {"waiter", "admin", "diner"}
                expected = [payload.decode() for payload in payloads] if is_recipient else []
                assert await received_texts(client) == expected


async def test_drain_sends_every_client_a_retry_hint(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        urls = [gateway.staff_url("waiter"), gateway.staff_url("kitchen"), gateway.diner_url()]
        async with AsyncExitStack() as stack:
            clients = [await stack.enter_async_context(admitted(url)) for url in urls]
            gateway.stop.set()
            stopped = Stopwatch()
            for client in clients:
                code, reason = await closed(client)
                assert code == Close.GOING_AWAY
                assert reason.startswith("retry in ")
            assert stopped.net < 0.5


async def test_upgrade_while_draining_is_503(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway:
        await gateway.app.drain()
        async with dialled(gateway.port) as client:
            await client.send(make_head(request=f"GET /ws/waiter?token={staff()} HTTP/1.1"))
            assert (await client.response())[0] == 503
        assert (await http(gateway.port, "/ws/health")).status == 200
        assert (await http(gateway.port, "/ws/health/ready")).status == 503
        assert gateway.app.parts.counts.refused == {503: 1}


async def test_unknown_endpoint_is_404(redis_url: str, transport: Transport) -> None:
    async with serving(redis_url, transport) as gateway, dialled(gateway.port) as client:
        await client.send(make_head(request="GET /ws/cook HTTP/1.1"))
        assert (await client.response())[0] == 404


async def test_asgi_transport_sends_nothing_to_an_aborted_client() -> None:
    """ASGI cannot abort, and a server that is asked to send 1006 would send 1000."""
    codes: list[int] = []

    class Websocket:
        async def close(self, code: int, _reason: str) -> None:
            codes.append(code)

    socket = AsgiSocket(cast("Any", Websocket()), 1)
    await socket.close(Close.ABNORMAL, "")
    await socket.close(Close.GOING_AWAY, "")
    assert codes == [Close.GOING_AWAY]
    assert socket.try_write(b"its own writer sends") == 0
    socket.abort()
    with pytest.raises(BrokenPipeError):
        socket.try_write(b"gone")


async def test_no_token_is_logged(
    redis_url: str, transport: Transport, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = staff(), staff(sub="22", life=-10)
    async with serving(redis_url, transport) as gateway:
        assert await is_admitted(f"{gateway.url}/ws/waiter?token={good}")
        assert (await refusal(f"{gateway.url}/ws/waiter?token={bad}"))[0] == Close.AUTH_FAILED
        async with dialled(gateway.port) as client:
            await client.upgrade(f"/ws/waiter?token={good}")
            await client.send(client_frame(BINARY, good.encode()))
            with trio.fail_after(3):
                await client.closed()
    out = "".join(capsys.readouterr())
    assert "rejected" in out
    for token in (good, bad):
        for part in token.split("."):
            assert part not in out
