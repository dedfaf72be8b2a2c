"""Limits by address and by user, floods, and failed logins: other clients are not affected."""

import ssl
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import pytest
import trio
import trustme
from hypercorn.config import Config
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
    running,
    serving,
    until,
)
from tests.support.sockets import CONTINUATION, PONG_TEXT, Client, client_frame, dialled, make_head
from tests.support.stopwatch import Stopwatch
from trio_gateway.access import addresses
from trio_gateway.access.addresses import Addresses, client_address
from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.frames import PING, PONG, TEXT
from trio_gateway.testing import make_jwt, make_principal, make_table_token
from trio_gateway.transports.hypercorn_bounds import MOST_FRAGMENTS

UNNOTICED: Final = 0.25  # seconds that a bystander's ping may take
FOUR: Final = Path("/proc/sys/net/ipv4").exists()  # Linux: all of 127.0.0.0/8 is this machine

MANY_ADDRESSES = pytest.mark.skipif(not FOUR, reason="one loopback address only")


@asynccontextmanager
async def dialled_from(address: str, port: int) -> AsyncIterator[Client]:
    with trio.socket.socket() as sock:
        await sock.bind((address, 0))
        await sock.connect(("127.0.0.1", port))
        yield Client(trio.SocketStream(sock))


async def upgraded(client: Client, transport: Transport, sub: int = 21) -> None:
    """A waiter; on the ASGI transport, the second request of its connection."""
    if transport == "asgi":
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200
    await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET, sub=str(sub))}")


async def ending(client: Client, seconds: float = 3) -> tuple[int, str]:
    with trio.fail_after(seconds):
        return await client.closed()


async def is_served(client: Client) -> bool:
    await client.say("ping")
    with trio.fail_after(3):
        return await client.text() == PONG_TEXT


async def refused_from(address: str, gateway: Running, token: str, *more: str) -> tuple[int, str]:
    async with dialled_from(address, gateway.port) as client:
        await client.upgrade(f"/ws/waiter?token={token}", *more)
        return await ending(client)


async def is_let_in_from(address: str, gateway: Running, *more: str) -> bool:
    async with dialled_from(address, gateway.port) as client:
        await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}", *more)
        return await is_served(client)


class Bystander:
    """A client that pings continuously; measures the slowest answer, in seconds."""

    def __init__(self) -> None:
        self.slowest = 0.0
        self.pings = 0

    async def ping(self, client: WebSocketConnection) -> None:
        while True:
            watch = Stopwatch()
            await client.send_message("ping")
            assert await client.get_message() == PONG_TEXT
            self.slowest = max(self.slowest, watch.net)
            self.pings += 1
            await trio.sleep(0.06)


@asynccontextmanager
async def unaffected(gateway: Running) -> AsyncIterator[None]:
    """A bystander's pings are answered in time while the body runs."""
    bystander = Bystander()
    async with admitted(gateway.staff_url("kitchen", sub="77")) as client:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bystander.ping, client)
            yield
            nursery.cancel_scope.cancel()
        assert bystander.pings
        assert bystander.slowest < UNNOTICED


# Handshakes in progress


async def test_sockets_over_the_handshake_limit_wait_or_are_closed_and_counted(
    redis_url: str,
) -> None:
    async with (
        serving(redis_url, "direct", ws_max_handshakes=8, ws_accept_timeout=1) as gateway,
        unaffected(gateway),
    ):
        async with AsyncExitStack() as stack:
            drips = [await stack.enter_async_context(dialled(gateway.port)) for _ in range(8)]
            for n, drip in enumerate(drips):
                await drip.send(make_head()[: n + 1] if n else b"")
            await until(lambda: gateway.app.parts.handshakes == 8)
            waiting = [await stack.enter_async_context(dialled(gateway.port)) for _ in range(20)]
            for drip in drips[1:]:  # the time is for the whole head, however it drips
                with trio.fail_after(2):
                    assert (await drip.response())[0] == 408
            for client in waiting:  # those whose turn came have said nothing either
                with trio.fail_after(3):
                    assert await client.rest() == b""
        await until(lambda: gateway.app.parts.handshakes == 0)
        async with admitted(gateway.staff_url("waiter")):
            pass
        figures = await metrics(gateway.port)
        assert figures["upgrades_refused_total{503}"] >= 4
        assert figures["upgrades_refused_total{408}"] == 7


