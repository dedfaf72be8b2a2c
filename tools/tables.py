"""The tables of the docs, generated from tables in the code and from measured figures.

``python -m tools.tables`` renews them. A table is between ``<!-- generated: NAME -->`` and
``<!-- end -->``. A test fails if it differs from the code.
"""

import re
from collections.abc import Callable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Final

from trio_gateway.core.audiences import Endpoint, Role
from trio_gateway.core.close_codes import Close
from trio_gateway.core.message_schemas import ANSWERS, REQUESTS
from trio_gateway.core.routing import ROUTES
from trio_gateway.transports.sse import PATHS
from trio_gateway.web.routes import HTTP
from trio_gateway.web.static import ASYNCAPI, FILES, OPENAPI

from . import performance
from .markdown import table

DOCS: Final = Path(__file__).parent.parent / "docs"
PAGE: Final = DOCS / "protocol.md"
FIGURES: Final = (DOCS / "performance.md", DOCS / "deploy.md")
_TABLE: Final = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->\n)", re.DOTALL)


def _code(text: str) -> str:
    return f"`{text}`"


def endpoints() -> str:
    rows = [
        (
            _code(endpoint.path),
            "staff JWT" if endpoint.staff else "table token",
            ", ".join(role for role in Role if role in endpoint.roles) or "none needed",
            "yes" if endpoint.staff else "no",
        )
        for endpoint in Endpoint
    ]
    return table(("path", "credential", "roles admitted", "Origin checked"), *rows)


def requests() -> str:
    rows = [
        (
            _code(each.example),
            "none" if each.answer is None else _code(ANSWERS[each.answer].example),
            each.note,
        )
        for each in REQUESTS.values()
    ]
    others = [
        ("any other text", "none", "it counts as a heartbeat"),
        ("a binary frame", f"close {Close.UNSUPPORTED_DATA}", ""),
    ]
    return table(("text frame", "answer", ""), *rows, *others)


def answers() -> str:
    rows = [(_code(each.example), each.note) for each in ANSWERS.values()]
    return table(("text frame", "what it means"), *rows)


def closes() -> str:
    rows = [(str(int(close)), close.name, close.when, close.then) for close in Close if close.sent]
    return table(("code", "name", "when", "the client should"), *rows)


def routes() -> str:
    rows = []
    for route, types in groupby(ROUTES, ROUTES.__getitem__):
        to = ", ".join(to.name.lower() for to in route.to if to.name)
        rows.append((", ".join(map(_code, types)), to, "yes" if route.durable else "no"))
    return table(("type", "to", "durable"), *rows)


def http() -> str:
    rows = []
    for (method, path), view in HTTP.items():
        words = (view.__doc__ or "").partition("\n")[0].removesuffix(".")
        rows.append((_code(f"{method} {path}"), words))
    streams = ", ".join(_code(f"GET {path}") for path in PATHS)
    rows.append((streams, "see Server-Sent Events"))
    rows.append((_code(f"GET {ASYNCAPI}"), "this contract as an AsyncAPI document; public"))
    rows.append((_code(f"GET {OPENAPI}"), "the API for backends as an OpenAPI document; public"))
    files = ", ".join(_code(f"GET {path}") for path in FILES)
    rows.append((files, "the JavaScript client and its types; public, for pages of any origin"))
    return table(("path", "answer"), *rows)


TABLES: Final[Mapping[str, Callable[[], str]]] = {
    made.__name__: made for made in (endpoints, requests, answers, closes, routes, http)
}


def renewed(page: str, made: Mapping[str, Callable[[], str]] = TABLES) -> str:
    """Return the page with new tables. Raises :exc:`KeyError` for an unknown name."""
    return _TABLE.sub(lambda found: f"{found[1]}\n{made[found[2]]()}\n{found[3]}", page)


if __name__ == "__main__":
    PAGE.write_text(renewed(PAGE.read_text("utf-8")), "utf-8")
    for path in FIGURES:
        path.write_text(renewed(path.read_text("utf-8"), performance.tables()), "utf-8")
