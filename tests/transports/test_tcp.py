"""The direct transport: any bytes get the right answer and affect no other client."""

import gc
import json
import os
import re
import select
import socket
import ssl
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import hypercorn.trio.run
import pytest
import structlog
import trio
import websockets.sync.client
from hypercorn.config import Config
from hypercorn.trio.tcp_server import TCPServer
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, lockstep_stream_pair, wait_all_tasks_blocked
from websockets.exceptions import ConnectionClosed
from websockets.typing import Subprotocol

from tests.support.gateways import (
    Running,
    closed,
    connect,
    http,
    make_settings,
    metrics,
    running,
    until,
    with_certificate,
)
from tests.support.sockets import (
    BINARY,
    CONTINUATION,
    HEADS,
    PONG_TEXT,
    Client,
    client_frame,
    close_payload,
    dialled,
    in_memory,
    make_head,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.access.auth import Auth
from trio_gateway.core.audiences import Endpoint, Principal
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT
from trio_gateway.gateway import Gateway, create_app
from trio_gateway.reception import Reception
from trio_gateway.runtime.connection import Connection
from trio_gateway.runtime.socket import LINGER
from trio_gateway.testing import NullAuth, make_event, make_principal
from trio_gateway.transports.direct import DirectSocket
from trio_gateway.transports.handshake import MAX_HEAD_BYTES
from trio_gateway.transports.listener import Listener

NO_REDIS = "redis://127.0.0.1:1"
EVERYBODY: Mapping[Endpoint, Auth] = {endpoint: NullAuth() for endpoint in Endpoint}
PATIENT = {"ws_message_rate_limit": 1_000_000}


class BySession:
    """Admits every client as a diner of the session that its token names."""

    async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
        await trio.lowlevel.checkpoint()
        return make_principal(Endpoint.DINER, session=int(credential))


def make_app(**changes: Any) -> Gateway:
    """A gateway without its background tasks, which connections do not need."""
    return create_app(make_settings(NO_REDIS, **PATIENT | changes), auth=EVERYBODY)


@asynccontextmanager
async def serving(
    auth: Mapping[Endpoint, Auth] = EVERYBODY, config: Config | None = None, **changes: Any
) -> AsyncIterator[Running]:
    """A gateway on a real socket, without Redis, that admits every client."""
    made = make_settings(NO_REDIS, **PATIENT | changes)
    async with running(made, auth=auth, wait_ready=False, config=config) as gateway:
        yield gateway


@asynccontextmanager
async def bystanding(port: int) -> AsyncIterator[None]:
    """A client that is connected during the block, and must be served at its end."""
    with trio.fail_after(20):
        async with dialled(port) as bystander:
            await bystander.upgrade("/ws/admin")
            await bystander.pings()
            yield
            await bystander.pings()


async def status_of(client: Client, *segments: bytes) -> int:
    """The status of the answer to these bytes."""

    async def send() -> None:
        for segment in segments:
            await client.send(segment)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        status, _ = await client.response()
        nursery.cancel_scope.cancel()
    await client.leave()
    return status


# Any head, in any segments


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.chaos)])
@pytest.mark.parametrize("name", HEADS)
async def test_head_has_the_same_answer_however_it_is_segmented(
    name: str, every: int, autojump_clock: MockClock
) -> None:
    head = HEADS[name]
    # In lockstep, a segment is received before the next one is sent.
    async with in_memory(make_app(), lockstep_stream_pair) as dial:
        bystander = await dial().upgrade()
        step = every if head.by == "direct" else 7  # Hypercorn parses the rest
        first = (
            1 + list(HEADS).index(name) % step
        )  # so that the heads together are cut at every place
        cuts = [(head.data[:i], head.data[i:]) for i in range(first, len(head.data), step)]
        byte_by_byte = [head.data[i : i + 1] for i in range(len(head.data))]
        for segments in [(head.data,), byte_by_byte, *cuts]:
            assert await status_of(dial(), *segments) == head.status
        async with trio.open_nursery() as nursery:
            nursery.start_soon(bystander.say, "ping")
            assert await bystander.text() == PONG_TEXT
        assert trio.current_time() == 0  # no client had to wait


async def test_no_head_affects_another_client() -> None:
    async with serving() as gateway, bystanding(gateway.port):
        for head in HEADS.values():
            async with bystanding(gateway.port), dialled(gateway.port) as client:
                assert await status_of(client, head.data) == head.status
        expected = sum(h.by == "direct" and h.status != 101 for h in HEADS.values())
        assert gateway.app.parts.counts.refused.total() == expected


async def test_refused_upgrades_are_counted_by_status() -> None:
    async with serving() as gateway:
        for name in ("no key", "no host", "unknown path"):
            async with dialled(gateway.port) as client:
                await status_of(client, HEADS[name].data)
        found = (await metrics(gateway.port)).by_label("upgrades_refused_total")
        assert found == {"400": 2, "404": 1}


@cache
def _app_for_garbage() -> Gateway:
    """One for all examples: making it takes longer than an example."""
    return make_app()


@given(st.lists(st.binary(max_size=60), max_size=5))
def test_garbage_is_answered_with_400_or_a_close(segments: list[bytes]) -> None:
    async def main() -> None:
        async with in_memory(_app_for_garbage()) as dial:
            bystander = await dial().upgrade()
            client = dial()
            for segment in segments:
                await client.send(segment)
            await client.half_close()
            answer = await client.rest()
            assert not answer or answer.startswith(b"HTTP/1.1 400 ")
            await bystander.pings()

    trio.run(main)


# Bytes after the head


async def test_frames_sent_with_the_upgrade_are_answered() -> None:
    async with in_memory(make_app()) as dial:
        client = await dial().upgrade(behind=client_frame(TEXT, "ping") + client_frame(PING, b"x"))

        assert await client.text() == PONG_TEXT
        assert await client.frame() == (PONG, b"x")