async def test_request_that_comes_as_a_whole_waits_for_no_slot(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_max_handshakes=1, ws_accept_timeout=5) as gateway,
        dialled(gateway.port) as drip,
    ):
        await drip.send(make_head()[:10])
        await until(lambda: gateway.app.parts.heads.inside == 1)
        for _ in range(3):
            async with admitted(gateway.staff_url("waiter")):
                assert gateway.app.parts.heads.inside == 1  # it did not lose its slot either


async def test_silent_tls_handshakes_are_counted_and_have_the_same_deadline(
    redis_url: str, tmp_path: Path
) -> None:
    issuer, config = trustme.CA(), Config()
    certificate = issuer.issue_cert("127.0.0.1", "localhost")
    certificate.private_key_and_cert_chain_pem.write_to_path(str(tmp_path / "both.pem"))
    config.certfile = config.keyfile = str(tmp_path / "both.pem")
    trusting = ssl.create_default_context()
    issuer.configure_trust(trusting)
    settings = make_settings(redis_url, ws_max_handshakes=3, ws_accept_timeout=0.5)
    async with running(settings, config=config) as gateway, AsyncExitStack() as stack:
        silent = [await stack.enter_async_context(dialled(gateway.port)) for _ in range(3)]
        await until(lambda: gateway.app.parts.handshakes == 3)
        async with dialled(gateway.port) as client:
            with trio.fail_after(2):
                assert await client.rest() == b""
        with trio.fail_after(1):
            for each in silent:
                assert await each.rest() == b""
        await until(lambda: gateway.app.parts.handshakes == 0)
        url = gateway.staff_url("waiter").replace("ws://", "wss://")
        async with admitted(url, ssl_context=trusting):
            assert gateway.app.parts.counts.refused.keys() <= {503}


class Unhurried:
    """Authentication that waits until ``go_on`` is set."""

    def __init__(self) -> None:
        self.go_on = trio.Event()

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        await self.go_on.wait()
        return make_principal(endpoint)


async def test_clients_over_the_admission_limit_are_closed_with_1013(
    redis_url: str,
) -> None:
    """On the ASGI transport: the direct one does not read from them."""
    auth = Unhurried()
    settings = make_settings(redis_url, ws_max_handshakes=4, ws_accept_timeout=4)
    by_endpoint = dict.fromkeys(Endpoint, auth)
    async with (
        running(settings, transport="asgi", auth=by_endpoint) as gateway,
        AsyncExitStack() as stack,
    ):
        url = f"{gateway.url}/ws/waiter"
        waiting = [await stack.enter_async_context(connect(url)) for _ in range(4)]
        await until(lambda: gateway.app.parts.handshakes == 4)
        async with connect(url) as client:
            assert await closed(client) == (Close.SERVER_OVERLOADED, "too many handshakes")
        assert gateway.app.parts.counts.rejected == {"handshake_limit": 1}
        auth.go_on.set()
        for client in waiting:
            await client.send_message("ping")
            assert await client.get_message() == PONG_TEXT


# Addresses


def test_address_is_not_read_without_a_limit() -> None:
    assert Addresses(hops=1).of(lambda: "127.0.0.1", "10.0.0.1") == ""
    assert Addresses(hops=1, failures=1).of(lambda: "127.0.0.1", "10.0.0.1") == "10.0.0.1"


