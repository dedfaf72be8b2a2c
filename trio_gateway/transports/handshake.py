"""The opening handshake: parse a request head, and write the response (RFC 6455, section 4)."""

import binascii
import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import parse_qsl, unquote, urlsplit

import httptools

from ..core.audiences import ENDPOINTS
from ..core.client_request import ClientRequest

MAX_HEAD_BYTES: Final = 16_384
MAX_HEADERS: Final = 100
_GUID: Final = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"  # RFC 6455, 1.3

# If repeated, the gateway and a proxy could interpret these differently.
_ONCE: Final = frozenset(
    {
        "authorization", "content-length", "host", "last-event-id", "origin", "sec-websocket-key",
        "sec-websocket-version", "transfer-encoding", "upgrade",
    }
)  # fmt: skip
_READ: Final = _ONCE | {"connection", "sec-websocket-protocol", "sec-websocket-extensions"}


@dataclass(frozen=True, slots=True)
class Refusal:
    """An upgrade request that is refused: the HTTP status and the reason."""

    status: int
    reason: str


def read_query(query: str) -> dict[str, str]:
    """Return the parameters of a query string; the first value of a repeated one."""
    found: dict[str, str] = {}
    if "%" in query or "+" in query:
        for name, value in parse_qsl(query, keep_blank_values=True, errors="replace"):
            found.setdefault(name, value)
        return found
    for each in query.split("&"):  # nothing is encoded, as mostly: twice as fast
        if each:
            name, _, value = each.partition("=")
            found.setdefault(name, value)
    return found


def join_headers(headers: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    """Return headers by name in lower case; the values of a repeated one are joined by commas."""
    head = _Head()
    for name, value in headers:
        head.on_header(name, value)
    return head.headers


class _Head:
    """Collects what httptools finds in a head."""

    def __init__(self) -> None:
        self.target = b""
        self.headers: dict[str, str] = {}
        self.count = 0  # of headers
        self.repeated: set[str] = set()
        self.complete = False

    def on_url(self, target: bytes) -> None:
        self.target += target

    def on_header(self, raw_name: bytes, raw_value: bytes) -> None:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1").strip()
        self.count += 1
        if name in self.headers:
            self.repeated.add(name)
            value = f"{self.headers[name]}, {value}"
        self.headers[name] = value

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_head(head: bytes, peer: Callable[[], str] = str) -> ClientRequest | Refusal | None:
    """Parse a request head that ends with its empty line (RFC 6455, 4.2.1).

    Returns None if it does not ask for a WebSocket. A head that httptools finds malformed is
    refused in any case: a proxy and Hypercorn might disagree about where it ends (RFC 9112, 11.2).

    ``peer`` returns the address of the other end of the connection.
    """
    if head.startswith(b"PRI "):
        return Refusal(400, "HTTP/2 was not negotiated")
    found = _Head()
    parser: Any = httptools.HttpRequestParser(found)
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        pass
    except httptools.HttpParserError:
        return Refusal(400, "malformed request")
    if not found.complete:
        return Refusal(400, "malformed request")
    if found.count > MAX_HEADERS:
        return Refusal(431, "too many headers")
    headers = found.headers
    if "sec-websocket-key" not in headers and not _has(headers, "upgrade", "websocket"):
        return None
    if refusal := _refuse(parser, found, is_ascii=head.isascii()):
        return refusal
    return _handshake(found.target, headers, peer)


def _refuse(parser: Any, found: _Head, *, is_ascii: bool) -> Refusal | None:
    headers = found.headers
    for name in found.repeated:
        if name in _ONCE:
            return Refusal(400, f"{name} more than once")
    if not is_ascii:
        for name in _READ & headers.keys():
            if not headers[name].isascii():
                return Refusal(400, f"{name} is not ASCII")
    if parser.get_method() != b"GET":
        return Refusal(400, "a WebSocket begins with GET")
    if parser.get_http_version() != "1.1":
        return Refusal(400, "a WebSocket needs HTTP/1.1")
    if not headers.get("host"):
        return Refusal(400, "no host")
    if headers.get("content-length", "0") != "0" or "transfer-encoding" in headers:
        return Refusal(400, "a WebSocket handshake has no body")
    if not _has(headers, "upgrade", "websocket"):
        return Refusal(426, "upgrade: websocket")
    if not _has(headers, "connection", "upgrade"):
        return Refusal(400, "connection: upgrade")
    if headers.get("sec-websocket-version") != "13":
        return Refusal(426, "sec-websocket-version: 13")
    if not _is_key(headers.get("sec-websocket-key", "")):
        return Refusal(400, "sec-websocket-key is not 16 bytes in base64")
    return None


def _handshake(
    target: bytes, headers: dict[str, str], peer: Callable[[], str]
) -> ClientRequest | Refusal:
    if b"#" in target:
        return Refusal(400, "malformed request")
    try:
        path, query = _path_and_query(target.decode("ascii"))
    except ValueError:
        return Refusal(400, "malformed request")
    if (endpoint := ENDPOINTS.get(path) or ENDPOINTS.get(unquote(path))) is None:
        return Refusal(404, "no such endpoint")
    return ClientRequest(
        endpoint, read_query(query), headers, headers["sec-websocket-key"], peer=peer
    )


def _path_and_query(target: str) -> tuple[str, str]:
    """Split a request target (RFC 9112, 3.2.1). In ``//a/b`` urlsplit would see a host."""
    if target.startswith("/"):
        path, _, query = target.partition("?")
        return path, query
    url = urlsplit(target)
    return url.path, url.query


def _has(headers: Mapping[str, str], name: str, token: str) -> bool:
    """Whether a header's list of tokens contains this one, in any case (RFC 9110, 5.6.1)."""
    value = headers.get(name, "").lower()
    return value == token or token in map(str.strip, value.split(","))


def _is_key(text: str) -> bool:
    try:
        return len(binascii.a2b_base64(text, strict_mode=True)) == 16
    except (binascii.Error, ValueError):
        return False


_ACCEPTANCE: Final = (
    b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
    b"Sec-WebSocket-Accept: %b\r\n%b\r\n"
)


def acceptance(request: ClientRequest, extensions: str | None = None) -> bytes:
    """Return the response that opens the WebSocket (RFC 6455, 4.2.2)."""
    digest = hashlib.sha1(request.key.encode() + _GUID, usedforsecurity=False).digest()
    lines = b""
    if request.subprotocol:
        lines = b"Sec-WebSocket-Protocol: %b\r\n" % request.subprotocol.encode()
    if extensions:
        lines += b"Sec-WebSocket-Extensions: %b\r\n" % extensions.encode()
    return _ACCEPTANCE % (binascii.b2a_base64(digest, newline=False), lines)


_PHRASES: Final = {
    400: "Bad Request",
    404: "Not Found",
    408: "Request Timeout",
    426: "Upgrade Required",
    431: "Request Header Fields Too Large",
    503: "Service Unavailable",
}


def refusal_response(refusal: Refusal) -> bytes:
    """Return the response that refuses an upgrade and announces that the connection closes."""
    body = f"{refusal.reason}\n".encode()
    lines = [
        f"HTTP/1.1 {refusal.status} {_PHRASES[refusal.status]}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(body)}",
        "Connection: close",
    ]
    if refusal.status == 426:  # RFC 9110, 15.5.22, and RFC 6455, 4.4
        lines += ["Upgrade: websocket", "Sec-WebSocket-Version: 13"]
    if refusal.status == 503:
        lines.append("Retry-After: 1")
    return "\r\n".join([*lines, "", ""]).encode() + body
