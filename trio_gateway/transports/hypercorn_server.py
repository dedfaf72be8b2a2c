"""Hypercorn's TCP server, bounded in time: for connections that do not begin with a WebSocket."""

from typing import Any, Final

import trio
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, LifespanState

from ..runtime.socket import LINGER
from .asgi import TcpControl, with_control
from .direct import STREAM_ERRORS, linger, reset, socket_of
from .hypercorn_bounds import bound_protocols, is_cut_off
from .progress import ProgressStream, has_left, traffic

_MOST_UNREAD: Final = 10.0  # seconds in which a client may still send the body of a refused request


class HypercornServer(TCPServer):
    """Serves one connection as Hypercorn does, but no client can make it wait without end.

    ``received`` are bytes that were read from the stream already; they are served first. A stream
    with TLS must be carried by a :class:`ProgressStream`. A client that takes nothing for
    ``write_timeout`` seconds is reset. The ASGI app finds a :class:`TcpControl` in its scope.
    """

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: LifespanState,
        stream: Any,
        *,
        received: bytes,
        write_timeout: float,
    ) -> None:
        bound_protocols()
        # What sees how much the client takes: the stream, or what carries its TLS.
        self._moving: ProgressStream
        self._sender: trio.abc.SendStream
        if isinstance(stream, trio.SSLStream):
            self._sender, self._moving = stream, stream.transport_stream
        else:
            self._sender = self._moving = ProgressStream(stream, write_timeout)
        control = TcpControl(
            abort=lambda: reset(stream),
            traffic=lambda: traffic(socket_of(stream)),
            has_left=lambda: has_left(socket_of(stream)),
            write_timeout=write_timeout,
        )
        if received:
            stream = PrefixedStream(stream, received)
        self._reading = trio.CancelScope()
        super().__init__(app, config, context, with_control(state, control), stream)

    async def protocol_send(self, event: Event) -> None:
        """Send as Hypercorn does, but bounded in time: its own send is shielded without a
        deadline, so that one client that stops reading hangs the shutdown.

        Raises :exc:`TimeoutError` if the client takes nothing for the write timeout. A send that
        is cut short, by that or by being cancelled, resets the connection: nothing can follow half
        of it. It is cancelled only while it waits for the client.

        A connection on which the client still sends a request that is answered is closed by
        :meth:`_read_data`.
        """
        if isinstance(event, Closed) and is_cut_off(self.protocol):
            self._reading.cancel()
            return
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
            except STREAM_ERRORS:
                pass
            finally:
                self._moving.shield = None
                if not sent:
                    reset(self.stream)
        if not sent:
            await trio.aclose_forcefully(self.stream)
            await self.protocol.handle(Closed())

    async def _read_data(self) -> None:
        """Read as Hypercorn does, but do not wait for the task that pings the client when it is
        gone: that may sleep for as long as ``websocket_ping_interval``.

        What follows of a request that is answered is read and discarded for a while: otherwise a
        reset might overtake the answer.
        """
        with self._reading:
            await super()._read_data()
        if self._reading.cancelled_caught:
            await linger(self.stream, _MOST_UNREAD)
            await self.protocol.handle(Closed())
        assert self._task_group._nursery is not None
        self._task_group._nursery.cancel_scope.deadline = trio.current_time() + LINGER

    async def _initiate_server_close(self) -> None:
        """Close as Hypercorn does, but in bounded time: it shields this, and waits for the app."""
        with trio.move_on_after(LINGER) as scope:
            await super()._initiate_server_close()
        if scope.cancelled_caught:
            reset(self.stream)


class PrefixedStream:
    """A stream with bytes put back in front. Everything else is the stream's own."""

    def __init__(self, stream: trio.abc.Stream, data: bytes) -> None:
        self._stream = stream
        self._data = data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        if not self._data:
            return bytes(await self._stream.receive_some(max_bytes))
        await trio.lowlevel.checkpoint()
        size = len(self._data) if max_bytes is None else max_bytes
        data, self._data = self._data[:size], self._data[size:]
        return data

    async def send_all(self, data: bytes) -> None:
        await self._stream.send_all(data)

    async def aclose(self) -> None:
        await self._stream.aclose()
