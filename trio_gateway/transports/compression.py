"""Compression (RFC 7692): agreed to on the line with who offers it, if WS_COMPRESSION says so."""

import zlib
from typing import Any, NamedTuple

from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, Opcode, RsvBits

_WHOLE_WINDOW = 15  # bits
_RSV1 = RsvBits(rsv1=True, rsv2=False, rsv3=False)
_LAST_BYTES = b"\x00\x00\xff\xff"  # of a message, which the sender leaves out (RFC 7692, 7.2.1)


class Inflation(PerMessageDeflate):
    """Reads compressed messages, of which none becomes larger than ``max_size`` bytes.

    Control frames between the fragments of a message are not part of it (RFC 6455, 5.4); in
    wsproto's own they end it.
    """

    def __init__(self, max_size: int) -> None:
        super().__init__(client_no_context_takeover=True, server_no_context_takeover=True)
        self._max_size = max_size
        self._in_message = self._in_control = self._compressed = False
        self._room = 0  # bytes that the message may still become
        self._inflater: Any = None

    def frame_inbound_header(
        self, proto: Any, opcode: Opcode, rsv: RsvBits, payload_length: int
    ) -> CloseReason | RsvBits:
        self._in_control = opcode.iscontrol()
        begins = not self._in_control and opcode is not Opcode.CONTINUATION
        if rsv.rsv1 and not begins:
            return CloseReason.PROTOCOL_ERROR
        if begins and not self._in_message:
            self._in_message, self._compressed, self._room = True, rsv.rsv1, self._max_size
            self._inflater = zlib.decompressobj(-_WHOLE_WINDOW) if rsv.rsv1 else None
        return _RSV1

    def frame_inbound_payload_data(self, proto: Any, data: bytes) -> bytes | CloseReason:
        if self._in_control or not self._compressed:
            return data
        return self._inflate(bytes(data))

    def frame_inbound_complete(self, proto: Any, fin: bool) -> bytes | CloseReason | None:
        if self._in_control or not fin:
            return None
        rest = self._inflate(_LAST_BYTES) if self._compressed else None
        self._in_message = self._compressed = False
        self._inflater = None
        return rest

    def _inflate(self, data: bytes) -> bytes | CloseReason:
        try:
            inflated: bytes = self._inflater.decompress(data, self._room + 1)
        except zlib.error:
            return CloseReason.INVALID_FRAME_PAYLOAD_DATA
        self._room -= len(inflated)
        return CloseReason.MESSAGE_TOO_BIG if self._room < 0 else inflated


class Agreed(NamedTuple):
    """What reads compressed messages, and the header that says what was agreed to."""

    extension: Inflation
    answer: str


def agree(offers: str, max_size: int = 65_536) -> Agreed | None:
    """The first of a client's offers (``Sec-WebSocket-Extensions``) that we can live with.

    A message is compressed once, on its own and with the whole window, for everybody: no message
    refers to one before it, and who insists on a smaller window gets plain ones. A client's
    message may inflate to ``max_size`` bytes.
    """
    for offer in offers.split(","):
        name = offer.partition(";")[0].strip().lower()
        if name != PerMessageDeflate.name:
            continue
        extension = Inflation(max_size)
        try:
            parameters = extension.accept(offer)
        except ValueError:
            continue
        if parameters and extension.server_max_window_bits == _WHOLE_WINDOW:
            return Agreed(extension, f"{name}; {parameters}")
    return None
