"""Short frames of clients; that they mean what wsproto reads is in tests/transports/test_direct."""

import pytest

from tests.support.sockets import BINARY, CONTINUATION, client_frame
from trio_gateway.core.client_frames import short_frame
from trio_gateway.core.frames import CLOSE, PING, PONG, TEXT


@pytest.mark.parametrize("opcode", [TEXT, PING, PONG])
@pytest.mark.parametrize("size", [0, 1, 4, 125])
def test_short_frame_is_unmasked_and_its_end_is_found(opcode: int, size: int) -> None:
    payload = bytes(range(size))
    data = client_frame(opcode, payload)

    assert short_frame(data + b"next") == (opcode, payload, len(data))


@pytest.mark.parametrize(
    "data",
    [
        client_frame(TEXT, "x" * 126),
        client_frame(TEXT, "x", fin=False),
        client_frame(TEXT, "x", rsv=0b100),
        client_frame(TEXT, "x", masked=False),
        client_frame(TEXT, "incomplete")[:-1],
        client_frame(BINARY, "x"),
        client_frame(CONTINUATION, "x"),
        client_frame(CLOSE),
        b"\x81",
        b"",
    ],
)
def test_any_other_frame_is_left_to_wsproto(data: bytes) -> None:
    assert short_frame(data) is None
