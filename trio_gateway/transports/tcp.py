"""The line: a socket that asks for a WebSocket never reaches Hypercorn's protocol code.

Hypercorn looks up ``TCPServer`` by name when it starts serving; :func:`install` puts
:class:`Line` there. It reads the first request head. An upgrade is answered here and served by
the gateway on the Trio stream, from the first byte to the last; for anything else the bytes go
back in front of the stream and Hypercorn serves it as ever.
"""

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Protocol, cast

import hypercorn.trio.run
import structlog
import trio
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer

from ..core.client_request import ClientRequest
from ..core.exception_groups import leaves
from ..runtime.client_counts import ClientCounts
from ..runtime.concurrency_limiter import ConcurrencyLimiter, Overloaded
from ..runtime.silent_connections import SilentConnections
from ..runtime.throttled_log import ThrottledLog
from .asgi import CUT, TRAFFIC
from .compression import agree
from .direct import (
    CHUNK,
    GONE,
    LINGER,
    DirectSocket,
    cut,
    is_closed,
    is_readable,
    linger,
    receive,
    socket_of,
)
from .handshake import MAX_HEAD_BYTES, Refusal, acceptance, parse_head, refusal_response
from .hypercorn_bounds import bound_protocols
from .progress import MovingStream, find_the_vanished, traffic

log = structlog.get_logger()

_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")


# The protocol that is spoken, what was read of the request, and how to refuse it if it is bad.
Shaken = tuple[str | None, bytes, Refusal | None]


class Addresses(Protocol):
    """What a TCP connection asks about its client's address."""

    def silent_of(self, peer: Callable[[], str], /) -> tuple[str, int | None]: ...


@dataclass(frozen=True, kw_only=True)
class TcpService:
    """What a TCP connection needs of the gateway; timeouts in seconds, sizes in bytes."""

    accept_timeout: float
    write_timeout: float
    max_message_size: int
    compresses: bool
    counts: ClientCounts
    addresses: Addresses
    silent: SilentConnections
    heads: ConcurrencyLimiter["Shaken"]
    is_draining: Callable[[], bool]
    serve_connection: Callable[[ClientRequest, DirectSocket], Awaitable[None]]
    # Called with what waits for Hypercorn to stop, and with the seconds that it gives then:
    watch: Callable[[Callable[[], Awaitable[None]], float], None]
    throttled_log: ThrottledLog = field(default_factory=lambda: ThrottledLog(log))


