"""CORS: which pages may call which HTTP paths from a browser (Fetch, 3.3).

It works on ASGI messages, below Quart, so that every response to a page has the headers, including
Quart's error responses and event streams. Cookies are never allowed: credentials are tokens.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..core.audiences import Endpoint

Send = Callable[[Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class SharedPath:
    """A path that pages of other origins may call: those in ALLOWED_ORIGINS with all ``methods``,
    every other with those in ``any_origin``.
    """

    methods: tuple[str, ...]
    any_origin: tuple[str, ...] = ()


PATHS: Final[Mapping[str, SharedPath]] = {
    "/ws/ticket": SharedPath(("POST",)),
    "/ws/catchup": SharedPath(("GET",)),
    "/ws/catchup/session": SharedPath(("GET",), any_origin=("GET",)),
    "/ws/explain": SharedPath(("POST",)),
    "/ws/presence": SharedPath(("GET",)),
    # A diner may confirm, and a preflight request does not show whose token it is.
    "/ws/receipts": SharedPath(("GET", "POST"), any_origin=("POST",)),
    **{
        f"{each.path}/events": SharedPath(("GET",), any_origin=() if each.staff else ("GET",))
        for each in Endpoint
    },
}
# Without cookies, `*` means every header except Authorization. Older browsers need the names.
_ALLOWED_HEADERS: Final = b"Authorization, Content-Type, Last-Event-ID, Cache-Control, *"
_EXPOSED_HEADERS: Final = b"Retry-After, WWW-Authenticate, Gateway-Complete"
_ANY: Final = b"*"
_MAX_AGE: Final = b"600"  # seconds for which a browser may cache the preflight


def response_headers(
    shared: SharedPath,
    method: str,
    request: Iterable[tuple[bytes, bytes]],
    is_allowed: Callable[[str], bool],
) -> Headers:
    """Return the headers for every response to this method on this path; ``is_allowed`` decides on
    an origin.
    """
    vary = [] if method in shared.any_origin else [(b"vary", b"Origin")]
    if (origin := _allowed_origin(shared, method, request, is_allowed)) is None:
        return vary
    return [
        *vary,
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED_HEADERS),
    ]


async def answer_options(
    shared: SharedPath,
    request: Iterable[tuple[bytes, bytes]],
    is_allowed: Callable[[str], bool],
    send: Send,
) -> None:
    """Answer an OPTIONS request, such as a browser's preflight (Fetch, 4.9).

    Without the headers the browser refuses the call, whatever the status is.
    """
    method = "".join(_values(request, b"access-control-request-method"))
    headers = response_headers(shared, method, request, is_allowed)
    if (origin := _allowed_origin(shared, method, request, is_allowed)) is not None:
        methods = shared.any_origin if origin == _ANY else shared.methods
        headers += [
            (b"access-control-allow-methods", ", ".join(methods).encode()),
            (b"access-control-allow-headers", _ALLOWED_HEADERS),
            (b"access-control-max-age", _MAX_AGE),
        ]
        # A page of the public web that calls a gateway in a private network needs this, too.
        if _values(request, b"access-control-request-private-network") == ["true"]:
            headers.append((b"access-control-allow-private-network", b"true"))
    headers.append((b"allow", f"{', '.join(shared.methods)}, OPTIONS".encode()))
    await send({"type": "http.response.start", "status": 204, "headers": headers})
    await send({"type": "http.response.body", "body": b"", "more_body": False})


def adding(headers: Headers, send: Send) -> Send:
    """A ``send`` that adds these headers to the response."""

    async def send_with_headers(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *headers]}
        await send(message)

    return send_with_headers


def _allowed_origin(
    shared: SharedPath,
    method: str,
    request: Iterable[tuple[bytes, bytes]],
    is_allowed: Callable[[str], bool],
) -> bytes | None:
    """Return the allowed origin to name in the response; None if the page's is not allowed."""
    if method in shared.any_origin:
        return _ANY
    origins = _values(request, b"origin")
    if len(origins) != 1 or not is_allowed(origins[0]):
        return None
    return origins[0].encode("latin-1")


def _values(request: Iterable[tuple[bytes, bytes]], name: bytes) -> list[str]:
    return [value.strip().decode("latin-1") for each, value in request if each.lower() == name]
