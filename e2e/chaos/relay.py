"""A TCP relay with faults: the network between two parts, for the tests."""

import socket
import struct
from collections.abc import AsyncIterator, Container
from contextlib import asynccontextmanager, suppress
from enum import Flag, auto
from math import inf
from typing import Final

import trio

from tests.support.gateways import free_port

JUNK: Final = b"\x00\xffHTTP/1.1 400 Bad Request\r\n\r\n"
_CHUNK: Final = 65_536
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class Way(Flag):
    """Which way bytes go; the client is the one that connects to the relay."""

    TO_SERVER = auto()
    TO_CLIENT = auto()
    BOTH = TO_SERVER | TO_CLIENT


class Relay:
    """Stands in front of a port on this machine. One mode at a time, for the connections of now
    and for later ones; each call replaces the mode before it and takes effect at once.

    What a mode holds back is kept, as a network that comes back delivers what was sent again:
    after :meth:`forward` it goes through. :meth:`orphan` makes it never.
    """

    def __init__(
        self, target: int, nursery: trio.Nursery, buffer: int | None = None, delay: float = 0
    ) -> None:
        self.port = free_port()
        self.accepted = 0
        self.target = target
        self._nursery = nursery
        self._buffer = buffer
        self._delay = delay
        self._pairs: set[_Pair] = set()
        self._listener: trio.SocketListener | None = None
        self._rates: dict[Way, float] = {}
        self._junk = b""
        self._resets = False
        self._cut: Container[str] = ()
        self._changed = trio.Event()
        self.forward()

    def forward(self) -> None:
        """Hand on everything, both ways."""
        self._set({})

    def vanish(self, way: Way = Way.BOTH) -> None:
        """Pass nothing that way, not even an end: bytes vanish without an error on either
        side. New connections are accepted."""
        self._set({way: 0})

    def split(self, hosts: Container[str]) -> None:
        """Pass nothing from or to clients with these addresses; hand on everything of others."""
        self._set({}, cut=hosts)

    def slow(self, bytes_per_second: float, way: Way = Way.BOTH) -> None:
        """Hand on so few bytes a second that way, evenly."""
        self._set({way: bytes_per_second})

    def garbage(self, junk: bytes = JUNK) -> None:
        """Send junk to the client: now, at the start of a connection, and before all that the
        server says.
        """
        self._set({}, junk=junk)
        for pair in self._pairs:
            self._nursery.start_soon(pair.say, junk)

    def reset(self) -> None:
        """Reset every connection, and each new one once it is accepted."""
        self._set({}, resets=True)
        self._cut_all()

    def refuse(self) -> None:
        """Reset every connection and listen no more."""
        self._set({}, listens=False)
        self._cut_all()

    def orphan(self) -> None:
        """The connections of now hand on nothing ever again, whatever the mode: a router has
        forgotten them.
        """
        for pair in self._pairs:
            pair.orphaned = True

    def _set(
        self,
        rates: dict[Way, float],
        *,
        junk: bytes = b"",
        resets: bool = False,
        listens: bool = True,
        cut: Container[str] = (),
    ) -> None:
        self._rates = {each: rate for way, rate in rates.items() for each in way}
        self._junk, self._resets, self._cut = junk, resets, cut
        self._changed.set()
        self._changed = trio.Event()
        if listens and self._listener is None:
            self._listener = self._bind()
            self._nursery.start_soon(self._listen, self._listener)
        elif not listens and self._listener is not None:
            self._listener.socket.close()
            self._listener = None

    def _bind(self) -> trio.SocketListener:
        listener = socket.create_server(("127.0.0.1", self.port), backlog=1024)
        if self._buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, self._buffer)
        listener.setblocking(False)
        return trio.SocketListener(trio.socket.from_stdlib_socket(listener))

    async def _listen(self, listener: trio.SocketListener) -> None:
        with suppress(trio.ClosedResourceError):
            async with listener:
                while True:
                    stream = await listener.accept()
                    self.accepted += 1
                    self._nursery.start_soon(self._relay, stream)

    async def _relay(self, client: trio.SocketStream) -> None:
        pair = _Pair(self, client)
        self._pairs.add(pair)
        try:
            await pair.run(self.target, self._buffer)
        finally:
            self._pairs.remove(pair)

    def _cut_all(self) -> None:
        for pair in self._pairs:
            pair.close_both()

    async def close(self) -> None:
        """Reset every connection and end."""
        self._cut_all()
        self._nursery.cancel_scope.cancel()