async def test_upgrade_and_frames_may_be_segmented_anywhere() -> None:
    data = make_head() + client_frame(TEXT, "ping") + client_frame(TEXT, '{"type": "ping"}')
    async with in_memory(make_app(), lockstep_stream_pair) as dial:
        for cut in range(1, len(data)):
            client = dial()
            async with trio.open_nursery() as nursery:

                async def send(client: Client = client, cut: int = cut) -> None:
                    await client.send(data[:cut])
                    await client.send(data[cut:])

                nursery.start_soon(send)
                assert (await client.response())[0] == 101
                assert await client.text() == PONG_TEXT
                assert await client.text() == PONG_TEXT
            await client.leave()


async def test_pipelined_requests_are_all_answered() -> None:
    async with in_memory(make_app()) as dial:
        client = dial()
        request = b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n"
        await client.send(request * 3)

        for _ in range(3):
            status, body = await client.response()
            assert (status, json.loads(body)["connections"]["total"]) == (200, 0)


async def test_upgrade_as_second_request_is_served_by_the_asgi_transport() -> None:
    async with in_memory(make_app()) as dial:
        client = dial()
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200

        await client.upgrade("/ws/kitchen")
        await client.say("ping")
        assert await client.text() == PONG_TEXT
        await client.send(client_frame(BINARY, b"x"))
        assert (await client.closed())[0] == Close.UNSUPPORTED_DATA


async def test_upgrade_with_a_frame_as_second_request_affects_no_other_client() -> None:
    async with serving() as gateway, bystanding(gateway.port), dialled(gateway.port) as client:
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200

        await client.send(make_head() + client_frame(TEXT, "ping"))
        await client.rest()


@pytest.mark.parametrize("transport", ["direct", "second request", "events"])
async def test_clients_may_connect_and_disconnect_during_delivery(transport: str) -> None:
    auth = dict.fromkeys(Endpoint, BySession())

    async def open_one(client: Client, session: int) -> None:
        if transport == "events":
            head = f"GET /ws/diner/events?table_token={session} HTTP/1.1\r\nHost: a\r\n\r\n"
            await client.send(head.encode())
            return
        if transport == "second request":  # as a proxy that keeps its connections sends it
            await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
            await client.response()
        await client.upgrade(f"/ws/diner?table_token={session}")

    async def come_and_go(port: int) -> None:
        for turn in range(8):
            async with dialled(port, receive_buffer=4096) as client:
                await open_one(client, 2)
                await trio.sleep(0.001 * turn)
                await (client.reset() if turn % 2 else client.leave())

    async with serving(auth) as gateway, dialled(gateway.port) as honest:
        hub = gateway.app.parts.hub
        await open_one(honest, 1)
        await until(lambda: len(hub) == 1)
        (stays,) = hub.connections
        seen: set[Connection] = set()

        async def write_at_every_step() -> None:
            """As dispatch does with a snapshot of the hub that is older than a disconnect."""
            while True:
                seen.update(hub.connections)
                for connection in seen - {stays}:
                    connection.send(b"x" * 5000)
                await trio.lowlevel.checkpoint()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write_at_every_step)
            async with trio.open_nursery() as guests:
                for _ in range(6):
                    guests.start_soon(come_and_go, gateway.port)
            await until(lambda: len(hub) == 1)
            nursery.cancel_scope.cancel()
        assert len(seen) > 10
        event = make_event("CART_SYNC", session_id=1)
        gateway.app.parts.pubsub_queue.offer(event)
        assert await honest.contains(event.payload)


@pytest.mark.parametrize("name", ["Connection", "Sec-WebSocket-Protocol", "Origin"])
async def test_high_byte_in_a_second_request_affects_no_other_client(name: str) -> None:
    async with serving() as gateway, bystanding(gateway.port), dialled(gateway.port) as client:
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200

        await client.send(HEADS[f"bytes above 0x7f in {name}"].data)
        with trio.move_on_after(0.2):
            await client.rest()


# Heads that are too long, too slow, or missing


@pytest.mark.parametrize(
    "head",
    [
        make_head("X-Long: " + "x" * 20_000),
        make_head(request=f"GET /ws/waiter?token={'x' * 20_000} HTTP/1.1"),
        b"GET /ws/health HTTP/1.1\r\nHost: a\r\nX-Long: " + b"x" * 20_000 + b"\r\n\r\n",
        b"x" * 20_000,
    ],
    ids=["header", "target", "no upgrade", "no end"],
)
@pytest.mark.parametrize("size", [100_000, 8000, 1000, 97])
async def test_long_head_is_431_in_one_segment_or_many(
    head: bytes, size: int, autojump_clock: MockClock
) -> None:
    async with in_memory(make_app(), lockstep_stream_pair) as dial:
        segments = [head[i : i + size] for i in range(0, len(head), size)]

        assert await status_of(dial(), *segments) == 431


@pytest.mark.parametrize("size", [100_000, 1000])
async def test_longest_head_is_accepted(size: int) -> None:
    short = len(make_head("X-Long: "))
    for more, status in ((0, 101), (1, 431)):
        head = make_head("X-Long: " + "x" * (MAX_HEAD_BYTES - short + more))
        async with in_memory(make_app(), lockstep_stream_pair) as dial:
            segments = [head[i : i + size] for i in range(0, len(head), size)]
            assert await status_of(dial(), *segments) == status


async def test_refusal_arrives_although_more_data_is_unread() -> None:
    async with serving() as gateway:
        for head in (make_head("X-Long: " + "x" * 20_000), HEADS["no key"].data) * 20:
            async with dialled(gateway.port) as client:
                await client.send(head + b"x" * 300_000)
                await trio.sleep(0.01)  # the gateway is done before anything is read
                assert (await client.response())[0] in {400, 431}


async def test_response_arrives_although_the_body_is_unread() -> None:
    """Many clients send all of a request before they read, and a reset would be all they get."""
    body = bytes(9_000_000)
    head = "POST {} HTTP/1.1\r\nHost: a\r\nContent-Length: 9000000\r\n\r\n"
    async with serving() as gateway:
        for path, status in {"/nowhere": 404, "/ws/explain": 413, "/ws/health": 405}.items():
            async with dialled(gateway.port) as client:
                await client.send(head.format(path).encode() + body)
                assert (await client.response())[0] == status


