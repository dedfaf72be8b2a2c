"""The first moments of a TCP connection: a WebSocket is served here, all else by Hypercorn.

Hypercorn looks up ``TCPServer`` by name when it starts serving; :func:`install` puts
:class:`TcpConnection` there. It reads the first request head. A WebSocket upgrade is answered here
and served by the gateway on the Trio stream; none of its bytes reaches Hypercorn. Any other request
is handed to :class:`HypercornServer`, together with what was read of it.
"""

from collections.abc import Awaitable, Callable, Generator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, Protocol

import hypercorn.trio.run
import msgspec
import structlog
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, LifespanState

from ..core.client_request import ClientRequest
from ..core.exception_groups import leaves
from ..runtime.client_counts import ClientCounts
from ..runtime.concurrency_limiter import ConcurrencyLimiter, Overloaded
from ..runtime.silent_connections import SilentConnections
from ..runtime.socket import LINGER
from ..runtime.throttled_log import ThrottledLog
from . import hypercorn_stop, listener
from .compression import negotiate
from .direct import STREAM_ERRORS, DirectSocket, is_closed, is_readable, linger, socket_of
from .handshake import Refusal, acceptance, parse_head, refusal_response
from .hypercorn_bounds import bound_protocols
from .hypercorn_server import HypercornServer
from .progress import ProgressStream
from .request_head import Head, HeadReader, Nobody

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Http2:
    """TLS negotiated HTTP/2."""


# What a connection begins with.
Opening = Head | Refusal | Nobody | Http2

_TIMED_OUT: Final = Refusal(408, "request head took too long")


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
    heads: ConcurrencyLimiter[Opening]
    is_draining: Callable[[], bool]
    serve_connection: Callable[[ClientRequest, DirectSocket], Awaitable[None]]
    # Called with what waits for Hypercorn to stop, and with the seconds that it gives then:
    watch: Callable[[Callable[[], Awaitable[None]], float], None]
    throttled_log: ThrottledLog = field(default_factory=lambda: ThrottledLog(log))


def service_of(app: AppWrapper) -> TcpService | None:
    """The service of the gateway that Hypercorn runs; None if it runs another app, or a middleware
    around a gateway.
    """
    service = getattr(app.app, "tcp_service", None) if isinstance(app, ASGIWrapper) else None
    return service if isinstance(service, TcpService) else None


