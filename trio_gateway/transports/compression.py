"""permessage-deflate (RFC 7692) on the direct transport, if WS_COMPRESSION is set."""

import zlib
from typing import Any, NamedTuple

from wsproto.extensions import PerMessageDeflate
from wsproto.frame_protocol import CloseReason, Opcode, RsvBits

_MAX_WINDOW = 15  # bits
_RSV1 = RsvBits(rsv1=True, rsv2=False, rsv3=False)
_LAST_BYTES = (
    b"\x00\x00\xff\xff"  # of a compressed message; the sender omits them (RFC 7692, 7.2.1)
)


class Inflation(PerMessageDeflate):
    """Reads compressed messages. One that inflates to more than ``max_size`` bytes is an error.

    Control frames between the fragments of a message are not part of it (RFC 6455, 5.4); wsproto's
    own extension takes them for its end.
    """

    def __init__(self, max_size: int) -> None:
        super().__init__(client_no_context_takeover=True, server_no_context_takeover=True)
        self._max_size = max_size
        self._in_message = self._in_control = self._compressed = False
        self._room = 0  # bytes by which the message may still grow
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
            self._inflater = zlib.decompressobj(-_MAX_WINDOW) if rsv.rsv1 else None
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


class Negotiated(NamedTuple):
    """The extension that reads compressed messages, and the header that accepts it."""

    extension: Inflation
    answer: str


def negotiate(offers: str, max_size: int = 65_536) -> Negotiated | None:
    """Accept the first acceptable offer in ``Sec-WebSocket-Extensions``; None if there is none.

    We compress an event once for all clients: on its own and with the largest window. So messages
    do not refer to earlier ones (no context takeover), and an offer that demands a smaller window
    is not accepted. A client's message may inflate to ``max_size`` bytes.
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
        if parameters and extension.server_max_window_bits == _MAX_WINDOW:
            return Negotiated(extension, f"{name}; {parameters}")
    return None