class Line(TCPServer):
    """A TCP connection: ours if it asks for a WebSocket, Hypercorn's if not."""

    serves_clients = True  # else it is for plain HTTP alone

    def __init__(
        self, app: Any, config: Any, context: Any, state: Any, stream: trio.abc.Stream
    ) -> None:
        # Hypercorn's own makes locks and more, which only those need that it serves.
        self.app, self.config, self.context, self.state = app, config, context, state
        self.stream = cast("Any", stream)

    async def _hand_over(self) -> None:
        """Let Hypercorn serve it. The app is told how to cut it off, which ASGI has no word for."""
        state = {
            **self.state,
            CUT: lambda: cut(self.stream),
            TRAFFIC: lambda: traffic(socket_of(self.stream)),
        }
        bound_protocols()
        stream: Any = self.stream.stream if isinstance(self.stream, Replayed) else self.stream
        if (carrier := getattr(stream, "transport_stream", None)) is None:
            stream = carrier = MovingStream(stream, self._write_timeout)
        self._sender, self._moving = stream, carrier
        super().__init__(self.app, self.config, self.context, state, self.stream)
        await super().run()

    async def run(self) -> None:
        """Serve one connection; its faults end it alone, and never reach the server's nursery."""
        service: TcpService | None = getattr(getattr(self.app, "app", None), "tcp_service", None)
        self._write_timeout = LINGER if service is None else service.write_timeout
        carrier: Any = getattr(self.stream, "transport_stream", self.stream)
        if (sock := getattr(carrier, "socket", None)) is not None:
            find_the_vanished(sock, self._write_timeout)
        if carrier is not self.stream:  # TLS, which is not to be bypassed
            moving: Any = MovingStream(carrier, self._write_timeout)
            self.stream.transport_stream = moving
        if service is None:  # another app, or a middleware around ours
            await self._hand_over()
            return
        if self.serves_clients:
            service.watch(self.context.terminated.wait, self.config.graceful_timeout)
        try:
            await self._serve(service)
        except* (OSError, *GONE, trio.TooSlowError):
            pass
        except* Exception as faults:
            kinds = sorted({type(each).__name__ for each in leaves(faults)})
            service.throttled_log.warning("connection failed", errors=kinds)
        finally:
            if not is_closed(self.stream):
                await trio.aclose_forcefully(self.stream)

    async def _serve(self, service: TcpService) -> None:
        serving = await self._open(service)  # of its head nothing is kept here while it stays
        if serving is not None:
            await serving

    async def _open(self, service: TcpService) -> Awaitable[None] | None:
        """Read and answer the first request head; returns what then serves the client, if any."""
        until = trio.current_time() + service.accept_timeout
        try:
            if not await self._speaks(service):
                return None
            left = max(0.0, until - trio.current_time())
            shaken = await service.heads.run(
                partial(self._shake, service, begun := bytearray()),
                left,
                service.accept_timeout,
                self._dawdles,
            )
        except Overloaded:
            # Without an answer: there are too many to linger for each.
            service.counts.refused[503] += 1
            return None
        if shaken is None:
            if begun and not service.is_draining():
                await self._refuse(service, Refusal(408, "request head took too long"))
            return None
        protocol, data, refusal = shaken
        if protocol is None:
            return None
        if protocol == "h2":
            return self._hand_over()
        if refusal is not None:
            await self._refuse(service, refusal)
            return None
        if not data:
            return None
        end = _END_OF_HEAD.search(data)
        head = data[: end.end()] if end else data
        match parse_head(head, partial(_peer, self.stream)):
            case ClientRequest() if not self.serves_clients:
                await self._refuse(service, Refusal(404, "no such endpoint"))
            case ClientRequest() if service.is_draining():
                await self._refuse(service, Refusal(503, "draining"))
            case ClientRequest() as handshake:
                socket = DirectSocket(
                    self.stream,
                    data[len(head) :],
                    service.max_message_size,
                    write_timeout=self._write_timeout,
                )
                extensions = None
                if service.compresses:
                    agreed = agree(handshake.extensions, service.max_message_size)
                    if agreed is not None:
                        socket.deflate, extensions = agreed
                        handshake = replace(handshake, supports_deflate=True)
                service.counts.arriving += 1  # it has left one turnstile and not come to the next
                try:
                    await socket.send(acceptance(handshake, extensions), service.accept_timeout)
                finally:
                    service.counts.arriving -= 1
                return service.serve_connection(handshake, socket)
            case Refusal() as refusal:
                await self._refuse(service, refusal)
            case None:
                self.stream = cast("Any", Replayed(self.stream, data))
                return self._hand_over()
        return None

    async def _speaks(self, service: TcpService) -> bool:
        """Wait for the first byte, or the end, without a place among the handshakes."""
        carrier = getattr(self.stream, "transport_stream", self.stream)
        if (sock := getattr(carrier, "socket", None)) is None or is_readable(sock):
            return True
        address, most = service.addresses.silent_of(partial(_peer, self.stream))
        return await service.silent.wait(
            partial(trio.lowlevel.wait_readable, sock), service.accept_timeout, address, most
        )

    def _dawdles(self) -> bool:
        """Whether what is missing of its handshake is still to come: nothing of it is unread."""
        sock = socket_of(self.stream)
        return sock is not None and sock.fileno() != -1 and not is_readable(sock)

    async def _shake(self, service: TcpService, head: bytearray) -> "Shaken":
        protocol = await self._secure(service.accept_timeout)
        if protocol != "http/1.1":
            return protocol, b"", None
        return protocol, *await read_head(self.stream, head)

    async def _secure(self, timeout: float) -> str | None:
        """The protocol that is spoken once TLS, if there is any, is through; None if it failed."""
        if not hasattr(self.stream, "do_handshake"):
            return "http/1.1"
        try:
            with trio.fail_after(min(timeout, self.config.ssl_handshake_timeout)):
                await self.stream.do_handshake()
        except (trio.BrokenResourceError, trio.TooSlowError):
            return None
        return "h2" if self.stream.selected_alpn_protocol() == "h2" else "http/1.1"

    async def _refuse(self, service: TcpService, refusal: Refusal) -> None:
        service.counts.refused[refusal.status] += 1
        service.throttled_log.info(
            "upgrade refused",
            kind=f"refused {refusal.status}",
            status=refusal.status,
            reason=refusal.reason,
        )
        await answer(self.stream, refusal)

    async def _read_data(self) -> None:
        """As Hypercorn does it, but when the peer is gone the task that pings it is not waited
        for: it may sleep on for as long as ``websocket_ping_interval``.
        """
        await super()._read_data()
        assert self._task_group._nursery is not None
        self._task_group._nursery.cancel_scope.deadline = trio.current_time() + LINGER

    async def protocol_send(self, event: Event) -> None:
        """As Hypercorn does it, but bounded in time: its own send is shielded for ever, so that
        one client that stops reading hangs the shutdown.

        Raises :exc:`TimeoutError` if the client takes nothing for the write timeout. What is cut
        short, by that or by being cancelled, cuts the client off: nothing can follow half of it.
        It is cancelled only while it waits for the client.
        """
        if not isinstance(event, RawData):
            # This may run in a task that Quart-Trio has cancelled, because the response is sent.
            with trio.CancelScope(shield=True, deadline=trio.current_time() + LINGER):
                await super().protocol_send(event)
            return
        sent = False
        async with self.send_lock:
            try:
                until = trio.current_time() + LINGER  # unless it waits for the client to read
                with trio.CancelScope(shield=True, deadline=until) as self._moving.shield:
                    await self._sender.send_all(event.data)
                    sent = True
            except GONE:
                pass
            finally:
                self._moving.shield = None
                if not sent:
                    cut(self.stream)
        if not sent:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())

    async def _initiate_server_close(self) -> None:
        # Hypercorn shields this, and waits for the app to take note.
        with trio.move_on_after(LINGER) as scope:
            await super()._initiate_server_close()
        if scope.cancelled_caught:
            cut(self.stream)