async def test_dripping_head_is_closed_after_the_accept_timeout(autojump_clock: MockClock) -> None:
    async with in_memory(make_app()) as dial:
        client = dial()
        async with trio.open_nursery() as nursery:

            async def drip() -> None:
                for byte in make_head():
                    await client.send(bytes([byte]))
                    await trio.sleep(0.1)

            nursery.start_soon(drip)
            status, _ = await client.response()
            assert (status, trio.current_time()) == (408, 5)
            nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    ("data", "answered"),
    [
        (b"", b""),
        (make_head()[:100], b"HTTP/1.1 408 "),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"HTTP/1.1 408 "),
    ],
    ids=["nothing", "half a head", "TLS hello"],
)
async def test_silent_client_is_closed_after_the_accept_timeout(
    autojump_clock: MockClock, data: bytes, answered: bytes
) -> None:
    async with in_memory(make_app(ws_accept_timeout=3)) as dial:
        client = dial()
        if data:
            await client.send(data)

        answer = await client.rest()

        assert answer.startswith(answered) if answered else not answer
        assert trio.current_time() == 3


@pytest.mark.parametrize(("data", "answered"), [(b"", b""), (b"GET /ws", b"HTTP/1.1 400 ")])
async def test_disconnect_within_the_head_is_400_or_silent(data: bytes, answered: bytes) -> None:
    async with in_memory(make_app()) as dial:
        client = dial()
        await client.send(data or b"")
        await client.half_close()

        answer = await client.rest()

        assert answer.startswith(answered) if answered else not answer


async def test_reset_in_the_handshake_affects_no_other_client() -> None:
    async with serving() as gateway, bystanding(gateway.port):
        for data in (b"", b"GET", make_head()[:-1], make_head(), HEADS["no key"].data):
            async with dialled(gateway.port) as client:
                await client.send(data)
                await client.reset()


# Invalid frames, and unusual valid ones


FRAMES: dict[str, tuple[bytes, Close]] = {
    "binary": (client_frame(BINARY, b"\0\1"), Close.UNSUPPORTED_DATA),
    "empty binary": (client_frame(BINARY), Close.UNSUPPORTED_DATA),
    "one byte too many": (client_frame(TEXT, "x" * 65_537), Close.MESSAGE_TOO_BIG),
    "few characters, many bytes": (client_frame(TEXT, "€" * 21_846), Close.MESSAGE_TOO_BIG),
    "too big in fragments": (
        client_frame(TEXT, "x" * 40_000, fin=False) + client_frame(CONTINUATION, "x" * 40_000),
        Close.MESSAGE_TOO_BIG,
    ),
    "too big and never complete": (
        client_frame(TEXT, "x" * 40_000, fin=False)
        + client_frame(CONTINUATION, "x" * 40_000, fin=False),
        Close.MESSAGE_TOO_BIG,
    ),
    "a terabyte announced": (
        b"\x81\xff" + (1 << 40).to_bytes(8, "big") + b"\0\0\0\0" + b"x" * 70_000,
        Close.MESSAGE_TOO_BIG,
    ),
    "empty fragments without end": (
        client_frame(TEXT, fin=False) + client_frame(CONTINUATION, fin=False) * 2000,
        Close.MESSAGE_TOO_BIG,
    ),
    "not UTF-8": (client_frame(TEXT, b"caf\xe9"), Close.INVALID_DATA),
    "UTF-8 that never ends": (client_frame(TEXT, "€".encode()[:2]), Close.INVALID_DATA),
    "surrogates": (client_frame(TEXT, b"\xed\xa0\x80"), Close.INVALID_DATA),
    "not UTF-8 across fragments": (
        client_frame(TEXT, "€".encode()[:2], fin=False) + client_frame(CONTINUATION, b"x"),
        Close.INVALID_DATA,
    ),
    "unmasked": (client_frame(TEXT, "ping", masked=False), Close.PROTOCOL_ERROR),
    "reserved opcode": (client_frame(0x3, "x"), Close.PROTOCOL_ERROR),
    "reserved control opcode": (client_frame(0xB, "x"), Close.PROTOCOL_ERROR),
    "a reserved bit": (client_frame(TEXT, "x", rsv=0b010), Close.PROTOCOL_ERROR),
    "compressed without agreement": (client_frame(TEXT, "x", rsv=0b100), Close.PROTOCOL_ERROR),
    "fragmented ping": (client_frame(PING, "x", fin=False), Close.PROTOCOL_ERROR),
    "long ping": (client_frame(PING, "x" * 126), Close.PROTOCOL_ERROR),
    "continuation of nothing": (client_frame(CONTINUATION, "x"), Close.PROTOCOL_ERROR),
    "text within a text": (
        client_frame(TEXT, "x", fin=False) + client_frame(TEXT, "y"), Close.PROTOCOL_ERROR
    ),
    "a longer form than needed": (b"\x81\xfe\0\x04\0\0\0\0ping", Close.PROTOCOL_ERROR),
    "length with its highest bit": (b"\x81\xff\xff" + b"\0" * 11, Close.PROTOCOL_ERROR),
    "close of one byte": (client_frame(CLOSE, b"\x03"), Close.PROTOCOL_ERROR),
    "close with 999": (client_frame(CLOSE, close_payload(999)), Close.PROTOCOL_ERROR),
    "close with 1005": (client_frame(CLOSE, close_payload(1005)), Close.PROTOCOL_ERROR),
    "close with 1006": (client_frame(CLOSE, close_payload(1006)), Close.PROTOCOL_ERROR),
    "close with 2000": (client_frame(CLOSE, close_payload(2000)), Close.PROTOCOL_ERROR),
    "close with 5000": (client_frame(CLOSE, close_payload(5000)), Close.PROTOCOL_ERROR),
    "close whose reason is not UTF-8": (
        client_frame(CLOSE, close_payload(1000) + b"\xff"), Close.INVALID_DATA
    ),
}  # fmt: skip


@pytest.mark.parametrize(("data", "close"), FRAMES.values(), ids=FRAMES)
async def test_violation_has_its_code_however_it_is_segmented(
    data: bytes, close: Close, autojump_clock: MockClock
) -> None:
    app = make_app()
    cuts = range(min(len(data), 20))
    async with in_memory(app) as dial:
        for cut in cuts:
            client = await dial().upgrade()
            await client.send(data[:cut])
            await wait_all_tasks_blocked()
            await client.send(data[cut:])

            code, reason = await client.closed()

            assert (code, bool(reason)) == (close, True)
            assert await client.rest() == b""
            await client.leave()
        await wait_all_tasks_blocked()
    assert app.parts.hub.closed == {close: len(cuts)}