@MANY_ADDRESSES
async def test_connections_are_limited_per_address(redis_url: str, transport: Transport) -> None:
    async with (
        serving(redis_url, transport, ws_max_connections_per_address=2) as gateway,
        AsyncExitStack() as stack,
    ):
        clients = []
        for n in range(2):  # whoever they are
            client = await stack.enter_async_context(dialled_from("127.0.0.2", gateway.port))
            await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET, sub=str(n))}")
            assert await is_served(client)
            clients.append(client)
        table = f"/ws/diner?table_token={make_table_token(TABLE_SECRET)}"
        async with dialled_from("127.0.0.2", gateway.port) as one_more:
            await one_more.upgrade(table)
            reason = "too many connections of this address"
            assert await ending(one_more) == (Close.SERVER_OVERLOADED, reason)
        assert gateway.app.parts.counts.rejected == {"address_limit": 1}
        assert await is_let_in_from("127.0.0.3", gateway)
        await clients[0].leave()
        await until(lambda: len(gateway.app.parts.hub) == 1)
        assert await is_let_in_from("127.0.0.2", gateway)
        await until(lambda: len(gateway.app.parts.addresses) == 1)


async def test_behind_a_proxy_the_proxy_reports_the_address_and_not_the_client(
    redis_url: str, transport: Transport
) -> None:
    changes = {"ws_max_connections_per_address": 2, "ws_proxy_hops": 1}
    async with serving(redis_url, transport, **changes) as gateway, AsyncExitStack() as stack:

        async def joined(*said: str) -> bool:
            client = await stack.enter_async_context(dialled(gateway.port))
            headers = [f"X-Forwarded-For: {each}" for each in said]
            await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}", *headers)
            if gateway.app.parts.counts.rejected:
                assert (await ending(client))[0] == Close.SERVER_OVERLOADED
            return await is_served(client)

        assert await joined("10.1.1.1, 192.0.2.1")
        assert await joined("10.1.1.2", "192.0.2.1:4567")  # as some proxies write it
        assert await joined("192.0.2.1, 192.0.2.2")
        client = await stack.enter_async_context(dialled(gateway.port))
        said = "X-Forwarded-For: 192.0.2.9,10.1.1.4,  192.0.2.1"
        await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}", said)
        assert (await ending(client))[0] == Close.SERVER_OVERLOADED
        assert gateway.app.parts.counts.rejected == {"address_limit": 1}


async def test_without_trusted_proxies_x_forwarded_for_is_ignored(
    redis_url: str, transport: Transport
) -> None:
    async with (
        serving(redis_url, transport, ws_max_connections_per_address=1) as gateway,
        dialled(gateway.port) as first,
    ):
        await first.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}", "X-Forwarded-For: 1.1.1.1")
        assert await is_served(first)
        async with dialled(gateway.port) as second:
            said = "X-Forwarded-For: 2.2.2.2"
            await second.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}", said)
            assert (await ending(second))[0] == Close.SERVER_OVERLOADED


@pytest.mark.parametrize(
    ("forwarded_for", "hops", "found"),
    [
        (None, 0, "192.0.2.9"),
        ("1.1.1.1", 0, "192.0.2.9"),
        (None, 1, "192.0.2.9"),
        ("", 1, "192.0.2.9"),
        ("1.1.1.1", 1, "1.1.1.1"),
        ("1.1.1.1, 2.2.2.2", 1, "2.2.2.2"),
        ("1.1.1.1, 2.2.2.2", 2, "1.1.1.1"),
        ("1.1.1.1,2.2.2.2 ,\t3.3.3.3", 2, "2.2.2.2"),
        ("1.1.1.1", 3, "1.1.1.1"),
        ("1.1.1.1, 2.2.2.2:80", 1, "2.2.2.2"),
        ("1.1.1.1,", 1, "192.0.2.9"),
        ("1.1.1.1, unknown", 1, "192.0.2.9"),
        ("x" * 9000, 1, "192.0.2.9"),
        ("2001:db8:1:2:3:4:5:6", 1, "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::9", 1, "2001:db8:1:2::/64"),
        ("[2001:db8:1:2:aaaa::]:443", 1, "2001:db8:1:2::/64"),
        ("::ffff:1.1.1.1", 1, "1.1.1.1"),
        ("::1", 1, "::/64"),
    ],
)
def test_address_is_normalised(forwarded_for: str | None, hops: int, found: str) -> None:
    assert client_address("192.0.2.9", forwarded_for, hops) == found
    assert client_address("::ffff:192.0.2.9", None, 0) == "192.0.2.9"
    assert client_address("", None, 0) == ""  # of a unix socket


