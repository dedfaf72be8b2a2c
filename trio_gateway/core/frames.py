"""WebSocket frames as a server sends them: build them, and find them again in joined ones.

A server's frames are unmasked, and each of ours is a whole message (RFC 6455, 5.2). What a client
sends is read in :mod:`.client_frames`.
"""

import zlib
from collections.abc import Iterator
from enum import IntEnum
from struct import Struct
from typing import Final


class Opcode(IntEnum):
    """What a frame is (RFC 6455, 5.2). Binary and continuation frames are never sent."""

    TEXT = 0x1
    CLOSE = 0x8
    PING = 0x9
    PONG = 0xA


TEXT: Final = Opcode.TEXT
CLOSE: Final = Opcode.CLOSE
PING: Final = Opcode.PING
PONG: Final = Opcode.PONG

_FIN: Final = 0x80
_RSV1: Final = 0x40  # the payload is compressed (RFC 7692, 6)
_OPCODE: Final = 0x0F

_SHORT: Final = Struct("!BB").pack
_MEDIUM: Final = Struct("!BBH").pack
_LONG: Final = Struct("!BBQ").pack

MAX_REASON_BYTES: Final = 123  # a control frame's 125 bytes less the code (RFC 6455, 5.5)


def frame(opcode: int, payload: bytes) -> bytes:
    """A frame with this payload, in the shortest form of its length. ``opcode`` may include RSV
    bits.
    """
    size = len(payload)
    if size < 126:
        return _SHORT(_FIN | opcode, size) + payload
    if size < 1 << 16:
        return _MEDIUM(_FIN | opcode, 126, size) + payload
    return _LONG(_FIN | opcode, 127, size) + payload


def text_frame(payload: bytes) -> bytes:
    """A text message; the payload is UTF-8."""
    return frame(TEXT, payload)


def deflated_frame(payload: bytes) -> bytes:
    """A text message that is compressed on its own (RFC 7692, 7.2.1), or plain if that is shorter.

    One frame serves all clients that support compression. Compressing takes longer than sending to
    any of them, so the fastest level is used.
    """
    compressor = zlib.compressobj(level=zlib.Z_BEST_SPEED, wbits=-zlib.MAX_WBITS)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    deflated = frame(_RSV1 | TEXT, data.removesuffix(b"\x00\x00\xff\xff"))
    return min(deflated, text_frame(payload), key=len)


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame. A reason of more than :data:`MAX_REASON_BYTES` is cut between characters."""
    kept = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
    return frame(CLOSE, code.to_bytes(2, "big") + kept)


PING_FRAME: Final = frame(PING, b"")


def split(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The opcode and the payload of each frame in whole frames that are joined.

    RSV1 is not returned, so the frames must not be compressed: frames of :func:`deflated_frame`
    go only to the direct transport, which does not split them.
    """
    view, start = memoryview(data), 0
    while start < len(view):
        body, end = _bounds(view, start)
        yield view[start] & _OPCODE, view[body:end]
        start = end


def boundary(data: bytes | memoryview, offset: int) -> int:
    """The first end of a frame, in whole frames that are joined, that is not before ``offset``.

    Compressed frames may be among them.
    """
    view, end = memoryview(data), 0
    while end < offset:
        _, end = _bounds(view, end)
    return end


def _bounds(view: memoryview, start: int) -> tuple[int, int]:
    """Where the payload of the frame at ``start`` begins and ends."""
    size = view[start + 1]
    if size < 126:
        return start + 2, start + 2 + size
    width = 2 if size == 126 else 8
    body = start + 2 + width
    return body, body + int.from_bytes(view[start + 2 : body], "big")