class TcpConnection:
    """A TCP connection, made and awaited in place of Hypercorn's ``TCPServer``.

    With ``serves_clients=False`` it is for plain HTTP alone, and a WebSocket is refused.
    """

    __slots__ = ("_app", "_config", "_context", "_serves_clients", "_state", "_stream")

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: LifespanState,
        stream: trio.SocketStream | trio.SSLStream[Any],
        *,
        serves_clients: bool = True,
    ) -> None:
        self._app = app
        self._config = config
        self._context = context
        self._state = state
        self._stream = stream
        self._serves_clients = serves_clients

    def __await__(self) -> Generator[Any, None, None]:
        return self.run().__await__()

    async def run(self) -> None:
        """Serve the connection. Whatever fails ends it alone, and never reaches the server's
        nursery.
        """
        service = service_of(self._app)
        write_timeout = LINGER if service is None else service.write_timeout
        stream = self._stream
        if type(stream) is not trio.SocketStream and isinstance(stream, trio.SSLStream):
            # TLS must not be bypassed.
            stream.transport_stream = ProgressStream(stream.transport_stream, write_timeout)
        if service is None:
            await self._hand_over(b"", write_timeout)
            return
        if self._serves_clients:
            service.watch(self._context.terminated.wait, self._config.graceful_timeout)
        try:
            # Two steps, so that no frame keeps the head while the client stays.
            serving = await self._open(service)
            if serving is not None:
                await serving
        except* (OSError, *STREAM_ERRORS, trio.TooSlowError):
            pass
        except* Exception as faults:
            kinds = sorted({type(each).__name__ for each in leaves(faults)})
            service.throttled_log.warning("connection failed", errors=kinds)
        finally:
            if not is_closed(stream):
                await trio.aclose_forcefully(stream)

    async def _open(self, service: TcpService) -> Awaitable[None] | None:
        """Read and answer the first request head; returns what then serves the client, if any."""
        reader = HeadReader(self._stream)
        opening = reader.read_nowait() or await self._read_slowly(service, reader)
        match opening:
            case Head():
                return await self._answer(service, opening)
            case Http2():
                return self._hand_over(b"", service.write_timeout)
            case Refusal():
                await self._refuse(service, opening)
            case Nobody():
                pass
        return None

    async def _read_slowly(self, service: TcpService, reader: HeadReader) -> Opening:
        """Read a head that has not come as a whole: one among a limited number of these."""
        until = trio.current_time() + service.accept_timeout
        opening: Opening | None
        try:
            if not reader.begun:
                if not await self._wait_for_bytes(service):
                    return Nobody()
                if (opening := reader.read_nowait()) is not None:
                    return opening
            opening = await service.heads.run(
                partial(self._read_opening, reader, service.accept_timeout),
                max(0.0, until - trio.current_time()),
                service.accept_timeout,
                self._waits_for_client,
            )
        except Overloaded:
            # No answer: there are too many to linger for each.
            service.counts.refused[503] += 1
            return Nobody()
        if opening is None:  # it took too long, or the gateway drains
            return _TIMED_OUT if reader.begun and not service.is_draining() else Nobody()
        return opening

    async def _answer(self, service: TcpService, head: Head) -> Awaitable[None] | None:
        """Answer a request head; returns what then serves the client, if any."""
        request = parse_head(head.data, partial(_peer, self._stream))
        if request is None:  # not a WebSocket
            return self._hand_over(head.data + head.rest, service.write_timeout)
        if isinstance(request, ClientRequest):
            if not self._serves_clients:
                request = Refusal(404, "no such endpoint")
            elif service.is_draining():
                request = Refusal(503, "draining")
        if isinstance(request, Refusal):
            await self._refuse(service, request)
            return None
        socket = DirectSocket(self._stream, head.rest, service.max_message_size)
        extensions = None
        if service.compresses:
            agreed = negotiate(request.extensions, service.max_message_size)
            if agreed is not None:
                socket.deflate, extensions = agreed
                request = msgspec.structs.replace(request, supports_deflate=True)
        # It has left the limiter of heads, and has not come to the one of admissions.
        service.counts.arriving += 1
        try:
            await socket.send(acceptance(request, extensions), service.accept_timeout)
        finally:
            service.counts.arriving -= 1
        return service.serve_connection(request, socket)

    async def _wait_for_bytes(self, service: TcpService) -> bool:
        """Wait for the first byte, or the end, without a slot among the handshakes. False if the
        connection is to be closed instead.
        """
        sock = socket_of(self._stream)
        if sock is None or is_readable(sock):
            return True
        address, most = service.addresses.silent_of(partial(_peer, self._stream))
        return await service.silent.wait(
            partial(trio.lowlevel.wait_readable, sock), service.accept_timeout, address, most
        )

    def _waits_for_client(self) -> bool:
        """Whether the client has yet to send the rest of its handshake: no byte of it is unread."""
        sock = socket_of(self._stream)
        return sock is not None and sock.fileno() != -1 and not is_readable(sock)

    async def _read_opening(self, reader: HeadReader, timeout: float) -> Opening:
        stream = self._stream
        if isinstance(stream, trio.SSLStream):
            try:
                with trio.fail_after(min(timeout, self._config.ssl_handshake_timeout)):
                    await stream.do_handshake()
            except (trio.BrokenResourceError, trio.TooSlowError):
                return Nobody()
            if stream.selected_alpn_protocol() == "h2":
                return Http2()
        return await reader.read()

    async def _refuse(self, service: TcpService, refusal: Refusal) -> None:
        service.counts.refused[refusal.status] += 1
        service.throttled_log.info(
            "upgrade refused",
            kind=f"refused {refusal.status}",
            status=refusal.status,
            reason=refusal.reason,
        )
        with trio.move_on_after(LINGER):
            await self._stream.send_all(refusal_response(refusal))
        await linger(self._stream)

    async def _hand_over(self, received: bytes, write_timeout: float) -> None:
        """Let Hypercorn serve the connection, beginning with these bytes."""
        await HypercornServer(
            self._app, self._config, self._context, self._state, self._stream,
            received=received, write_timeout=write_timeout,
        )  # fmt: skip


def install(write_timeout: float) -> None:
    """Let Hypercorn's Trio worker serve with :class:`TcpConnection`, bound its protocols, and let
    an idle worker sleep. ``write_timeout`` is that of the gateway that it serves.
    """
    # It makes one for each connection by this name, and awaits it.
    hypercorn.trio.run.TCPServer = TcpConnection  # type: ignore[attr-defined,assignment]
    listener.install(partial(listener.Listener, write_timeout=write_timeout))
    bound_protocols()
    hypercorn_stop.install()


def _peer(stream: trio.abc.Stream) -> str:
    """The address at the other end; empty for a unix socket, or if it is gone already."""
    try:
        name = socket_of(stream).getpeername()
    except (OSError, AttributeError):
        return ""
    return str(name[0]) if isinstance(name, tuple) else ""
