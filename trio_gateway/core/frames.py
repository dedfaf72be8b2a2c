"""A payload as a WebSocket frame, as a server sends it: unmasked and whole (RFC 6455, 5.2)."""

import zlib
from collections.abc import Iterator
from struct import Struct
from typing import Final

_FIN: Final = 0x80
_RSV1: Final = 0x40  # compressed
TEXT: Final = 0x1
CLOSE: Final = 0x8
PING: Final = 0x9
PONG: Final = 0xA

_SHORT: Final = Struct("!BB").pack
_MEDIUM: Final = Struct("!BBH").pack
_LONG: Final = Struct("!BBQ").pack

MAX_REASON_BYTES: Final = 123  # a control frame's 125 bytes less the code (RFC 6455, 5.5)


def frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    if size < 126:
        return _SHORT(_FIN | opcode, size) + payload
    if size < 1 << 16:
        return _MEDIUM(_FIN | opcode, 126, size) + payload
    return _LONG(_FIN | opcode, 127, size) + payload


def text_frame(payload: bytes) -> bytes:
    return frame(TEXT, payload)


def deflated_frame(payload: bytes) -> bytes:
    """The payload compressed on its own (RFC 7692, 7.2.1), or plain if that is no longer.

    For everybody at once, so it is worth little time: the fastest level is used.
    """
    compressor = zlib.compressobj(level=zlib.Z_BEST_SPEED, wbits=-zlib.MAX_WBITS)
    data = compressor.compress(payload) + compressor.flush(zlib.Z_SYNC_FLUSH)
    deflated = frame(_RSV1 | TEXT, data.removesuffix(b"\x00\x00\xff\xff"))
    return min(deflated, text_frame(payload), key=len)


def close_frame(code: int, reason: str = "") -> bytes:
    """A close frame; a reason that is too long is cut between characters."""
    cut = reason.encode()[:MAX_REASON_BYTES].decode(errors="ignore").encode()
    return frame(CLOSE, code.to_bytes(2, "big") + cut)


PING_FRAME: Final = frame(PING, b"")


_LONGEST_SHORT: Final = 125
_SHORT_HEAD: Final = 6  # with its mask
_SHORT_OPCODES: Final = {_FIN | opcode: opcode for opcode in (TEXT, PING, PONG)}


def short_frame(data: bytes) -> tuple[int, bytes, int] | None:
    """The opcode and the payload of the frame at the beginning, as a client sends it, and where
    it ends; None unless it is text, ping or pong, whole, of 125 bytes at most, and all there.
    """
    if len(data) < _SHORT_HEAD or (opcode := _SHORT_OPCODES.get(data[0])) is None:
        return None
    size = data[1] - 0x80  # the first bit says that it is masked, as it must be
    end = _SHORT_HEAD + size
    if not 0 <= size <= _LONGEST_SHORT or len(data) < end:
        return None
    key = int.from_bytes(data[2:_SHORT_HEAD] * (size // 4 + 1), "little") & ((1 << 8 * size) - 1)
    payload = int.from_bytes(data[_SHORT_HEAD:end], "little") ^ key
    return opcode, payload.to_bytes(size, "little"), end


def split(data: bytes | memoryview) -> Iterator[tuple[int, memoryview]]:
    """The frames in joined whole frames: opcode and payload of each."""
    view, start = memoryview(data), 0
    while start < len(view):
        body, end = _bounds(view, start)
        yield view[start] & 0x0F, view[body:end]
        start = end


def boundary(data: bytes | memoryview, offset: int) -> int:
    """Where the frame that the given offset falls into ends; an offset between two is its own."""
    view, end = memoryview(data), 0
    while end < offset:
        _, end = _bounds(view, end)
    return end


def _bounds(view: memoryview, start: int) -> tuple[int, int]:
    size = view[start + 1]
    if size < 126:
        return start + 2, start + 2 + size
    width = 2 if size == 126 else 8
    body = start + 2 + width
    return body, body + int.from_bytes(view[start + 2 : body], "big")
