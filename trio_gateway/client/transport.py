"""The transport: the client side of one WebSocket on a Trio stream (RFC 6455)."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final

import trio
from wsproto import ConnectionType, WSConnection
from wsproto import events as ws
from wsproto.utilities import LocalProtocolError, RemoteProtocolError

from ..core.close_codes import Close
from .policy import retry_after

MAX_MESSAGE: Final = 1 << 20  # characters; an event has at most 65,536 bytes and an id


class Ended(Exception):  # noqa: N818 - an outcome
    """The WebSocket has ended with this close code; 1006 without a close frame."""

    def __init__(self, code: int = Close.ABNORMAL, reason: str = "") -> None:
        super().__init__(f"{code} {reason}".rstrip())
        self.code = code
        self.reason = reason


class NoUpgrade(Exception):  # noqa: N818 - an outcome
    """The server refused the upgrade with an HTTP status; None if its answer was not HTTP.

    ``retry_after`` is the value of that header, in seconds.
    """

    def __init__(self, status: int | None, retry_after: float | None = None) -> None:
        super().__init__("no HTTP" if status is None else f"HTTP {status}")
        self.status = status
        self.retry_after = retry_after


class WebSocket:
    """A WebSocket. One task may receive while others send.

    After a cancelled send or receive the stream must not be used again. ``on_data`` is called
    whenever bytes have arrived, even if they are half a message.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self.on_data: Callable[[], None] | None = None
        self._ws = WSConnection(ConnectionType.CLIENT)
        self._sending = trio.Lock()  # wsproto's output must be sent in its order

    async def upgrade(self, host: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Request the upgrade. Raises :exc:`NoUpgrade` or :exc:`Ended`."""
        await self._send(ws.Request(host=host, target=target, extra_headers=list(headers)))
        try:
            while True:
                for event in self._ws.events():
                    match event:
                        case ws.AcceptConnection():
                            return
                        case ws.RejectConnection(status_code=status, headers=answered):
                            found = {
                                name.lower(): value.decode("latin-1") for name, value in answered
                            }
                            wait = retry_after(
                                found.get(b"retry-after", ""), found.get(b"date", "")
                            )
                            raise NoUpgrade(status, wait)
                await self._receive_data()
        except RemoteProtocolError:
            raise NoUpgrade(None) from None

    async def receive(self) -> str:
        """Return the next text message, and answer pings meanwhile. Raises :exc:`Ended`."""
        text = ""
        while True:
            for event in self._ws.events():
                match event:
                    case ws.TextMessage(data=data, message_finished=finished):
                        text += data
                        if len(text) > MAX_MESSAGE:
                            raise Ended(Close.MESSAGE_TOO_BIG, "message too big")
                        if finished:
                            return text
                    case ws.Ping():
                        await self._send(event.response())
                    case ws.CloseConnection(code=code, reason=reason):
                        with suppress(Ended):  # the code of the received close frame counts
                            await self._send(event.response())
                        raise Ended(code, reason or "")
            try:
                await self._receive_data()
            except RemoteProtocolError:
                raise Ended(reason="invalid frames") from None

    async def send(self, text: str) -> None:
        """Send a text message. Raises :exc:`Ended`."""
        await self._send(ws.TextMessage(data=text))

    async def close(self) -> None:
        """Close with 1000, and read until the other side has answered."""
        with suppress(Ended):
            await self._send(ws.CloseConnection(code=Close.NORMAL))
            while True:
                await self.receive()

    async def _send(self, event: ws.Event) -> None:
        async with self._sending:
            try:
                await self._stream.send_all(self._ws.send(event))
            except (trio.BrokenResourceError, trio.ClosedResourceError, LocalProtocolError):
                raise Ended from None

    async def _receive_data(self) -> None:
        try:
            data = await self._stream.receive_some()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise Ended from None
        if not data:
            raise Ended
        if self.on_data is not None:
            self.on_data()
        self._ws.receive_data(bytes(data))