class _Pair:
    """A client's connection and ours to the server."""

    def __init__(self, relay: Relay, client: trio.SocketStream) -> None:
        self._relay = relay
        self._client = client
        self._host: str = client.socket.getpeername()[0]
        self._server: trio.SocketStream | None = None
        self._saying = trio.Lock()
        self._scope = trio.CancelScope()
        self.orphaned = False

    async def run(self, target: int, buffer: int | None) -> None:
        try:
            with self._scope:
                if self._relay._resets:
                    return
                await self._may_pass(Way.TO_SERVER)
                self._server = await _connect(target, buffer)
                await self.say(self._relay._junk)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._copy, self._client, self._server, Way.TO_SERVER)
                    nursery.start_soon(self._copy, self._server, self._client, Way.TO_CLIENT)
                with trio.CancelScope(shield=True):  # both have said their last
                    await self._client.aclose()
                    await self._server.aclose()
        except* _BROKEN:
            pass
        finally:
            for stream in (self._client, self._server):
                if stream is not None:
                    _reset(stream)

    def close_both(self) -> None:
        self._scope.cancel()

    async def say(self, junk: bytes) -> None:
        """Something of our own, to the client."""
        if junk and not self.orphaned:
            with suppress(*_BROKEN):
                async with self._saying:
                    await self._client.send_all(junk)

    async def _copy(self, source: trio.SocketStream, sink: trio.SocketStream, way: Way) -> None:
        while True:
            try:
                data = bytes(await source.receive_some(_CHUNK))
            except trio.BrokenResourceError:
                await self._may_pass(way)  # a reset vanishes, too
                raise
            if not data:
                break
            if self._relay._delay:
                await trio.sleep(self._relay._delay)
            if way is Way.TO_CLIENT:
                await self.say(self._relay._junk)
            while data:
                rate = await self._may_pass(way)
                size = len(data) if rate == inf else max(1, int(rate / 10))
                if way is Way.TO_CLIENT:
                    async with self._saying:
                        await sink.send_all(data[:size])
                else:
                    await sink.send_all(data[:size])
                data = data[size:]
                if rate != inf:
                    with trio.move_on_after(size / rate):
                        await self._relay._changed.wait()
        await self._may_pass(way)
        await sink.send_eof()

    async def _may_pass(self, way: Way) -> float:
        """Wait until bytes may go that way; the bytes a second that may."""
        relay = self._relay
        while self.orphaned or self._host in relay._cut or not relay._rates.get(way, inf):
            await relay._changed.wait()
        return relay._rates.get(way, inf)


async def _connect(target: int, buffer: int | None) -> trio.SocketStream:
    ours = trio.socket.socket()
    try:
        if buffer is not None:  # before it connects, or it counts for nothing
            ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        await ours.connect(("127.0.0.1", target))
    except BaseException:
        ours.close()
        raise
    return trio.SocketStream(ours)


def _reset(stream: trio.SocketStream) -> None:
    """Close with a reset, if it is not closed yet."""
    with suppress(OSError):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    stream.socket.close()


@asynccontextmanager
async def open_relay(
    target: int, *, buffer: int | None = None, delay: float = 0
) -> AsyncIterator[Relay]:
    """A relay to a port of this machine, on a port of its own. ``buffer`` bounds the bytes that
    its sockets take without being read, so that who sends to a slow or silent one feels it soon;
    ``delay`` is how far away the server is, in seconds one way.
    """
    async with trio.open_nursery() as nursery:
        relay = Relay(target, nursery, buffer, delay)
        try:
            yield relay
        finally:
            await relay.close()