def install() -> None:
    """Let Hypercorn's Trio worker serve with :class:`Line`, and bound what it does itself."""
    vars(hypercorn.trio.run)["TCPServer"] = Line
    bound_protocols()


async def read_head(stream: trio.abc.Stream, data: bytearray) -> tuple[bytes, Refusal | None]:
    """Read into ``data`` until a request head is complete, and maybe beyond; bounded in size.

    Returns what was read, and how to refuse it if it is no head. Nothing read: nobody there.
    """
    while True:
        # What is accepted has mostly said already what it wants.
        received = await receive(stream, CHUNK, at_once=not data)
        if not received:
            return bytes(data), Refusal(400, "incomplete request") if data else None
        # The end may have begun in what was there before.
        start = max(0, len(data) - 3)
        data += received
        end = _END_OF_HEAD.search(data, start)
        if (end.end() if end else len(data)) > MAX_HEAD_BYTES:
            return b"", Refusal(431, f"request head is over {MAX_HEAD_BYTES} bytes")
        if end:
            return bytes(data), None


async def answer(stream: trio.abc.Stream, refusal: Refusal) -> None:
    """Refuse over HTTP, such that the answer arrives."""
    with trio.move_on_after(LINGER):
        await stream.send_all(refusal_response(refusal))
    await linger(stream)


class Replayed:
    """A stream with some of its bytes put back in front."""

    def __init__(self, stream: trio.abc.Stream, data: bytes) -> None:
        self.stream = stream
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._data:
            return bytes(await self.stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        size = len(self._data) if max_bytes is None else max_bytes
        data, self._data = self._data[:size], self._data[size:]
        return data

    async def send_all(self, data: bytes) -> None:
        await self.stream.send_all(data)

    async def aclose(self) -> None:
        await self.stream.aclose()


def _peer(stream: trio.abc.Stream) -> str:
    """The address at the other end; empty for a unix socket, or if it is gone already."""
    carrier: Any = getattr(stream, "transport_stream", stream)
    try:
        name = carrier.socket.getpeername()
    except (OSError, AttributeError):
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""
