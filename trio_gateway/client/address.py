"""The address of an endpoint, and the function that opens a stream to it."""

import ssl
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final
from urllib.parse import parse_qsl, urlsplit

import trio

Dial = Callable[[], Awaitable[trio.abc.Stream]]

_SECURE: Final = {"ws": False, "http": False, "wss": True, "https": True}


@dataclass(frozen=True, slots=True)
class Address:
    """The ``Host`` header, the target of the request, and a function that opens a stream."""

    host: str
    target: str
    dial: Dial


def read_address(url: str, ssl_context: ssl.SSLContext | None) -> Address:
    """Read a URL. Raises :exc:`ValueError` if it is invalid or contains a credential."""
    parts = urlsplit(url)
    secure = _SECURE.get(parts.scheme)
    if secure is None or not parts.hostname or parts.username is not None:
        raise ValueError("url must be wss://host[:port]/ws/ENDPOINT, or ws://")
    for name, _ in parse_qsl(parts.query, keep_blank_values=True):
        if name in {"token", "table_token", "ticket"}:
            raise ValueError(f"no {name} in the url: it would appear in logs; pass it as token")
    host, port = parts.hostname, parts.port or (443 if secure else 80)

    async def dial() -> trio.abc.Stream:
        if not secure:
            return await trio.open_tcp_stream(host, port)
        stream = await trio.open_ssl_over_tcp_stream(
            host, port, ssl_context=ssl_context, https_compatible=True
        )
        try:
            await stream.do_handshake()
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    return Address(parts.netloc, target, dial)