async def test_message_of_the_maximum_size_is_accepted() -> None:
    async with in_memory(make_app()) as dial:
        client = await dial().upgrade()
        ping = '{"type":"ping","x":"' + "€" * 21_838
        ping += " " * (65_536 - len(ping.encode()) - 2) + '"}'
        assert len(ping.encode()) == 65_536

        await client.say(ping)

        assert await client.text() == PONG_TEXT


async def test_fragments_with_control_frames_between_are_one_message() -> None:
    async with in_memory(make_app()) as dial:
        client = await dial().upgrade()
        await client.send(client_frame(TEXT, '{"type"', fin=False))
        await client.send(client_frame(PING, b"1"))
        await client.send(client_frame(CONTINUATION, fin=False))
        await client.send(client_frame(PONG, b"unasked"))
        await client.send(client_frame(CONTINUATION, ':"pi', fin=False))
        await client.send(client_frame(PING, b"2"))
        await client.send(client_frame(CONTINUATION, 'ng"}'))

        assert await client.frame() == (PONG, b"1")
        assert await client.frame() == (PONG, b"2")
        assert await client.frame() == (TEXT, PONG_TEXT.encode())


async def test_character_may_be_split_between_fragments() -> None:
    async with in_memory(make_app()) as dial:
        client = await dial().upgrade()
        message = '{"type":"ping","x":"€"}'.encode()
        cut = message.index("€".encode()) + 1
        await client.send(client_frame(TEXT, message[:cut], fin=False))
        await client.send(client_frame(CONTINUATION, message[cut:]))

        assert await client.text() == PONG_TEXT


# Codes arrive although data of the client is unread


async def test_code_of_a_flood_arrives_every_time() -> None:
    codes: list[tuple[int, str]] = []
    flood = client_frame(TEXT, "ping") * 30 + client_frame(TEXT, "x" * 60_000) * 20

    async def overrun(port: int) -> None:
        async with dialled(port) as client:
            await client.upgrade(behind=flood)
            await client.send(flood)
            await trio.sleep(0.05)  # the gateway is done before anything is read
            codes.append(await client.closed())

    async with serving(ws_message_rate_limit=20) as gateway, trio.open_nursery() as nursery:
        with trio.fail_after(20):
            for _ in range(60):
                nursery.start_soon(overrun, gateway.port)
                await trio.sleep(0.005)
    assert codes == [(Close.RATE_LIMITED, "too many messages")] * 60


@pytest.mark.parametrize("name", ["binary", "one byte too many", "not UTF-8", "unmasked"])
async def test_code_arrives_although_more_data_is_unread(name: str) -> None:
    data, close = FRAMES[name]
    async with serving() as gateway:
        for _ in range(10):
            async with dialled(gateway.port) as client:
                await client.upgrade(behind=data + client_frame(TEXT, "x" * 60_000) * 10)
                await client.send(client_frame(TEXT, "x" * 60_000) * 5)
                assert (await client.closed())[0] == close


