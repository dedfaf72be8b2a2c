"""Short frames are read without wsproto, with the same result."""

import os
import socket
import struct
import sys
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import trio
from hypothesis import example, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked
from wsproto.connection import Connection, ConnectionType

from trio_gateway.core.close_codes import Close
from trio_gateway.runtime.socket import Disconnected, Ping, Pong, ProtocolViolation
from trio_gateway.transports.direct import DirectSocket

MOST = 300  # bytes of a message


def client_frame(first: int, payload: bytes, key: bytes = b"\x01\xff\x00\x80") -> bytes:
    """A frame as a client sends it; ``first`` is its first byte."""
    size = len(payload)
    length = bytes([0x80 | size]) if size < 126 else b"\xfe" + size.to_bytes(2, "big")
    masked = bytes(byte ^ key[i % 4] for i, byte in enumerate(payload))
    return bytes([first]) + length + key + masked


class Pieces(trio.abc.Stream):
    """A stream that yields some pieces and then ends."""

    def __init__(self, pieces: list[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""

    async def send_all(self, data: Any) -> None:
        raise AssertionError

    async def wait_send_all_might_not_block(self) -> None:
        raise AssertionError

    async def aclose(self) -> None:
        raise AssertionError


async def read_all(pieces: list[bytes], *, by_wsproto: bool) -> list[object]:
    """The messages of a client, and how it ends."""
    sock = DirectSocket(Pieces(pieces[1:]), b"" if by_wsproto else pieces[0], MOST)
    if by_wsproto:
        sock._websocket = Connection(ConnectionType.SERVER, trailing_data=pieces[0])
    received: list[object] = []
    while True:
        try:
            each = await sock.receive()
        except Disconnected as left:
            return [*received, ("left", left.code, left.reason)]
        except ProtocolViolation as violation:
            return [*received, ("violation", violation.close, violation.reason)]
        received.append("pong" if isinstance(each, Pong) else each)


frames = st.builds(
    client_frame,
    st.sampled_from([0x81, 0x89, 0x8A, 0x01, 0x80, 0x00, 0x82, 0x88, 0xC1, 0x83]),
    st.one_of(
        st.text(max_size=40).map(str.encode),
        st.binary(max_size=130),
        st.sampled_from([b"", b"x" * 125, b"x" * 126, b"x" * 301, b"\x03\xe8bye", b"\xff"]),
    ),
    st.binary(min_size=4, max_size=4),
)


@given(
    st.one_of(st.lists(frames, min_size=1, max_size=6).map(b"".join), st.binary(max_size=40)),
    st.lists(st.integers(0, 400), max_size=4),
)
@example(client_frame(0x81, b"ping") * 3, [7])
@example(client_frame(0x81, "ñ".encode()[:1]), [])
@example(b"\x81\x04ping", [])  # not masked
@settings(deadline=None)
def test_short_frames_are_read_as_by_wsproto(data: bytes, cuts: list[int]) -> None:
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    pieces = [data[a:b] for a, b in pairwise(edges)]

    async def both() -> tuple[list[object], list[object]]:
        return (
            await read_all(pieces, by_wsproto=False),
            await read_all(pieces, by_wsproto=True),
        )

    ours, wsprotos = trio.run(both)
    assert ours == wsprotos


async def test_short_frames_are_read_without_wsproto() -> None:
    received = [client_frame(0x81, b"ping"), client_frame(0x89, b"?"), client_frame(0x8A, b"")]
    sock = DirectSocket(Pieces([b"".join(received)]), b"", MOST)

    assert await sock.receive() == "ping"
    assert await sock.receive() == Ping(b"?")
    assert isinstance(await sock.receive(), Pong)
    assert sock._websocket is None


async def test_short_message_over_the_limit_is_too_big() -> None:
    sock = DirectSocket(Pieces([client_frame(0x81, b"x" * 11)]), b"", 10)

    with pytest.raises(ProtocolViolation) as violation:
        await sock.receive()

    assert violation.value.close is Close.MESSAGE_TOO_BIG


async def test_first_message_that_has_come_is_read_without_waiting() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            sock = DirectSocket(stream, b"", MOST)
            theirs.send(client_frame(0x81, b"first"))
            with pytest.raises(StopIteration) as ended:
                sock.receive().__await__().send(None)
            assert ended.value.value == "first"

            theirs.send(client_frame(0x81, b"second"))  # others have their turn before it
            assert await sock.receive() == "second"

            await stream.aclose()
            with pytest.raises(Disconnected):
                await sock.receive()


async def test_socket_closed_elsewhere_counts_as_disconnected() -> None:
    listener = (await trio.open_tcp_listeners(0, host="127.0.0.1"))[0]
    client = await trio.open_tcp_stream(*listener.socket.getsockname())
    served = DirectSocket(stream := await listener.accept(), b"", MOST)
    number = stream.socket.fileno()

    await stream.aclose()
    await listener.aclose()
    await client.aclose()
    ours, theirs = socket.socketpair()
    with ours, theirs, socket.socket(fileno=os.dup2(ours.fileno(), number)):
        theirs.send(
            client_frame(0x81, b"hers")
        )  # to the next client, which has the same descriptor number
        with pytest.raises(Disconnected):
            await served.receive()


PING_TEXT = client_frame(0x81, b"ping")
GOODBYE = client_frame(0x88, b"\x03\xe8")


def _reset(client: socket.socket) -> None:
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


@pytest.mark.skipif(sys.platform != "linux", reason="others do not tell of an end behind bytes")
@pytest.mark.parametrize(
    ("goes", "has_left"),
    [
        (lambda _: None, False),
        (lambda client: client.send(PING_TEXT * 3), False),
        (lambda client: client.send(PING_TEXT + GOODBYE), True),
        (lambda client: client.send(PING_TEXT) and client.shutdown(socket.SHUT_WR), True),
        (lambda client: client.close(), True),
        (_reset, True),
    ],
    ids=["stays", "speaks", "says goodbye", "speaks and ends", "closes", "resets"],
)
@pytest.mark.parametrize("rest", [b"", PING_TEXT], ids=["nothing read", "a frame read"])
async def test_client_that_has_left_is_seen_without_reading(
    goes: Callable[[socket.socket], object], has_left: bool, rest: bytes
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        client = socket.create_connection(listener.getsockname())
        accepted, _ = listener.accept()
    with client:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(accepted)) as stream:
            served = DirectSocket(stream, rest, MOST)
            assert not served.has_left()
            goes(client)
            assert served.has_left() is has_left
            if rest:  # what was seen is read as ever
                assert await served.receive() == "ping"


async def test_goodbye_behind_the_request_head_is_seen() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        async with trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream:
            assert DirectSocket(stream, PING_TEXT + GOODBYE, MOST).has_left()
        assert DirectSocket(stream, b"", MOST).has_left()  # it was closed here


async def test_interrupt_ends_a_read_and_no_write(nursery: trio.Nursery) -> None:
    ours, theirs = socket.socketpair()
    outcomes: list[str] = []
    async with (
        trio.SocketStream(trio.socket.from_stdlib_socket(ours)) as stream,
        trio.SocketStream(trio.socket.from_stdlib_socket(theirs)) as client,
    ):
        sock = DirectSocket(stream, b"", MOST)
        data = bytes(1_000_000)

        async def read() -> None:
            with pytest.raises(Disconnected):
                await sock.receive()
            outcomes.append("interrupted")

        async def write() -> None:
            await sock.send(data, 10)
            outcomes.append("written")

        nursery.start_soon(read)
        nursery.start_soon(write)
        await wait_all_tasks_blocked()
        sock.interrupt()
        await wait_all_tasks_blocked()
        assert outcomes == ["interrupted"]
        received = 0
        while received < len(data):
            received += len(await client.receive_some())
        await client.send_all(PING_TEXT)
        assert await sock.receive() == "ping"
        assert outcomes == ["interrupted", "written"]
    sock.interrupt()  # it is closed by now
