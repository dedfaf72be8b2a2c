"""Read the head of a connection's first HTTP request, bounded in size."""

import re
from dataclasses import dataclass
from typing import Final, NamedTuple

import trio

from .direct import CHUNK, receive, receive_nowait
from .handshake import MAX_HEAD_BYTES, Refusal

_FIRST: Final = 4096  # bytes; few heads are longer, and a buffer costs
_END: Final = re.compile(rb"\n\r?\n")


class Head(NamedTuple):
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

    __slots__ = ("_data", "_stream")

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._data = bytearray()

    @property
    def begun(self) -> bool:
        return bool(self._data)

    def read_nowait(self) -> Head | Refusal | Nobody | None:
        """Read what is there; return None if that is not a complete head.

        A client that was just accepted has mostly sent its request already. Raises as
        :meth:`read`.
        """
        received = receive_nowait(self._stream, _FIRST)
        return None if received is None else self._take(received)

    async def read(self) -> Head | Refusal | Nobody:
        """Read until the head is complete, and maybe beyond.

        Returns the refusal if it is too long or incomplete. Raises :exc:`OSError` or one of
        :data:`trio_gateway.transports.direct.STREAM_ERRORS`.
        """
        found = self.read_nowait()
        while found is None:
            found = self._take(await receive(self._stream, CHUNK))
        return found

    def _take(self, received: bytes) -> Head | Refusal | Nobody | None:
        data = self._data
        if not data and (end := _END.search(received)):  # all at once, as mostly
            return _head(received, end.end())
        if not received:
            return Refusal(400, "incomplete request") if data else Nobody()
        # The empty line may begin in what was received before.
        start = max(0, len(data) - 3)
        data += received
        if end := _END.search(data, start):
            return _head(bytes(data), end.end())
        return _too_long() if len(data) > MAX_HEAD_BYTES else None


def _head(data: bytes, end: int) -> Head | Refusal:
    return _too_long() if end > MAX_HEAD_BYTES else Head(data[:end], data[end:])


def _too_long() -> Refusal:
    return Refusal(431, f"request head is over {MAX_HEAD_BYTES} bytes")
