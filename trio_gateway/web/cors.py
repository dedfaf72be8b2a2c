"""CORS: which pages may call which of the HTTP paths from a browser (Fetch, 3.3).

It works on ASGI messages, beneath Quart, so that every answer to a page has the headers: errors
that Quart raises, and a stream of events, too. Cookies are never allowed: credentials are tokens.
"""

from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from ..core.audiences import Endpoint

Send = Callable[[Any], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]


@dataclass(frozen=True, slots=True)
class Shared:
    """A path that pages may call."""

    method: str
    any_origin: bool = False  # else the origins that staff may connect from


PATHS: Final[Mapping[str, Shared]] = {
    "/ws/ticket": Shared("POST"),
    "/ws/catchup": Shared("GET"),
    "/ws/catchup/session": Shared("GET", any_origin=True),
    "/ws/explain": Shared("POST"),
    **{f"{each.path}/events": Shared("GET", any_origin=not each.staff) for each in Endpoint},
}
# Without cookies `*` stands for every header but Authorization; older browsers read the others.
_ALLOWED_HEADERS: Final = b"Authorization, Content-Type, Last-Event-ID, Cache-Control, *"
_EXPOSED_HEADERS: Final = b"Retry-After, WWW-Authenticate, Gateway-Complete"
_MAX_AGE: Final = b"600"  # seconds that a browser need not ask again


def response_headers(
    shared: Shared, request: Iterable[tuple[bytes, bytes]], is_allowed: Callable[[str], bool]
) -> Headers:
    """What every answer on this path has; ``is_allowed`` decides about an origin."""
    vary = [] if shared.any_origin else [(b"vary", b"Origin")]
    if (origin := _allowed_origin(shared, request, is_allowed)) is None:
        return vary
    return [
        *vary,
        (b"access-control-allow-origin", origin),
        (b"access-control-expose-headers", _EXPOSED_HEADERS),
    ]


async def answer_options(
    shared: Shared,
    request: Iterable[tuple[bytes, bytes]],
    is_allowed: Callable[[str], bool],
    send: Send,
) -> None:
    """Answer OPTIONS, a browser's preflight (Fetch, 4.9) in particular.

    A browser takes the absence of the headers for a no, whatever the status.
    """
    headers = response_headers(shared, request, is_allowed)
    if _allowed_origin(shared, request, is_allowed) is not None:
        headers += [
            (b"access-control-allow-methods", shared.method.encode()),
            (b"access-control-allow-headers", _ALLOWED_HEADERS),
            (b"access-control-max-age", _MAX_AGE),
        ]
        # A public page that calls a gateway in the browser's own network asks for this, too.
        if _values(request, b"access-control-request-private-network") == [b"true"]:
            headers.append((b"access-control-allow-private-network", b"true"))
    headers.append((b"allow", f"{shared.method}, OPTIONS".encode()))
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
    shared: Shared, request: Iterable[tuple[bytes, bytes]], is_allowed: Callable[[str], bool]
) -> bytes | None:
    """What to name as the allowed origin; None if this page's is not."""
    if shared.any_origin:
        return b"*"
    origins = _values(request, b"origin")
    if len(origins) != 1 or not is_allowed(origins[0].decode("latin-1")):
        return None
    return origins[0]


def _values(request: Iterable[tuple[bytes, bytes]], name: bytes) -> list[bytes]:
    return [value.strip() for each, value in request if each.lower() == name]
