"""Where the API is, and how it is reached."""

import re
import ssl
from typing import Any, Final

import httpx

CONNECT: Final = 2.0  # seconds
TIMEOUT: Final = 10.0  # seconds for an answer
_HOST: Final = re.compile(rb"[A-Za-z0-9._:-]+")  # of an IPv6 address without brackets
_MOST_PORT: Final = 65_535
_SECRET: Final = re.compile(r"[\x21-\x7e]+")


class Bearer(httpx.Auth):
    """Sends the secret of an API key; neither ``repr`` nor ``str`` has it."""

    def __init__(self, secret: str) -> None:
        if not _SECRET.fullmatch(secret):
            raise ValueError("the secret must be printable ASCII without spaces")
        self._header = f"Bearer {secret}"

    def auth_flow(self, request: httpx.Request) -> Any:
        """Add the header."""
        request.headers["Authorization"] = self._header
        yield request


def read_url(url: str) -> httpx.URL:
    """The URL of the API, from that of a gateway. Raises :exc:`ValueError` without showing it."""
    try:
        found = httpx.URL(url)
    except (httpx.InvalidURL, TypeError):
        raise ValueError("the URL is invalid") from None
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError("the URL must be that of a gateway: https://host[:port][/path]")
    if found.userinfo or found.query or found.fragment:
        raise ValueError("the URL must have no user, query or fragment")
    port = 1 if found.port is None else found.port
    if not _HOST.fullmatch(found.raw_host) or not 0 < port <= _MOST_PORT:
        raise ValueError("the URL is invalid: its host or port can't exist")
    return found.copy_with(path=f"{found.path.rstrip('/')}/ws/api/")


def options(
    url: str, secret: str, timeout: float, ssl_context: ssl.SSLContext | None
) -> dict[str, Any]:
    """The arguments of an HTTP client."""
    return {
        "base_url": read_url(url),
        "auth": Bearer(secret),
        "headers": {"Content-Type": "application/json"},
        "timeout": httpx.Timeout(timeout, connect=CONNECT),
        "verify": True if ssl_context is None else ssl_context,
    }
