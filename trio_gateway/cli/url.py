"""The ``--url`` option: the address of a gateway."""

from typing import Final
from urllib.parse import SplitResult, urlsplit

import click

DEFAULT: Final = "ws://127.0.0.1:8001"
_TLS: Final = {"ws": False, "http": False, "wss": True, "https": True}


def read_url(url: str) -> SplitResult:
    """Read a gateway's URL; the result's scheme is ws or wss.

    A path before ``/ws/…`` stays, for gateways behind a proxy. Raises :exc:`click.BadParameter`.
    """
    try:
        parts = urlsplit(url)
        usable = bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        usable = False
    if not usable or parts.scheme not in _TLS or parts.query or parts.fragment or parts.username:
        raise click.BadParameter(
            "must be ws://host[:port] or wss://host[:port], without a query", param_hint="--url"
        )
    scheme = "wss" if _TLS[parts.scheme] else "ws"
    return parts._replace(scheme=scheme, path=parts.path.rstrip("/"))


def no_listener(where: str) -> str:
    """The text for a refused connection to ``host:port``."""
    return (
        f"nothing listens on {where}: start the gateway (trio-gateway serve),"
        " or pass its address with --url"
    )


def endpoint_url(url: str, endpoint: str) -> str:
    """The WebSocket URL of an endpoint."""
    parts = read_url(url)
    return parts._replace(path=f"{parts.path}/ws/{endpoint}").geturl()
