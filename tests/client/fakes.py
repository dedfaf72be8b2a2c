"""A gateway in memory, that does as the test says."""

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

    def __init__(self, socket: WebSocketConnection, heard: list[Any]) -> None:
        self._socket = socket
        self.heard = heard  # what the client has said, on all sockets; JSON is decoded
        self.intervals: tuple[float, float] | None = None  # None: an older gateway

    async def hear(self) -> Any:
        """The next thing that the client says, except that it asks for the intervals."""
        while True:
            text = await self._socket.get_message()
            said = text if text == "ping" else json.loads(text)
            if said != {"type": "intervals"}:
                self.heard.append(said)
                return said
            if self.intervals is not None:
                heartbeat, receive = self.intervals
                await self.say(
                    type="intervals", heartbeat_timeout=heartbeat, receive_timeout=receive
                )

    async def say(self, **message: Any) -> None:
        await self._socket.send_message(json.dumps(message))

    async def let_in(self, *, recovered: bool = True, last_event_id: str = "0") -> None:
        """Answer the resume."""
        assert (await self.hear())["type"] == "resume"
        await self.say(type="resumed", recovered=recovered, count=0, last_event_id=last_event_id)

    async def publish(self, number: int, **keys: Any) -> None:
        """A durable event with this number in it, and as its id."""
        await self._socket.send_message(
            make_payload(n=number, event_id=str(number), **keys).decode()
        )

    async def close(self, code: int, reason: str = "") -> None:
        await self._socket.aclose(code, reason)

    async def stay(self, *, answering: bool = True) -> None:
        """Answer pings until the client leaves."""
        while True:
            if await self.hear() == "ping" and answering:
                await self.say(type="pong")


class FakeGateway:
    """Serves each socket by the next of some scripts, the last one for ever."""

    def __init__(self, nursery: trio.Nursery, *scripts: Script | int) -> None:
        self._nursery = nursery
        self._scripts = list(scripts)
        self.dialled: list[float] = []  # at which times
        self.headers: list[dict[str, str]] = []
        self.heard: list[Any] = []
        self.cut = lambda: None  # the stream in use, without a word

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
                    await script(Peer(socket, self.heard))
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
    """The connection breaks, without a close frame."""


async def welcome(peer: Peer) -> None:
    """Let in, and stay."""
    await peer.let_in()
    await peer.stay()


def closing(code: int, reason: str = "", *, after: float | None = None) -> Script:
    """A gateway that closes: at once, or so many seconds after it has let the client in."""

    async def script(peer: Peer) -> None:
        if after is not None:
            await peer.let_in()
            with trio.move_on_after(after):
                await peer.stay()
        await peer.close(code, reason)

    return script
