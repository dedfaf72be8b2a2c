"""Read the head of a connection's first HTTP request, bounded in size."""

import re
from dataclasses import dataclass
from typing import Final

import trio

from .direct import CHUNK, receive
from .handshake import MAX_HEAD_BYTES, Refusal

_END: Final = re.compile(rb"\n\r?\n")


@dataclass(frozen=True, slots=True)
class Head:
    """A request head up to and with its empty line, and the bytes that were received behind it."""

    data: bytes
    rest: bytes


@dataclass(frozen=True, slots=True)
class Nobody:
    """The client sent nothing, or its TLS handshake failed: there is nobody to answer."""


class HeadReader:
    """Reads one request head from a stream.

    ``begun`` says whether any byte of it has come: a read that is cancelled by a timeout is
    answered only if one has.
    """

    __slots__ = ("_stream", "begun")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.begun = False

    async def read(self) -> Head | Refusal | Nobody:
        """Read until the head is complete, and maybe beyond.

        Returns the refusal if it is too long or incomplete. Raises :exc:`OSError` or one of
        :data:`trio_gateway.transports.direct.STREAM_ERRORS`.
        """
        data = bytearray()
        while True:
            # A client that was just accepted has mostly sent its request already.
            received = await receive(self._stream, CHUNK, at_once=not data)
            if not received:
                return Refusal(400, "incomplete request") if data else Nobody()
            self.begun = True
            # The empty line may begin in what was received before.
            start = max(0, len(data) - 3)
            data += received
            end = _END.search(data, start)
            if (end.end() if end else len(data)) > MAX_HEAD_BYTES:
                return Refusal(431, f"request head is over {MAX_HEAD_BYTES} bytes")
            if end:
                return Head(bytes(data[: end.end()]), bytes(data[end.end() :]))
