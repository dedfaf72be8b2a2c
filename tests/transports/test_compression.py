"""Big events are compressed once, for the clients that negotiated it. The others get them plain."""

import tracemalloc
import zlib
from typing import Final

import pytest
import redis
import trio
from hypothesis import given
from hypothesis import strategies as st
from websockets.trio.client import connect

from tests.support.gateways import JWT_SECRET, serving
from tests.support.sockets import (
    CONTINUATION,
    PONG_TEXT,
    client_frame,
    close_payload,
    dialled,
    make_head,
)
from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT, deflated_frame, split, text_frame
from trio_gateway.testing import make_jwt, make_payload
from trio_gateway.transports.compression import negotiate


@given(st.one_of(st.binary(max_size=300), st.integers(0, 20_000).map(lambda n: b'{"a":1}' * n)))
def test_compressed_frame_inflates_to_the_payload_and_is_never_longer(payload: bytes) -> None:
    found = deflated_frame(payload)

    assert len(found) <= len(text_frame(payload))
    if found[0] == 0x81:
        assert found == text_frame(payload)
        return
    assert found[0] == 0xC1
    ((opcode, body),) = split(found)
    inflated = zlib.decompressobj(-15).decompress(bytes(body) + b"\0\0\xff\xff")
    assert (opcode, inflated) == (TEXT, payload)


_NO_CONTEXT = "permessage-deflate; client_no_context_takeover; server_no_context_takeover"


@pytest.mark.parametrize(
    ("offers", "answer"),
    [
        ("", None),
        ("x-webkit-deflate-frame", None),
        ("permessage-deflate", _NO_CONTEXT),
        ("permessage-deflate; client_max_window_bits", f"{_NO_CONTEXT}; client_max_window_bits=15"),
        ("foo, permessage-deflate", _NO_CONTEXT),
        ("permessage-deflate; server_max_window_bits=10", None),  # our window is the full one
        ("permessage-deflate; server_max_window_bits=10, permessage-deflate", _NO_CONTEXT),
        ("permessage-deflate; server_max_window_bits=x", None),
        ("permessage-deflate; client_max_window_bits=99", None),
    ],
)
def test_extension_offers_are_accepted_or_declined(offers: str, answer: str | None) -> None:
    agreed = negotiate(offers)

    assert (agreed and agreed.answer) == answer


async def test_big_events_are_compressed_only_for_clients_that_negotiated_it(
    redis_url: str,
) -> None:
    big = make_payload(data={"items": [f"plate {n}" for n in range(500)]})
    small = make_payload(data="ñ")
    async with serving(redis_url, "direct", ws_compression=True) as gateway:
        url = f"ws://127.0.0.1:{gateway.port}/ws/waiter?token={make_jwt_of('1')}"
        other = f"ws://127.0.0.1:{gateway.port}/ws/waiter?token={make_jwt_of('2')}"
        async with (
            connect(url, compression="deflate", proxy=None) as packed,
            connect(other, compression=None, proxy=None) as plain,
            dialled(gateway.port) as raw,
        ):
            offer = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"
            target = f"/ws/waiter?token={make_jwt_of('3')}"
            await raw.send(make_head(offer, request=f"GET {target} HTTP/1.1"))
            head = b""
            while b"\r\n\r\n" not in head:
                head += bytes(await raw.stream.receive_some(1))
            for client in (packed, plain):
                await client.send("ping" + " " * 3000 + "?")  # compressed if negotiated
                await client.send("ping")
                assert await client.recv() == '{"type":"pong"}'
            await raw.say("ping")
            assert await raw.text() == PONG_TEXT  # it is admitted
            backend = redis.Redis.from_url(redis_url)
            for payload in (big, small, big + b" "):
                backend.publish("channel:branch:1:waiters", payload)
            backend.close()
            for client in (packed, plain):
                events = [(await client.recv()).encode() for _ in range(3)]  # type: ignore[union-attr]
                assert events == [big, small, big + b" "]
            expected = deflated_frame(big)
            received = b""
            with trio.fail_after(3):
                while len(received) < len(expected):
                    received += bytes(await raw.stream.receive_some(len(expected)))

    assert b"sec-websocket-extensions: permessage-deflate" in head.lower()
    assert received[: len(expected)] == expected
    assert len(deflated_frame(big)) < len(big) / 3


async def test_message_that_inflates_beyond_the_limit_is_too_big(redis_url: str) -> None:
    async with serving(redis_url, "direct", ws_compression=True) as gateway:
        url = f"ws://127.0.0.1:{gateway.port}/ws/waiter?token={make_jwt_of('1')}"
        async with connect(url, compression="deflate", proxy=None) as client:
            await client.send("x" * 10_000_000)  # ten kilobytes on the wire
            with trio.fail_after(3), pytest.raises(Exception) as ended:
                await client.recv()

    assert ended.value.rcvd.code == Close.MESSAGE_TOO_BIG  # type: ignore[attr-defined]


