"""Development only: the routes by which the console mints tokens and publishes events."""

import secrets
import time
from typing import Annotated, Final, TypeVar

import msgspec
from quart import jsonify, request

from ..broker.commands import Unavailable
from ..core.audiences import ENDPOINTS
from ..core.close_codes import Rejected
from ..core.events import InvalidEvent, parse_event
from ..core.minting import lifetime, mint, signing_algorithm, staff_claims, table_claims
from ..core.origins import host_of, is_loopback
from ..core.routing import channel_for
from ..parts import Parts
from .responses import Answer, identify_admin, problem, redeem_ticket, refusal

T = TypeVar("T")

TOKEN_LIFE: Final = 3600  # seconds
_FORWARDED: Final = ("Forwarded", "Via", "X-Forwarded-For", "X-Real-Ip")


class _TokenRequest(msgspec.Struct):
    """The claims of a staff token or a table token."""

    endpoint: str
    tenant_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    branch_ids: tuple[int, ...] = (1,)
    sector_ids: tuple[int, ...] = ()
    session_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    table_id: Annotated[int, msgspec.Meta(gt=0)] = 1


class _Publication(msgspec.Struct):
    event: msgspec.Raw


async def token(parts: Parts) -> Answer:
    """Development only, where `WS_CONSOLE_TOKENS` allows it: a token for the playground."""
    if not parts.settings.ws_console_tokens:
        return problem(404, "not found")
    # It mints tokens without authentication, so it serves only this machine: no client behind a
    # local proxy, and no page whose host name was made to resolve to this machine.
    if not (is_loopback(request.remote_addr or "") and is_loopback(host_of(request.host))) or any(
        name in request.headers for name in _FORWARDED
    ):
        return problem(403, "only for a browser on the gateway's own machine")
    body = await _read_body(_TokenRequest)
    if not isinstance(body, _TokenRequest):
        return body
    endpoint = ENDPOINTS.get(f"/ws/{body.endpoint}")
    if endpoint is None:
        return problem(422, "unknown endpoint")
    settings = parts.settings
    life = lifetime(time.time(), TOKEN_LIFE)
    if not endpoint.staff:
        if not body.branch_ids:
            return problem(422, "a table token needs a branch")
        claims = table_claims(
            tenant=body.tenant_id,
            branch=body.branch_ids[0],
            table=body.table_id,
            session=body.session_id,
        )
        return jsonify(token=mint(claims | life, settings.table_secret))
    algorithm = signing_algorithm(settings.jwt_algorithms)
    if algorithm is None:
        return problem(422, "JWT_ALGORITHMS has no HMAC algorithm to sign with")
    claims = staff_claims(
        tenant=body.tenant_id,
        user=secrets.randbelow(10**9) + 10**9,
        branches=body.branch_ids,
        roles=[endpoint.label.upper()],
        sectors=body.sector_ids,
        rules=settings.rules,
    )
    return jsonify(token=mint(claims | life, settings.staff_secret, algorithm))


async def publish(parts: Parts) -> Answer:
    """Development only: an ADMIN publishes an event for its tenant, durable ones on a stream."""
    if parts.settings.production:
        return problem(404, "not found")
    try:
        admin = await identify_admin(parts)
    except Rejected as rejected:
        return refusal(rejected)
    body = await _read_body(_Publication)
    if not isinstance(body, _Publication):
        return body
    payload = bytes(body.event)
    try:
        event = parse_event(payload, channel="", received_at=0)
    except InvalidEvent as invalid:
        return problem(422, f"event: {invalid}")
    if event.tenant != admin.tenant:
        return problem(403, "the event is of another tenant")
    try:
        await redeem_ticket(parts)
    except Rejected as rejected:
        return refusal(rejected)
    routes = parts.settings.routes
    try:
        if routes.is_durable(event.type) and parts.settings.redis_streams:
            stream = parts.settings.sharding.name_for_new(event.tenant)
            # Not trimmed: the backends decide how long their stream is.
            await parts.commands.add(stream, {"data": payload})
            return jsonify(stream=stream)
        channel = channel_for(event, routes)
        await parts.commands.publish(channel, payload)
    except Unavailable:
        return problem(503, "Redis does not answer")
    return jsonify(channel=channel)


async def _read_body(kind: type[T]) -> T | Answer:
    """Return the decoded JSON body, or an error response.

    Only pages of this gateway can send such a body: a browser sends JSON to another origin only
    after a preflight (Fetch, 3.2.2), which fails here.
    """
    if request.mimetype != "application/json":
        return problem(415, "the body must be application/json")
    try:
        return msgspec.json.decode(await request.get_data(as_text=False), type=kind)
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, "not a JSON object")
