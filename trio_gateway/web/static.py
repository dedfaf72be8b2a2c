"""Static files: the JavaScript client, and the AsyncAPI and OpenAPI documents.

They are public: no credential is needed, and pages of any origin may load them.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from functools import cache, partial
from importlib.resources import files
from typing import Final

from quart import Response, request
from quart_trio import QuartTrio

from ..settings import Settings
from . import asyncapi, openapi

# Path: the file, its type, and additional headers.
FILES: Final[Mapping[str, tuple[str, str, Mapping[str, str]]]] = {
    "/ws/client.js": ("client.js", "text/javascript", {"X-TypeScript-Types": "./client.d.ts"}),
    "/ws/client.d.ts": ("client.d.ts", "application/typescript", {}),
}
ASYNCAPI: Final = "/ws/asyncapi.json"
OPENAPI: Final = "/ws/openapi.json"
_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "no-cache",  # stored, but revalidated each time (304)
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def add_files(app: QuartTrio, settings: Settings) -> None:
    """Add routes for the files, read now, and for the documents, made at the first request."""
    for path, (name, content_type, headers) in FILES.items():
        body = files("trio_gateway").joinpath("static", name).read_bytes()
        view = _view_of(partial(bytes, body), content_type, {**_HEADERS, **headers})
        app.add_url_rule(path, path, view)

    for path, describe in {ASYNCAPI: asyncapi.describe, OPENAPI: openapi.describe}.items():
        document = cache(partial(_encoded, describe, settings))
        app.add_url_rule(path, path, _view_of(document, "application/json", _HEADERS))


def _encoded(describe: Callable[[Settings], object], settings: Settings) -> bytes:
    return json.dumps(describe(settings)).encode()


def _view_of(
    body: Callable[[], bytes], content_type: str, headers: Mapping[str, str]
) -> Callable[[], Awaitable[Response]]:
    async def view() -> Response:
        response = Response(
            body(), headers=dict(headers), content_type=f"{content_type}; charset=utf-8"
        )
        await response.add_etag()
        return await response.make_conditional(request)

    return view