async def test_bug_in_an_answer_is_1011(monkeypatch: pytest.MonkeyPatch) -> None:
    async def bug(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    monkeypatch.setattr(Reception, "_handle", bug)
    async with in_memory(make_app()) as dial:
        bystander = await dial().upgrade()
        client = await dial().upgrade()
        with structlog.testing.capture_logs() as logs:
            await client.say("refresh_sectors")
            assert await client.closed() == (Close.INTERNAL_ERROR, "internal error")
            await client.leave()
            await wait_all_tasks_blocked()
        assert "connection ended by a bug" in [each["event"] for each in logs]
        await bystander.pings()


async def test_bug_in_authentication_is_1011() -> None:
    class Broken:
        async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
            await trio.lowlevel.checkpoint()
            raise KeyError(endpoint)

    app = create_app(make_settings(NO_REDIS), auth=dict.fromkeys(Endpoint, Broken()))
    async with in_memory(app) as dial:
        with structlog.testing.capture_logs() as logs:
            client = await dial().upgrade()
            assert await client.closed() == (Close.INTERNAL_ERROR, "internal error")
        assert "admission failed by a bug" in [each["event"] for each in logs]
        await client.leave()
    assert app.parts.counts.rejected == {"internal_error": 1}


async def test_authentication_must_end_within_the_accept_timeout(autojump_clock: MockClock) -> None:
    class Forever:
        async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
            await trio.sleep_forever()
            raise AssertionError

    app = create_app(make_settings(NO_REDIS), auth=dict.fromkeys(Endpoint, Forever()))
    async with in_memory(app) as dial:
        client = await dial().upgrade()
        code, _ = await client.closed()
        assert (code, trio.current_time()) == (Close.SERVER_OVERLOADED, 5)


# Disconnects


@pytest.mark.parametrize(
    ("payload", "code", "reason"),
    [
        (close_payload(1000), 1000, ""),
        (close_payload(1001, "tab closed"), 1001, "tab closed"),
        (close_payload(3000, "zu"), 3000, "zu"),
        (close_payload(4999), 4999, ""),
        (b"", Close.NO_STATUS, ""),
    ],
)
async def test_clients_own_code_is_answered_logged_and_counted(
    payload: bytes, code: int, reason: str
) -> None:
    app = make_app()
    async with in_memory(app) as dial:
        client = await dial().upgrade()
        with structlog.testing.capture_logs() as logs:
            await client.send(client_frame(CLOSE, payload))
            assert await client.frame() == (CLOSE, payload)
            assert await client.rest() == b""
            await client.leave()
            await wait_all_tasks_blocked()
    assert app.parts.hub.closed == {code: 1}
    assert not app.parts.hub.closed_by_gateway
    (closed,) = (each for each in logs if each["event"] == "closed")
    assert (closed["code"], closed["reason"]) == (code, reason)


@pytest.mark.parametrize("code", [Close.INTERNAL_ERROR, Close.SLOW_CONSUMER, 1001])
async def test_close_code_of_a_client_is_not_counted_as_ours(code: int) -> None:
    name = "connections_closed_by_gateway_total"
    async with serving() as gateway, dialled(gateway.port) as client:
        await client.upgrade()
        await client.send(client_frame(CLOSE, close_payload(code)))
        await client.rest()
        await until(lambda: gateway.app.parts.hub.closed)
        found = await metrics(gateway.port)
        assert found[f"connections_closed_total{{{int(code)}}}"] == 1
        assert set(found.by_label(name).values()) == {0}

        async with dialled(gateway.port) as other:
            await other.upgrade()
            await other.send(client_frame(BINARY, b"x"))
            assert (await other.closed())[0] == Close.UNSUPPORTED_DATA
        await until(lambda: gateway.app.parts.hub.closed.total() == 2)
        found = await metrics(gateway.port)
        assert found[f"{name}{{1003}}"] == found["connections_closed_total{1003}"] == 1


TRANSPORTS = {
    "direct": b"",
    "second request": b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n",
    "event stream": b"GET /ws/waiter/events HTTP/1.1\r\nHost: a\r\n\r\n",
}


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have other options")
@pytest.mark.parametrize("write_timeout", [10, 60])
async def test_kernel_detects_vanished_clients(
    monkeypatch: pytest.MonkeyPatch, write_timeout: float
) -> None:
    """On every transport: unacknowledged data or silence ends the connection within a minute."""
    sockets: list[Any] = []
    accept = Listener.accept

    async def remembering(listener: Listener) -> trio.SocketStream:
        stream = await accept(listener)
        sockets.append(stream.socket)
        return stream

    monkeypatch.setattr(Listener, "accept", remembering)
    async with serving(ws_write_timeout=write_timeout) as gateway, AsyncExitStack() as stack:
        for first in TRANSPORTS.values():
            client = await stack.enter_async_context(dialled(gateway.port))
            await client.send(first)
            if not first.startswith(b"GET /ws/waiter/events"):
                if first:
                    await client.response()
                await client.upgrade()
        await until(lambda: len(gateway.app.parts.hub) == len(TRANSPORTS))
        assert len(sockets) >= len(TRANSPORTS)
        for sock in sockets:
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            idle, interval, count, unacknowledged = (
                sock.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            )  # fmt: skip
            assert idle + interval * count <= 60
            # Not before the write timeout, which closes it with its code.
            assert write_timeout * 1000 < unacknowledged <= max(30, 2 * write_timeout) * 1000
            assert gateway.app.settings.ws_ping_interval + 30 <= 60


async def test_half_closed_client_counts_as_disconnected() -> None:
    app = make_app()
    async with in_memory(app) as dial:
        client = await dial().upgrade()
        await client.say("ping")
        await client.half_close()

        assert await client.text() == PONG_TEXT
        assert await client.rest() == b""
    assert app.parts.hub.closed == {Close.ABNORMAL: 1}


@pytest.mark.parametrize("goes", [Client.leave, Client.reset])
async def test_client_that_vanishes_is_counted_as_1006(goes: Callable[[Client], Any]) -> None:
    async with serving() as gateway, bystanding(gateway.port), dialled(gateway.port) as client:
        await client.upgrade()
        await client.pings()
        await goes(client)
        await until(lambda: gateway.app.parts.hub.closed[Close.ABNORMAL])
        assert len(gateway.app.parts.hub) == 1


async def test_client_that_never_answers_a_close_is_disconnected(autojump_clock: MockClock) -> None:
    app = make_app()
    async with in_memory(app) as dial:
        client = await dial().upgrade()
        await client.send(client_frame(BINARY, b"x"))
        await client.closed()
        started = trio.current_time()
        await app.parts.hub.wait_empty()
        assert trio.current_time() - started == LINGER


# Isolation of the bytes of clients


async def test_no_client_gets_the_bytes_of_another() -> None:
    """Two hundred clients connect in turn, and each reuses the descriptor of the last one."""
    stable, churning = range(1, 4), range(100, 300)
    foreign: list[str] = []
    heard = dict.fromkeys(stable, 0)
    auth = dict.fromkeys(Endpoint, BySession())

    async with serving(auth) as gateway, trio.open_nursery() as nursery:
        app, live, known = gateway.app, set(stable), set[Connection]()

        async def feed() -> None:
            while True:
                for session in [*live]:
                    app.parts.pubsub_queue.offer(
                        make_event("CART_SYNC", session_id=session, data=f"marker {session};")
                    )
                known.update(app.parts.hub.connections)
                for connection in [*known]:  # also to disconnected ones
                    session = connection.principal.session or 0
                    connection.send(f"marker {session};".encode())
                await trio.sleep(0)

        def check(session: int, text: str) -> None:
            if f"marker {session};" not in text:
                foreign.append(f"{session} got {text}")

        async def stay(session: int, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
            async with dialled(gateway.port) as client:
                await client.upgrade(f"/ws/diner?table_token={session}")
                task_status.started()
                while True:
                    check(session, await client.text())
                    heard[session] += 1

        async def advance(sessions: range) -> None:
            ways = [Client.leave, Client.reset, Client.half_close]
            for session in sessions:
                async with dialled(gateway.port) as client:
                    await client.upgrade(f"/ws/diner?table_token={session}")
                    live.add(session)
                    check(session, await client.text())
                    await ways[session % 3](client)
                live.discard(session)

        nursery.start_soon(feed)
        for session in stable:
            await nursery.start(stay, session)
        with trio.fail_after(20):
            async with trio.open_nursery() as passing:
                for n in range(4):
                    passing.start_soon(advance, churning[n::4])
        nursery.cancel_scope.cancel()

    assert foreign == []
    assert min(heard.values()) > 50


async def test_closed_socket_writes_to_no_other_client() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    client = await trio.open_tcp_stream(*listener.socket.getsockname())
    served = DirectSocket(await listener.accept(), b"", 1)
    number = served._stream.socket.fileno()  # type: ignore[attr-defined]
    assert served.try_write(b"hers") == 4

    await served._stream.aclose()
    await listener.aclose()
    await client.aclose()
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(fileno=os.dup2(ours.fileno(), number)):
        with pytest.raises(OSError):
            served.try_write(b"hers")
        served.abort()
        with pytest.raises(OSError):
            served.try_write(b"hers")
        theirs.setblocking(False)
        with pytest.raises(BlockingIOError):
            theirs.recv(10)


# Clients that do not read


def fill(app: Gateway, session: int, size: int) -> None:
    """Send this many bytes to the diners of a session."""
    for n in range(size // 50_000):
        app.parts.pubsub_queue.offer(
            make_event("CART_SYNC", session_id=session, n=n, data="x" * 50_000)
        )


async def test_client_that_stops_reading_lags_until_it_reads_again() -> None:
    auth = dict.fromkeys(Endpoint, BySession())
    async with (
        serving(auth, ws_outbox_bytes=200_000) as gateway,
        bystanding_diner(gateway, 2) as other,
        dialled(gateway.port, receive_buffer=4096) as client,
    ):
        hub = gateway.app.parts.hub
        await client.upgrade("/ws/diner?table_token=1")
        await until(lambda: len(hub) == 2)
        fill(gateway.app, 1, 8_000_000)
        await until(lambda: hub.lagging)
        fill(gateway.app, 2, 50_000)
        assert '"session_id": 2' in await other.text()

        events = 0
        with trio.fail_after(5):
            while (message := json.loads(await client.text()))["type"] != "gap":
                assert message["n"] == events  # no event is missing before the first skipped one
                events += 1

        assert events < 160
        assert not hub.lagging
        fill(gateway.app, 1, 50_000)
        assert json.loads(await client.text())["n"] == 0


@asynccontextmanager
async def bystanding_diner(gateway: Running, session: int) -> AsyncIterator[Client]:
    async with dialled(gateway.port) as client:
        yield await client.upgrade(f"/ws/diner?table_token={session}")


def is_reset(client: Client) -> bool:
    """Whether a client that does not read was reset: it would not see an end after unread data."""
    assert isinstance(client.stream, trio.SocketStream)
    poll = select.poll()
    poll.register(client.stream.socket.fileno(), 0)
    return bool(poll.poll(0))


async def test_client_that_accepts_no_byte_is_aborted_after_the_write_timeout() -> None:
    auth = dict.fromkeys(Endpoint, BySession())
    async with (
        serving(auth, ws_write_timeout=0.3, ws_outbox_bytes=50_000_000) as gateway,
        dialled(gateway.port, receive_buffer=4096) as client,
    ):
        await client.upgrade("/ws/diner?table_token=1")
        await until(lambda: len(gateway.app.parts.hub) == 1)
        fill(gateway.app, 1, 8_000_000)
        watch = Stopwatch()
        with trio.fail_after(3):
            await gateway.app.parts.hub.wait_empty()
        assert watch.elapsed > 0.25
        assert watch.net < 1
        assert gateway.app.parts.hub.closed == {Close.SLOW_CONSUMER: 1}
        await until(lambda: is_reset(client))


# Where direct writes are impossible (TLS, Windows), the writer task sends everything.


async def test_full_outbox_of_a_stream_is_4009_after_the_frame_in_progress(
    autojump_clock: MockClock,
) -> None:
    app = make_app(ws_outbox_bytes=100)
    async with in_memory(app, lockstep_stream_pair) as dial:
        client = await dial().upgrade()
        await wait_all_tasks_blocked()
        (connection,) = app.parts.hub.connections
        connection.send(b"1" * 60)
        await wait_all_tasks_blocked()  # the writer has begun to send it
        for _ in range(3):
            connection.send(b"2" * 60)
        await trio.sleep(5)

        assert await client.text() == "1" * 60
        assert await client.closed() == (Close.SLOW_CONSUMER, "too slow: outbox is full")


async def test_stuck_stream_is_aborted_after_the_write_timeout(
    autojump_clock: MockClock,
) -> None:
    app = make_app()
    async with in_memory(app, lockstep_stream_pair) as dial:
        client = await dial().upgrade()
        await wait_all_tasks_blocked()
        (connection,) = app.parts.hub.connections
        connection.send(b"unread")
        await app.parts.hub.wait_empty()
        assert trio.current_time() == 10
        await client.leave()
    assert app.parts.hub.closed == {Close.SLOW_CONSUMER: 1}


async def test_stuck_http_client_is_aborted_after_the_write_timeout(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hypercorn shields its sends without a limit."""
    async with serving(ws_write_timeout=0.2) as gateway:
        gateway.app.add_url_rule("/big", "big", lambda: "x" * 20_000_000)
        async with dialled(gateway.port, receive_buffer=4096) as client:
            await client.send(b"GET /big HTTP/1.1\r\nHost: a\r\n\r\n")
            assert (await client.stream.receive_some(15)) == b"HTTP/1.1 200 \r\n"
            await trio.sleep(0.5)
            with trio.fail_after(2):
                assert len(await client.rest()) < 10_000_000


@pytest.mark.parametrize("keep_alive", [0.1, 60])
async def test_idle_http_connection_is_closed_after_its_timeout_or_at_shutdown(
    keep_alive: float,
) -> None:
    config = Config()
    config.keep_alive_timeout = keep_alive
    async with trio.open_nursery() as nursery:
        async with serving(config=config) as gateway:
            client = await nursery.start(keep, gateway.port)
            if keep_alive < 1:
                with trio.fail_after(2):
                    assert await client.rest() == b""
            stopped = Stopwatch()
        assert stopped.net < 1  # of Hypercorn's 3 s of patience
        nursery.cancel_scope.cancel()


async def keep(port: int, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """A client that has an answer and keeps its connection for the next request."""
    async with dialled(port) as client:
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200
        task_status.started(client)
        await trio.sleep_forever()


async def test_stuck_client_of_the_asgi_transport_is_reset_after_the_write_timeout() -> None:
    auth = dict.fromkeys(Endpoint, BySession())
    async with (
        serving(auth, ws_write_timeout=0.3, ws_outbox_bytes=50_000_000) as gateway,
        dialled(gateway.port, receive_buffer=4096) as client,
    ):
        await client.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 200
        await client.upgrade("/ws/diner?table_token=1")
        await until(lambda: gateway.app.parts.hub.connections)
        fill(gateway.app, 1, 8_000_000)
        with trio.fail_after(3):
            await gateway.app.parts.hub.wait_empty()
        await until(lambda: is_reset(client))


# Shutdown


async def test_drain_closes_all_clients_at_once_with_a_retry_hint() -> None:
    async with serving() as gateway:
        async with trio.open_nursery() as nursery:
            hints: list[float] = []

            async def wait_for_it(*, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
                async with dialled(gateway.port) as client:
                    await client.upgrade()
                    task_status.started()
                    code, reason = await client.closed()
                    retry, inside, seconds = reason.split()
                    assert (code, retry, inside, seconds[-1]) == (1001, "retry", "in", "s")
                    hints.append(float(seconds[:-1]))

            for _ in range(20):
                await nursery.start(wait_for_it)
            await until(lambda: len(gateway.app.parts.hub) == 20)
            gateway.stop.set()
            stopped = Stopwatch()
        assert stopped.net < 0.5
        assert len(hints) == 20
        assert 0 <= min(hints) < max(hints) <= 2


async def test_stuck_client_delays_neither_the_others_nor_the_shutdown() -> None:
    auth = dict.fromkeys(Endpoint, BySession())
    async with trio.open_nursery() as nursery:
        async with serving(auth, ws_outbox_bytes=50_000_000) as gateway:
            stuck = await nursery.start(hold, gateway.port)
            await until(lambda: gateway.app.parts.hub.connections)
            fill(gateway.app, 1, 8_000_000)
            await until(lambda: any(c.waiting_bytes for c in gateway.app.parts.hub.connections))
            async with bystanding_diner(gateway, 2) as other:
                await other.pings()
                stopped = Stopwatch()
                gateway.stop.set()
                assert (await other.closed())[0] == Close.GOING_AWAY
                assert stopped.net < 0.5
        assert stopped.net < 3
        stuck.set()


async def hold(port: int, *, task_status: Any = trio.TASK_STATUS_IGNORED) -> None:
    """A client that reads nothing until the test ends it."""
    done = trio.Event()
    async with dialled(port, receive_buffer=4096) as client:
        await client.upgrade("/ws/diner?table_token=1")
        task_status.started(done)
        await done.wait()


async def test_while_draining_http_answers_and_upgrades_are_503() -> None:
    async with serving() as gateway, dialled(gateway.port) as kept:
        await kept.send(b"GET /ws/health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await kept.response())[0] == 200
        await gateway.app.drain()

        async with dialled(gateway.port) as client:
            assert await status_of(client, make_head()) == 503
        await kept.send(make_head())  # the ASGI transport answers the same
        assert (await kept.response())[0] == 503
        assert (await http(gateway.port, "/ws/health")).status == 200
        assert (await http(gateway.port, "/ws/health/ready")).status == 503
        found = await metrics(gateway.port)
        assert found.by_label("upgrades_refused_total") == {"503": 2}


async def test_client_whose_upgrade_ends_during_the_drain_gets_a_retry_hint() -> None:
    class Slow:
        async def authenticate(self, credential: str, endpoint: Endpoint) -> Principal:
            await app.drain()
            return make_principal(endpoint)

    app = create_app(make_settings(NO_REDIS), auth=dict.fromkeys(Endpoint, Slow()))
    async with in_memory(app) as dial:
        client = await dial().upgrade()
        with trio.fail_after(2):
            code, reason = await client.closed()
        assert code == Close.GOING_AWAY
        assert re.fullmatch(r"retry in [012]\.\d+s", reason)
        await client.leave()
    assert app.parts.counts.rejected == {"draining": 1}


# TLS


@asynccontextmanager
async def serving_tls(
    tmp_path: Any, **changes: Any
) -> AsyncIterator[tuple[Running, ssl.SSLContext]]:
    config = Config()
    trusting = with_certificate(config, tmp_path)
    auth = dict.fromkeys(Endpoint, BySession())
    async with serving(auth, config, **changes) as gateway:
        yield gateway, trusting


async def test_upgrade_events_and_codes_go_through_tls(tmp_path: Any) -> None:
    async with serving_tls(tmp_path, ws_message_rate_limit=20) as (gateway, trusting):
        url = f"wss://localhost:{gateway.port}/ws/diner?table_token=1"
        async with connect(url, ssl_context=trusting) as client:
            await client.send_message("ping")
            assert await client.get_message() == PONG_TEXT
            payload = make_event("CART_SYNC", session_id=1, data="x" * 50_000)
            for _ in range(10):
                gateway.app.parts.pubsub_queue.offer(payload)
            for _ in range(10):
                assert await client.get_message() == payload.payload.decode()
            for _ in range(30):
                await client.send_message("ping")
            assert await closed(client) == (Close.RATE_LIMITED, "too many messages")
        async with connect(url, ssl_context=trusting) as client:
            await client.send_message(b"binary")
            assert (await closed(client))[0] == Close.UNSUPPORTED_DATA


async def test_plain_bytes_on_the_tls_port_affect_no_client(tmp_path: Any) -> None:
    async with serving_tls(tmp_path) as (gateway, trusting):
        async with dialled(gateway.port) as client:
            await client.send(make_head())
            await client.rest()
        async with connect(
            f"wss://localhost:{gateway.port}/ws/diner?table_token=1", ssl_context=trusting
        ) as client:
            await client.send_message("ping")
            assert await client.get_message() == PONG_TEXT


# Another client library


async def test_another_client_library_is_served() -> None:
    """``websockets`` waits until the gateway ends the connection."""
    auth = dict.fromkeys(Endpoint, BySession())
    async with serving(auth) as gateway:
        url = f"{gateway.url}/ws/diner?table_token=1"
        event = make_event("CART_SYNC", session_id=1, data="ñandú")

        def use() -> tuple[int, str]:
            with websockets.sync.client.connect(
                url,
                subprotocols=[Subprotocol("gateway.v1")],
                proxy=None,
            ) as client:
                assert client.subprotocol == "gateway.v1"
                assert client.response is not None
                assert "Sec-WebSocket-Extensions" not in client.response.headers
                client.send(["fragmented ", "text"])
                assert client.ping().wait(2)
                client.send('{ "x": 1, "type" : "ping" }')
                assert client.recv(2) == PONG_TEXT
                trio.from_thread.run_sync(gateway.app.parts.pubsub_queue.offer, event)
                assert client.recv(2) == event.payload.decode()
                client.send(b"binary")
                with pytest.raises(ConnectionClosed) as closed:
                    client.recv(2)
                assert closed.value.rcvd is not None
                return closed.value.rcvd.code, closed.value.rcvd.reason

        watch = Stopwatch()
        assert await trio.to_thread.run_sync(use) == (1003, "binary frames are not supported")
        assert watch.net < 1


# Without the direct transport, and with another app


async def test_asgi_transport_serves_everything_when_the_direct_one_is_not_installed() -> None:
    made = make_settings(NO_REDIS)
    auth = dict.fromkeys(Endpoint, BySession())
    async with running(made, auth=auth, wait_ready=False, transport="asgi") as gateway:
        assert vars(hypercorn.trio.run)["TCPServer"] is TCPServer
        for endpoint in Endpoint:
            async with dialled(gateway.port) as client:
                await client.upgrade(f"{endpoint.path}?token=1&table_token=1")
                await client.say("ping")
                assert await client.text() == PONG_TEXT
                event = make_event("CART_SYNC", session_id=1, n=endpoint.label)
                gateway.app.parts.pubsub_queue.offer(event)
                assert await client.text() == event.payload.decode()
        assert (await http(gateway.port, "/ws/health")).status == 200


async def test_requests_of_another_app_go_to_hypercorn() -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await receive()
        await send({"type": "http.response.start", "status": 204, "headers": []})
        await send({"type": "http.response.body", "body": b""})

    async with in_memory(other) as dial:  # type: ignore[arg-type]
        client = dial()
        await client.send(b"GET /ws/waiter HTTP/1.1\r\nHost: a\r\n\r\n")
        assert (await client.response())[0] == 204


BODY_FOLLOWS = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999\r\n\r\n"


@pytest.mark.parametrize("answers", [True, False], ids=["refuses", "only ends"])
async def test_app_that_does_not_take_the_body_ends_the_connection(
    autojump_clock: MockClock, answers: bool
) -> None:
    async def other(scope: Any, receive: Any, send: Any) -> None:
        await trio.sleep(1)  # in which more comes than waits for it
        if answers:
            await send({"type": "http.response.start", "status": 503, "headers": []})
            await send({"type": "http.response.body", "body": b""})

    async with in_memory(other) as dial, trio.open_nursery() as nursery:  # type: ignore[arg-type]
        client = dial()

        async def send() -> None:
            await client.send(BODY_FOLLOWS)
            for _ in range(100):
                await client.send(bytes(65_536))
            await client.stream.send_eof()

        nursery.start_soon(send)
        with trio.fail_after(5):
            assert (await client.response())[0] == (503 if answers else 500)
            await client.rest()


@pytest.mark.parametrize("sent", [0, 9, 10])
async def test_response_before_the_end_of_the_request_says_that_the_connection_closes(
    autojump_clock: MockClock, sent: int
) -> None:
    """Otherwise a client may send its next request there, which nobody would answer."""
    head = b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 10\r\n\r\n"
    async with in_memory(make_app()) as dial:
        client = dial()
        await client.send(head + bytes(sent))
        closes = await client.contains(b"\r\nconnection: close\r\n") if sent < 10 else False
        assert (await client.response())[0] == 404
        if not closes:
            await client.send(head + bytes(10))
            assert (await client.response())[0] == 404
        assert closes == (sent < 10)


@pytest.mark.parametrize(("pause", "ends_after"), [(0.5, 10.0), (3.0, 1.0)])
async def test_rest_of_a_refused_request_is_read_while_it_comes_and_for_ten_seconds(
    autojump_clock: MockClock, pause: float, ends_after: float
) -> None:
    async with in_memory(make_app()) as dial:
        client = dial()
        await client.send(BODY_FOLLOWS)
        assert (await client.response())[0] == 404
        with suppress(trio.BrokenResourceError):
            while trio.current_time() < 60:
                await client.send(bytes(1000))
                await trio.sleep(pause)
        assert ends_after <= trio.current_time() <= ends_after + pause + LINGER


def strings_within(root: object) -> list[int]:
    """The sizes of all strings and bytes that are reachable from here, except through the app."""
    seen: set[int] = set()
    found: list[int] = []
    todo = [root]
    while todo:
        each = todo.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType, Gateway, FunctionType)):
            continue
        seen.add(id(each))
        if isinstance(each, (str, bytes, bytearray)):
            found.append(len(each))
        todo += gc.get_referents(each)
    return found


@pytest.mark.parametrize("compressed", [False, True])
async def test_connection_keeps_no_reference_to_its_head(compressed: bool) -> None:
    def serving_task() -> object:
        root = trio.lowlevel.current_root_task()
        todo, found = [root], []
        while todo:
            task = todo.pop()
            assert task is not None
            todo += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
            if "_run_handler" in task.name:
                found.append(task.coro)
        (coro,) = found
        return coro

    long = "x" * 6000
    behind = client_frame(TEXT, "y" * 40_000) + client_frame(TEXT, "ping")
    extension = "Sec-WebSocket-Extensions: permessage-deflate" if compressed else "X-No: y"
    async with serving(ws_compression=compressed) as gateway, dialled(gateway.port) as client:
        await client.upgrade(
            f"/ws/waiter?token={long}", f"Cookie: {long}", extension, behind=behind
        )
        assert await client.text() == PONG_TEXT
        await wait_all_tasks_blocked()
        assert max(strings_within(serving_task())) < len(long)


async def test_silent_sockets_do_not_delay_the_shutdown() -> None:
    async with AsyncExitStack() as stack:
        async with serving(ws_accept_timeout=5) as gateway:
            for _ in range(3):
                await stack.enter_async_context(dialled(gateway.port))
            await until(lambda: gateway.app.parts.handshakes == 3)
            watch = Stopwatch()
            gateway.stop.set()
        assert watch.net < 2
