"""The files that the gateway serves as they stand in the package: the JavaScript client.

They are public: no credential is asked for, and pages of any origin may load them.
"""

from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import TYPE_CHECKING, Final

from quart import Response, request

if TYPE_CHECKING:
    from ..gateway import Gateway

# Path: the file, its type, and headers beside those that all have.
FILES: Final[Mapping[str, tuple[str, str, Mapping[str, str]]]] = {
    "/ws/client.js": ("client.js", "text/javascript", {"X-TypeScript-Types": "./client.d.ts"}),
    "/ws/client.d.ts": ("client.d.ts", "application/typescript", {}),
}
_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "no-cache",  # kept, but asked for again: then 304
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def add_files(app: "Gateway") -> None:
    """Give the app a route for each of the files; they are read now, once."""
    for path, (name, content_type, headers) in FILES.items():
        body = files("trio_gateway").joinpath("static", name).read_bytes()
        app.add_url_rule(path, path, _served(body, content_type, {**_HEADERS, **headers}))


def _served(
    body: bytes, content_type: str, headers: Mapping[str, str]
) -> Callable[[], Awaitable[Response]]:
    async def view() -> Response:
        response = Response(
            body, headers=dict(headers), content_type=f"{content_type}; charset=utf-8"
        )
        await response.add_etag()
        return await response.make_conditional(request)

    return view
