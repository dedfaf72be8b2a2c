"""TLS in front of a Redis."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

import trio
import trustme

from .ports import free_port


@asynccontextmanager
async def tls_in_front_of(
    port: int, certificate: trustme.LeafCert, clients: trustme.CA | None = None
) -> AsyncIterator[int]:
    """Terminate TLS for the wheel's Valkey, which has none. With ``clients`` it requires a
    client certificate.
    """
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate.configure_cert(context)
    if clients is not None:
        clients.configure_trust(context)
        context.verify_mode = ssl.CERT_REQUIRED

    async def relay(client: trio.SSLStream[trio.SocketStream]) -> None:
        async def copy(source: trio.abc.Stream, sink: trio.abc.Stream) -> None:
            async for data in source:
                await sink.send_all(data)
            nursery.cancel_scope.cancel()

        try:
            server = await trio.open_tcp_stream("127.0.0.1", port)
            async with server, client, trio.open_nursery() as nursery:
                nursery.start_soon(copy, client, server)
                nursery.start_soon(copy, server, client)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass

    listening = free_port()
    async with trio.open_nursery() as serving:
        await serving.start(
            partial(trio.serve_ssl_over_tcp, relay, listening, context, host="127.0.0.1")
        )
        yield listening
        serving.cancel_scope.cancel()