class Raw:
    """A client that sends hand-made compressed frames."""

    OFFER: Final = "Sec-WebSocket-Extensions: permessage-deflate; client_max_window_bits"

    @staticmethod
    def deflate(data: bytes) -> bytes:
        """Compress a message on its own (RFC 7692, 7.2.1)."""
        compressor = zlib.compressobj(9, wbits=-15)
        packed = compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH)
        return packed.removesuffix(b"\x00\x00\xff\xff")


def pieces(data: bytes, count: int) -> list[bytes]:
    size = len(data) // count + 1
    return [data[at : at + size] for at in range(0, len(data), size)]


@pytest.mark.parametrize("opcode", [PING, PONG])
@pytest.mark.parametrize("with_head", [False, True])
async def test_control_frames_may_come_between_compressed_fragments(
    redis_url: str, opcode: int, with_head: bool
) -> None:
    async with (
        serving(redis_url, "direct", ws_compression=True) as gateway,
        dialled(gateway.port) as client,
    ):
        sent = b""
        for turn in range(2):  # no state of one message reaches the next
            text = b'{"type":"ping","turn":"' + str(turn).encode() + bytes(range(65, 90)) + b'"}'
            parts = pieces(Raw.deflate(text), 3)
            between = client_frame(opcode, b"between") + client_frame(opcode)
            sent += client_frame(TEXT, parts[0], fin=False, rsv=4) + between
            sent += client_frame(CONTINUATION, parts[1], fin=False) + between
            sent += client_frame(CONTINUATION, parts[2])
            sent += client_frame(TEXT, "ping")  # an uncompressed message among them
        target = f"/ws/waiter?token={make_jwt_of('1')}"
        await client.upgrade(target, Raw.OFFER, behind=sent if with_head else b"")
        if not with_head:
            await client.send(sent)
        assert [await client.text() for _ in range(4)] == [PONG_TEXT] * 4
        await client.send(client_frame(TEXT, Raw.deflate(b"ping")[:2], fin=False, rsv=4))
        await client.send(client_frame(CLOSE, close_payload(4321, "done")))
        assert (await client.closed())[0] == 4321


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        (client_frame(PING, b"x", rsv=4), Close.PROTOCOL_ERROR),
        (
            client_frame(TEXT, b"\x02", fin=False, rsv=4) + client_frame(CONTINUATION, b"", rsv=4),
            Close.PROTOCOL_ERROR,
        ),
        (client_frame(TEXT, b"\xff\xff\xff", rsv=4), Close.INVALID_DATA),
        (client_frame(CONTINUATION, b"x"), Close.PROTOCOL_ERROR),
    ],
    ids=["compressed ping", "compressed continuation", "no deflate", "no beginning"],
)
async def test_invalid_compression_is_closed_with_its_code(
    redis_url: str, frames: bytes, code: Close
) -> None:
    async with (
        serving(redis_url, "direct", ws_compression=True) as gateway,
        dialled(gateway.port) as client,
    ):
        await client.upgrade(f"/ws/waiter?token={make_jwt_of('1')}", Raw.OFFER)
        await client.send(frames)
        assert (await client.closed())[0] == code


@pytest.mark.parametrize("size", [65_536, 65_537, 50_000_000])
@pytest.mark.parametrize("fragments", [1, 3])
@pytest.mark.parametrize("with_head", [False, True])
async def test_inflated_size_is_limited_on_every_transport(
    redis_url: str, size: int, fragments: int, with_head: bool
) -> None:
    async with (
        serving(redis_url, "direct", ws_compression=True) as gateway,
        dialled(gateway.port) as client,
    ):
        parts = pieces(Raw.deflate(b"x" * size), fragments)
        sent = client_frame(TEXT, parts[0], fin=len(parts) == 1, rsv=4)
        for n, part in enumerate(parts[1:], 2):
            sent += client_frame(CONTINUATION, part, fin=n == len(parts))
        sent += client_frame(TEXT, "ping")
        target = f"/ws/waiter?token={make_jwt_of('1')}"
        tracemalloc.start()
        try:
            await client.upgrade(target, Raw.OFFER, behind=sent if with_head else b"")
            if not with_head:
                await client.send(sent)
            if size <= 65_536:
                assert await client.text() == PONG_TEXT
            else:
                assert await client.closed() == (
                    Close.MESSAGE_TOO_BIG, "message is over 65536 bytes",
                )  # fmt: skip
            assert tracemalloc.get_traced_memory()[1] < 5_000_000
        finally:
            tracemalloc.stop()


def make_jwt_of(user: str) -> str:
    return make_jwt(JWT_SECRET, sub=user)