# Failed logins


@MANY_ADDRESSES
async def test_address_with_too_many_failed_logins_is_closed_with_4029_for_any_credential(
    redis_url: str, transport: Transport
) -> None:
    good = make_jwt(JWT_SECRET)
    forbidden = make_jwt(JWT_SECRET, roles=["KITCHEN"])
    async with serving(redis_url, transport, ws_max_failed_logins=3) as gateway:
        for _ in range(5):  # a token that is valid, though not for this
            assert (await refused_from("127.0.0.2", gateway, forbidden))[0] == Close.FORBIDDEN
        for n in range(3):
            assert await is_let_in_from("127.0.0.2", gateway)
            code, _ = await refused_from("127.0.0.2", gateway, make_jwt("x" * 64, sub=str(n)))
            assert code == Close.AUTH_FAILED
        for token in (good, "x", ""):
            told = await refused_from("127.0.0.2", gateway, token)
            assert told == (Close.RATE_LIMITED, "too many failed logins")
        assert await is_let_in_from("127.0.0.3", gateway)
        assert gateway.app.parts.counts.rejected == {"role": 5, "auth": 3, "failed_logins": 3}
        figures = await metrics(gateway.port)
        assert figures["connections_rejected_total{failed_logins}"] == 3


async def test_failed_logins_over_http_count_too(redis_url: str) -> None:
    async with serving(redis_url, "direct", ws_max_failed_logins=3, ws_proxy_hops=1) as gateway:
        port, good = gateway.port, make_jwt(JWT_SECRET)

        async def status(path: str, token: str, *, method: str = "GET", said: str) -> int:
            headers = {"Authorization": f"Bearer {token}", "X-Forwarded-For": said}
            return (await http(port, path, method=method, headers=headers)).status

        catch_up, session = "/ws/catchup?branch_id=1&since=0", "/ws/catchup/session?session_id=1"
        assert await status("/ws/ticket", "x", method="POST", said="9.9.9.1, 1.1.1.1") == 401
        assert await status(catch_up, "y", said="9.9.9.2, 1.1.1.1") == 401
        assert await status(session, "z", said="9.9.9.3, 1.1.1.1") == 401
        for path, method in (("/ws/ticket", "POST"), (catch_up, "GET"), (session, "GET")):
            assert await status(path, good, method=method, said="9.9.9.4, 1.1.1.1") == 429
        assert await status(catch_up, good, said="1.1.1.1, 2.2.2.2") == 200
        async with dialled(port) as client:
            await client.upgrade(f"/ws/waiter?token={good}", "X-Forwarded-For: 1.1.1.1")
            assert (await ending(client))[0] == Close.RATE_LIMITED


