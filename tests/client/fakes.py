"""A gateway in memory that the test controls."""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import trio
from trio.testing import memory_stream_pair
from trio_websocket import (
    ConnectionClosed,
    WebSocketConnection,
    WebSocketRequest,
    wrap_server_stream,
)

from trio_gateway.testing import make_payload

Script = Callable[["Peer"], Awaitable[None]]


class Peer:
    """The gateway's end of one socket."""

    def __init__(
        self, socket: WebSocketConnection, received: list[Any], confirmed: list[str]
    ) -> None:
        self._socket = socket
        self.received = received  # messages of the client on all sockets; JSON is decoded
        self.confirmed = confirmed  # the event ids in its pings
        self.intervals: tuple[float, float] | None = None  # None: an older gateway
        self.receipts: list[str] | None = None  # the types that it tracks

    async def receive(self) -> Any:
        """The next message of the client, except the request for the intervals."""
        while True:
            text = await self._socket.get_message()
            message: Any = text if text == "ping" else json.loads(text)
            if message != "ping" and message["type"] == "ping":
                self.confirmed.append(message["last_event_id"])
                message = "ping"
            if message != {"type": "intervals"}:
                self.received.append(message)
                return message
            if self.intervals is not None:
                heartbeat, receive = self.intervals
                receipts = {} if self.receipts is None else {"receipts": self.receipts}
                await self.send(
                    type="intervals",
                    heartbeat_timeout=heartbeat,
                    receive_timeout=receive,
                    **receipts,
                )

    async def send(self, **message: Any) -> None:
        await self.send_text(json.dumps(message))

    async def send_text(self, text: str) -> None:
        await self._socket.send_message(text)

    async def admit(self, *, recovered: bool = True, last_event_id: str = "0") -> None:
        """Answer the resume."""
        assert (await self.receive())["type"] == "resume"
        await self.send(type="resumed", recovered=recovered, count=0, last_event_id=last_event_id)

    async def publish(self, number: int, **keys: Any) -> None:
        """Send a durable event with this number as its content and its id."""
        await self.send_text(make_payload(n=number, event_id=str(number), **keys).decode())

    async def close(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)

    @property
    def close_code(self) -> int | None:
        """The code with which the client closed; None if it has not."""
        closed = self._socket.closed
        return None if closed is None else closed.code

    async def stay(self, *, answering: bool = True) -> None:
        """Answer pings until the client leaves."""
        while True:
            if await self.receive() == "ping" and answering:
                await self.send(type="pong")


class FakeGateway:
    """Serves each socket with the next script; the last one serves all further sockets."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script | int) -> None:
        self._nursery = nursery
        self._scripts = list(scripts)
        self.dialled: list[float] = []  # times of the attempts
        self.headers: list[dict[str, str]] = []
        self.received: list[Any] = []
        self.confirmed: list[str] = []
        self.abort = lambda: None  # the present stream, without a close frame

    async def dial(self) -> trio.abc.Stream:
        client, server = memory_stream_pair()
        self.dialled.append(trio.current_time())
        script = self._scripts.pop(0) if len(self._scripts) > 1 else self._scripts[0]
        self._nursery.start_soon(self._serve, server, script)
        return client

    async def _serve(self, stream: Any, script: Script | int) -> None:
        try:
            async with trio.open_nursery() as nursery:
                request: WebSocketRequest = await wrap_server_stream(nursery, stream)
                self.headers.append({k.decode(): v.decode() for k, v in request.headers})
                if isinstance(script, int):
                    await request.reject(script)
                else:
                    socket = await request.accept()
                    await script(Peer(socket, self.received, self.confirmed))
                nursery.cancel_scope.cancel()
        except* (ConnectionClosed, trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        finally:
            await trio.aclose_forcefully(stream)


@asynccontextmanager
async def fake_gateway(*scripts: Script | int) -> AsyncIterator[FakeGateway]:
    async with trio.open_nursery() as nursery:
        yield FakeGateway(nursery, *scripts)
        nursery.cancel_scope.cancel()


async def hang_up(peer: Peer) -> None:
    """End the connection without a close frame."""


async def welcome(peer: Peer) -> None:
    """Admit the client and answer its pings."""
    await peer.admit()
    await peer.stay()


def closing(code: int, reason: str = "", *, after: float | None = None) -> Script:
    """A script that closes: at once, or this many seconds after it has admitted the client."""

    async def script(peer: Peer) -> None:
        if after is not None:
            await peer.admit()
            with trio.move_on_after(after):
                await peer.stay()
        await peer.close(code, reason)

    return script
