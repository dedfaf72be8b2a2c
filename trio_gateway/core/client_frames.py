"""Read the frames that nearly all clients send: short, whole and masked (RFC 6455, 5.3)."""

from typing import Final

from .frames import CLOSE, PING, PONG, TEXT

_MAX_PAYLOAD: Final = 125  # bytes of the shortest form of a length
_HEAD: Final = 6  # bytes: two, and the mask
_FIN: Final = 0x80
_MASKED: Final = 0x80
_CLOSE: Final = bytes([_FIN | CLOSE])
_OPCODES: Final = {_FIN | opcode: opcode for opcode in (TEXT, PING, PONG)}


def is_closing(data: bytes) -> bool:
    """Whether a close frame is among the short frames at the beginning."""
    start = 0
    while (found := short_frame(data[start:])) is not None:
        start += found[2]
    return data[start : start + 1] == _CLOSE


def short_frame(data: bytes) -> tuple[int, bytes, int] | None:
    """The opcode and the unmasked payload of the frame at the beginning, and where it ends.

    None unless it is a text, ping or pong frame that is final, masked, complete, without RSV bits
    and of at most 125 bytes.
    """
    if len(data) < _HEAD or (opcode := _OPCODES.get(data[0])) is None:
        return None
    size = data[1] - _MASKED
    end = _HEAD + size
    if not 0 <= size <= _MAX_PAYLOAD or len(data) < end:
        return None
    # The mask repeated over the payload, as one number.
    key = int.from_bytes(data[2:_HEAD] * (size // 4 + 1), "little") & ((1 << 8 * size) - 1)
    payload = int.from_bytes(data[_HEAD:end], "little") ^ key
    return opcode, payload.to_bytes(size, "little"), end