async def test_failed_logins_expire(redis_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_FAILURE_WINDOW", 0.3)
    async with serving(redis_url, "direct", ws_max_failed_logins=1) as gateway:
        url = f"{gateway.url}/ws/waiter?token=x"
        async with connect(url) as client:
            assert (await closed(client))[0] == Close.AUTH_FAILED
        async with connect(gateway.staff_url("waiter")) as client:
            assert (await closed(client))[0] == Close.RATE_LIMITED
        await trio.sleep(0.3)
        async with admitted(gateway.staff_url("waiter")):
            pass


def is_free(found: Addresses, address: str, now: float) -> bool:
    try:
        found.enter(address, now)
    except Rejected as rejected:
        return rejected.close is not Close.RATE_LIMITED
    found.leave(address)
    return True


def test_failed_login_counts_for_one_minute() -> None:
    found = Addresses(failures=3)
    for now in (0.0, 10.0, 20.0):
        assert is_free(found, "a", now)
        found.failed("a", now)
    assert not is_free(found, "a", 20.0)
    assert is_free(found, "b", 20.0)
    assert not is_free(found, "a", 59.9)
    assert is_free(found, "a", 60.0)
    found.failed("a", 60.0)  # the three of 10, 20 and 60
    assert not is_free(found, "a", 69.9)
    assert is_free(found, "a", 70.0)


def test_rejected_attempt_does_not_count_as_failed_login() -> None:
    found = Addresses(failures=1)
    found.failed("a", 0.0)
    assert not any(is_free(found, "a", float(now)) for now in range(60))
    assert is_free(found, "a", 60.0)


def test_number_of_remembered_addresses_is_bounded() -> None:
    found = Addresses(connections=5, failures=5)
    for n in range(30_000):
        found.failed(f"address {n}", 0.0)
        found.enter(f"address {n}", 0.0)
        found.leave(f"address {n}")
    assert len(found) == 10_000


def test_without_limits_nothing_is_remembered() -> None:
    found = Addresses()
    for n in range(100):
        found.failed("a", 0.0)
        found.enter("a", float(n))
        assert len(found) == 0


# Floods


def fragments(piece: bytes, number: int) -> bytes:
    first = client_frame(TEXT, piece, fin=False)
    return first + client_frame(CONTINUATION, piece, fin=False) * (number - 1)


FLOODS: Final = {
    "pings": (client_frame(PING, b"x") * 1000, Close.RATE_LIMITED),
    "pongs": (client_frame(PONG) * 1000, Close.RATE_LIMITED),
    "messages": (client_frame(TEXT, "ping") * 1000, Close.RATE_LIMITED),
    "empty messages": (client_frame(TEXT) * 1000, Close.RATE_LIMITED),
    "empty fragments": (fragments(b"", 9000), Close.MESSAGE_TOO_BIG),
    "tiny fragments": (fragments(b"a", 9000), Close.MESSAGE_TOO_BIG),
    "big message": (fragments(b"a" * 65_000, 20), Close.MESSAGE_TOO_BIG),
}


@pytest.mark.parametrize("name", FLOODS)
async def test_flood_is_closed_with_its_code_and_other_clients_are_not_affected(
    redis_url: str, transport: Transport, name: str
) -> None:
    data, code = FLOODS[name]
    async with (
        serving(redis_url, "direct") as gateway,
        unaffected(gateway),
        AsyncExitStack() as stack,
    ):
        clients = []
        for n in range(6):
            client = await stack.enter_async_context(dialled(gateway.port))
            await upgraded(client, transport, n)
            assert await is_served(client)
            clients.append(client)

        async def flood(client: Client) -> None:
            await client.send(data)
            found, _ = await ending(client)
            assert found == code
            await client.leave()

        async with trio.open_nursery() as nursery:
            for client in clients:
                nursery.start_soon(flood, client)
        # Over ASGI, what Hypercorn ends is seen as a client that has gone.
        seen = code if transport == "direct" or "messages" in name else Close.ABNORMAL
        await until(lambda: gateway.app.parts.hub.closed == {seen: 6})
        figures = await metrics(gateway.port)
        assert figures[f"connections_closed_total{{{int(seen)}}}"] == 6


@pytest.mark.parametrize(
    ("transport", "name"),
    [
        ("direct", "messages"),
        ("asgi", "messages"),
        ("asgi", "tiny fragments"),
        pytest.param("direct", "pings", marks=pytest.mark.chaos),
        pytest.param("direct", "tiny fragments", marks=pytest.mark.chaos),
        pytest.param("direct", "big message", marks=pytest.mark.chaos),
        pytest.param("asgi", "pings", marks=pytest.mark.chaos),
        pytest.param("asgi", "big message", marks=pytest.mark.chaos),
    ],
)
async def test_flood_that_never_stops_is_aborted(
    redis_url: str, transport: Transport, name: str
) -> None:
    data, _ = FLOODS[name]
    async with (
        serving(redis_url, "direct") as gateway,
        unaffected(gateway),
        dialled(gateway.port) as client,
    ):
        await upgraded(client, transport)
        await until(lambda: len(gateway.app.parts.hub) == 2)
        with trio.fail_after(6), suppress(trio.BrokenResourceError):
            while True:
                await client.send(data)
        await until(lambda: len(gateway.app.parts.hub) == 1)


async def test_message_may_arrive_in_some_fragments_and_any_number_of_segments(
    redis_url: str, transport: Transport
) -> None:
    text = '{"type":"ping","x":"' + "a" * 1253 + '"}'
    piece = -(-len(text) // (MOST_FRAGMENTS - 1))
    async with serving(redis_url, transport) as gateway, dialled(gateway.port) as client:
        await client.upgrade(f"/ws/waiter?token={make_jwt(JWT_SECRET)}")
        cut = [text[at : at + piece] for at in range(0, len(text), piece)]
        for _ in range(2):  # the count begins anew
            for n, each in enumerate(cut):
                opcode = CONTINUATION if n else TEXT
                await client.send(client_frame(opcode, each, fin=n == len(cut) - 1))
            with trio.fail_after(3):
                assert await client.text() == PONG_TEXT
        frame = client_frame(TEXT, text)
        for at in range(len(frame)):
            await client.send(frame[at : at + 1])
            await trio.lowlevel.checkpoint()
        with trio.fail_after(3):
            assert await client.text() == PONG_TEXT


async def test_no_transport_agrees_to_compression(redis_url: str, transport: Transport) -> None:
    """65 KB can inflate to 200 MB."""
    async with serving(redis_url, transport) as gateway:
        for before in (b"", b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n"):
            async with dialled(gateway.port) as client:
                if before:
                    await client.send(before)
                    await client.response()
                target = f"/ws/waiter?token={make_jwt(JWT_SECRET)}"
                offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
                await client.send(make_head(offer, request=f"GET {target} HTTP/1.1"))
                head = b""
                with trio.fail_after(3):
                    while b"\r\n\r\n" not in head:
                        head += bytes(await client.stream.receive_some(1))
                assert head.startswith(b"HTTP/1.1 101")
                assert b"extensions" not in head.lower()
                await client.send(client_frame(TEXT, b"\x2a\xcb\xcc\x4b\x07\x00", rsv=4))
                with trio.fail_after(3):
                    if transport == "direct" and not before:
                        assert (await client.closed())[0] == Close.PROTOCOL_ERROR
                    else:  # Hypercorn's way to say so is to end
                        await client.rest()


# Many at a time


async def test_thirty_concurrent_connects_of_one_user_leave_exactly_the_limit(
    redis_url: str, transport: Transport
) -> None:
    async with serving(redis_url, transport, ws_max_connections_per_user=3) as gateway:
        endings: Counter[int] = Counter()
        urls = [
            gateway.staff_url(endpoint, roles=["MANAGER"])
            for endpoint in ("waiter", "kitchen", "admin")
        ] * 10
        done = trio.Event()

        async def one(url: str) -> None:
            async with connect(url) as client:
                with trio.move_on_after(30) as scope:
                    endings[(await closed(client, 30))[0]] += 1
                assert not scope.cancelled_caught

        async with trio.open_nursery() as nursery:
            for url in urls:
                nursery.start_soon(one, url)
            await until(lambda: endings.total() == 27)
            assert endings == {Close.SERVER_OVERLOADED: 27}
            assert len(gateway.app.parts.hub) == 3
            assert gateway.app.parts.counts.rejected == {"user_limit": 27}
            done.set()
            nursery.cancel_scope.cancel()
        await until(lambda: len(gateway.app.parts.hub) == 0)
        async with admitted(urls[0]):
            pass


async def test_thirty_concurrent_connects_of_one_session_leave_exactly_the_limit(
    redis_url: str, transport: Transport
) -> None:
    async with serving(redis_url, transport, ws_max_connections_per_session=20) as gateway:
        refused: list[int] = []

        async def one(url: str) -> None:
            async with connect(url) as client:
                refused.append((await closed(client, 30))[0])

        async with trio.open_nursery() as nursery:
            for n in range(30):  # at two tables of one session
                nursery.start_soon(one, gateway.diner_url(table_id=10 + n % 2))
            await until(lambda: len(refused) == 10)
            assert refused == [Close.SERVER_OVERLOADED] * 10
            assert len(gateway.app.parts.hub) == 20
            async with admitted(gateway.diner_url(tenant_id=2)):
                pass
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize("number", [200, pytest.param(1000, marks=pytest.mark.chaos)])
async def test_many_invalid_tokens_delay_no_other_client(
    redis_url: str, transport: Transport, number: int
) -> None:
    head, _, signature = make_jwt(JWT_SECRET).partition(".")
    async with serving(redis_url, transport) as gateway, unaffected(gateway):
        limit = trio.CapacityLimiter(50)

        async def try_one(n: int) -> None:
            async with limit, dialled(gateway.port) as client:
                await client.upgrade(f"/ws/waiter?token={head}.{signature[:-4]}{n:04}")
                assert (await ending(client))[0] == Close.AUTH_FAILED

        async with trio.open_nursery() as nursery:
            for n in range(number):
                nursery.start_soon(try_one, n)
        assert gateway.app.parts.counts.rejected == {"auth": number}
        assert gateway.app.parts.hub.closed == {Close.AUTH_FAILED: number}


# Connections that say nothing


@pytest.mark.parametrize("limited", [False, True])
@pytest.mark.parametrize("first", [b"", b"GET /ws"])
async def test_many_silent_connections_delay_no_other_client(
    redis_url: str, limited: bool, first: bytes
) -> None:
    """Many times the limit of handshakes are silent connections while others connect."""
    changes: dict[str, Any] = {"ws_max_handshakes": 20, "ws_accept_timeout": 5}
    if limited:
        changes["ws_max_connections_per_address"] = 30
    async with serving(redis_url, "direct", **changes) as gateway, AsyncExitStack() as stack:
        slowest = 0.0
        for n in range(3 if first else 10):
            for _ in range(20):
                client = await stack.enter_async_context(dialled(gateway.port))
                if first:
                    await client.send(first)
            started = trio.current_time()
            async with admitted(gateway.staff_url("kitchen", sub=str(n + 1))):
                slowest = max(slowest, trio.current_time() - started)
        assert len(gateway.app.parts.silent) <= 20
        if first:  # those have a moment each
            assert slowest < 2  # of an accept timeout of 5 s
        else:
            assert slowest < 1
            assert gateway.app.parts.counts.refused[503] >= 150


async def test_silent_connections_of_an_address_count_from_accept(
    redis_url: str,
) -> None:
    async with (
        serving(redis_url, "direct", ws_max_connections_per_address=3) as gateway,
        AsyncExitStack() as stack,
    ):
        silent: list[Client] = []
        for n in range(5):  # one by one: those that are accepted at once begin in any order
            silent.append(await stack.enter_async_context(dialled(gateway.port)))
            if n < 3:
                await until(lambda: len(gateway.app.parts.silent) == len(silent))
            else:
                with trio.fail_after(2):
                    assert await silent[n - 3].rest() == b""
        assert len(gateway.app.parts.silent) == 3
        async with admitted(gateway.staff_url("kitchen")), admitted(gateway.staff_url("waiter")):
            await stack.enter_async_context(dialled(gateway.port))
            with trio.fail_after(2):
                assert await silent[2].rest() == b""
