"""The console: a page for operators."""

import base64
import hashlib
import re
from importlib.resources import files
from typing import Final

from quart import Response

from ..core.close_codes import Rejected
from ..parts import Parts
from .responses import Answer, identify_admin, redeem_ticket


def _read(name: str) -> str:
    return files("trio_gateway").joinpath("static", name).read_text("utf-8")


_PAGE: Final = _read("console.html")
_GATE: Final = _read("console-gate.html")


def _hashes_of(tag: str) -> str:
    """Return the CSP sources of both pages' inline elements: their hashes (CSP 3, 2.3.1)."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", _PAGE + _GATE, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
    return " ".join(f"'sha256-{each.decode()}'" for each in hashes)


_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_hashes_of('script')} 'self'; "  # 'self' is for client.js
        f"style-src {_hashes_of('style')}; worker-src blob:; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page(parts: Parts) -> Answer:
    """The console; in production for an ADMIN's token or ticket."""
    if parts.settings.production:
        try:
            await identify_admin(parts)
            await redeem_ticket(parts)
        except Rejected as rejected:
            return _html(_GATE, rejected.close.status)
    settings, text = parts.settings, _PAGE
    values = {
        "environment": settings.environment,
        "tokens": str(settings.ws_console_tokens).lower(),
        "cluster": str(settings.ws_cluster).lower(),
    }
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return _html(text, 200)


def _html(text: str, status: int) -> Answer:
    headers = dict(_HEADERS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(text, status, headers, content_type="text/html; charset=utf-8")
