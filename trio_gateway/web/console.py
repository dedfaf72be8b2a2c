"""The console: a page for operators, and in development two routes that its playground uses."""

import base64
import hashlib
import re
import secrets
import time
from importlib.resources import files
from typing import Annotated, Final, TypeVar

import msgspec
from quart import Response, jsonify, request

from ..broker.commands import Unavailable
from ..core.audiences import ENDPOINTS, Principal
from ..core.client_request import bearer
from ..core.close_codes import Close, Rejected
from ..core.events import InvalidEvent, parse_event
from ..core.minting import lifetime, mint, signing_algorithm, staff_claims, table_claims
from ..core.origins import host_of, is_loopback
from ..core.routing import channel_for
from ..parts import Parts
from ..stats_feed import may_watch
from .responses import Answer, identify, problem, refusal

T = TypeVar("T")

TOKEN_LIFE: Final = 3600  # seconds
_FORWARDED: Final = ("Forwarded", "Via", "X-Forwarded-For", "X-Real-Ip")

# The page


def _read(name: str) -> str:
    return files("trio_gateway").joinpath("static", name).read_text("utf-8")


_PAGE: Final = _read("console.html")
_GATE: Final = _read("console-gate.html")


def _allowed(tag: str) -> str:
    """What stands inline in the two pages, by its hash (CSP 3, 2.3.1)."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", _PAGE + _GATE, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
    return " ".join(f"'sha256-{each.decode()}'" for each in hashes)


_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_allowed('script')} 'self'; "  # itself: client.js
        f"style-src {_allowed('style')}; worker-src blob:; "
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
            await _admit(parts)
            await _redeem(parts)
        except Rejected as rejected:
            return _html(_GATE, rejected.close.status)
    text = _PAGE.replace("{environment}", parts.settings.environment)
    return _html(text.replace("{tokens}", str(parts.settings.ws_console_tokens).lower()), 200)


async def _admit(parts: Parts) -> Principal:
    """The ADMIN who asks, else :exc:`Rejected`. A ticket is good until :func:`_redeem`."""
    token, ticket = bearer(request.headers.get("Authorization")), request.args.get("ticket")
    for principal in await identify(parts, token, staff=True, ticket=ticket):
        if may_watch(principal):
            return principal
    raise Rejected(Close.FORBIDDEN, "for the role ADMIN only", "role")


async def _redeem(parts: Parts) -> None:
    """Use the ticket up, if there is one, when nothing else can refuse the request."""
    if (ticket := request.args.get("ticket")) is not None:
        await parts.admission.redeem(ticket)


def _html(text: str, status: int) -> Answer:
    headers = dict(_HEADERS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(text, status, headers, content_type="text/html; charset=utf-8")


# In development only


class _Wanted(msgspec.Struct):
    """Whose token: staff with these claims, or a table's."""

    endpoint: str
    tenant_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    branch_ids: tuple[int, ...] = (1,)
    sector_ids: tuple[int, ...] = ()
    session_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    table_id: Annotated[int, msgspec.Meta(gt=0)] = 1


class _Sample(msgspec.Struct):
    event: msgspec.Raw


async def token(parts: Parts) -> Answer:
    """Development only, where `WS_CONSOLE_TOKENS` allows it: a token for the playground."""
    if not parts.settings.ws_console_tokens:
        return problem(404, "not found")
    # What makes tokens for whoever asks is for this machine: not for who comes through a proxy
    # on it, nor for a page under a name that was pointed here.
    if not (is_loopback(request.remote_addr or "") and is_loopback(host_of(request.host))) or any(
        name in request.headers for name in _FORWARDED
    ):
        return problem(403, "only for a browser on the gateway's own machine")
    wanted = await _asked(_Wanted)
    if not isinstance(wanted, _Wanted):
        return wanted
    endpoint = ENDPOINTS.get(f"/ws/{wanted.endpoint}")
    if endpoint is None:
        return problem(422, "unknown endpoint")
    settings = parts.settings
    life = lifetime(time.time(), TOKEN_LIFE)
    if not endpoint.staff:
        if not wanted.branch_ids:
            return problem(422, "a table token needs a branch")
        claims = table_claims(
            tenant=wanted.tenant_id,
            branch=wanted.branch_ids[0],
            table=wanted.table_id,
            session=wanted.session_id,
        )
        return jsonify(token=mint(claims | life, settings.table_secret))
    algorithm = signing_algorithm(settings.jwt_algorithms)
    if algorithm is None:
        return problem(422, "JWT_ALGORITHMS has no HMAC algorithm to sign with")
    claims = staff_claims(
        tenant=wanted.tenant_id,
        user=secrets.randbelow(10**9) + 10**9,
        branches=wanted.branch_ids,
        roles=[endpoint.label.upper()],
        sectors=wanted.sector_ids,
        rules=settings.rules,
    )
    return jsonify(token=mint(claims | life, settings.staff_secret, algorithm))


async def publish(parts: Parts) -> Answer:
    """Development only: an ADMIN publishes a sample for its tenant, if durable on a stream."""
    if parts.settings.production:
        return problem(404, "not found")
    try:
        admin = await _admit(parts)
    except Rejected as rejected:
        return refusal(rejected)
    sample = await _asked(_Sample)
    if not isinstance(sample, _Sample):
        return sample
    payload = bytes(sample.event)
    try:
        event = parse_event(payload, channel="", received_at=0)
    except InvalidEvent as invalid:
        return problem(422, f"event: {invalid}")
    if event.tenant != admin.tenant:
        return problem(403, "the event is of another tenant")
    try:
        await _redeem(parts)
    except Rejected as rejected:
        return refusal(rejected)
    routes, streams = parts.settings.routes, parts.settings.redis_streams
    try:
        if routes.is_durable(event.type) and streams:
            await parts.commands.add(streams[0], {"data": payload})  # others' stream: not trimmed
            return jsonify(stream=streams[0])
        channel = channel_for(event, routes)
        await parts.commands.publish(channel, payload)
    except Unavailable:
        return problem(503, "Redis does not answer")
    return jsonify(channel=channel)


async def _asked(kind: type[T]) -> T | Answer:
    """The body of a request from a page of our own: no other can send JSON without asking first
    (Fetch, 3.2.2), which we don't answer.
    """
    if request.mimetype != "application/json":
        return problem(415, "the body must be application/json")
    try:
        return msgspec.json.decode(await request.get_data(as_text=False), type=kind)
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, "not a JSON object")
