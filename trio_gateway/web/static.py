"""What is served as it stands: the JavaScript client, and the contract for machines.

It is public: no credential is asked for, and pages of any origin may load it.
"""

import json
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Final

from quart import Response, request
from quart_trio import QuartTrio

from ..settings import Settings
from .asyncapi import describe

# Path: the file, its type, and headers beside those that all have.
FILES: Final[Mapping[str, tuple[str, str, Mapping[str, str]]]] = {
    "/ws/client.js": ("client.js", "text/javascript", {"X-TypeScript-Types": "./client.d.ts"}),
    "/ws/client.d.ts": ("client.d.ts", "application/typescript", {}),
}
CONTRACT: Final = "/ws/asyncapi.json"
_HEADERS: Final = {
    "Access-Control-Allow-Origin": "*",
    "Cache-Control": "no-cache",  # kept, but asked for again: then 304
    "Cross-Origin-Resource-Policy": "cross-origin",
    "X-Content-Type-Options": "nosniff",
}


def add_files(app: QuartTrio, settings: Settings) -> None:
    """Give the app a route for each of the files, which are read now, once, and the contract."""
    for path, (name, content_type, headers) in FILES.items():
        body = files("trio_gateway").joinpath("static", name).read_bytes()
        app.add_url_rule(path, path, _served(body, content_type, {**_HEADERS, **headers}))
    contract = json.dumps(describe(settings)).encode()
    app.add_url_rule(CONTRACT, CONTRACT, _served(contract, "application/json", _HEADERS))


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
