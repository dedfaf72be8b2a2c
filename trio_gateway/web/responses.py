"""Shared by the HTTP routes: authentication and error responses."""

import msgspec
import trio
from quart import Response, jsonify, request

from ..core.audiences import Principal
from ..core.client_request import bearer
from ..core.close_codes import RETRY_AFTER, Close, Rejected
from ..parts import Parts
from ..stats_feed import may_watch

Answer = tuple[Response, int] | Response


async def identify(
    parts: Parts,
    token: str | None,
    *,
    staff: bool | None = None,
    ticket: str | None = None,
) -> list[Principal]:
    """Authenticate a token, or the token that a ticket was issued for.

    Returns the holder as a principal of each endpoint that admits the token; ``staff`` says which
    kind of token is expected (None: either). A ticket is not redeemed. An invalid token counts as
    a failed login of the client's address, as on connect. Raises :exc:`Rejected`.
    """
    address = _address(parts)
    parts.addresses.check(address, trio.current_time())
    try:
        if ticket is not None:
            token = await parts.admission.token_of(ticket)
        return await parts.admission.identify(token, staff=staff)
    except Rejected as rejected:
        if rejected.close is Close.AUTH_FAILED:
            parts.addresses.failed(address, trio.current_time())
        raise


def count_failed_login(parts: Parts) -> None:
    """Count a failed login of the request's address. Raises :exc:`Rejected` if it had too many."""
    address = _address(parts)
    parts.addresses.check(address, trio.current_time())
    parts.addresses.failed(address, trio.current_time())


def _address(parts: Parts) -> str:
    forwarded_for = ", ".join(request.headers.getlist("X-Forwarded-For"))
    return parts.addresses.of(lambda: request.remote_addr or "", forwarded_for)


async def identify_admin(parts: Parts) -> Principal:
    """The ADMIN that sent this request, by token or ticket.

    Raises :exc:`Rejected` for anybody else. A ticket stays valid until :func:`redeem_ticket`.
    """
    token, ticket = bearer(request.headers.get("Authorization")), request.args.get("ticket")
    for principal in await identify(parts, token, staff=True, ticket=ticket):
        if may_watch(principal):
            return principal
    raise Rejected(Close.FORBIDDEN, "for the role ADMIN only", "role")


async def redeem_ticket(parts: Parts) -> None:
    """Redeem the request's ticket, if it has one. Call it when nothing else can fail."""
    if (ticket := request.args.get("ticket")) is not None:
        await parts.admission.redeem(ticket)


def refusal(rejected: Rejected) -> Answer:
    """The response to a client that is not admitted."""
    return problem(rejected.status, rejected.text, retry_after=rejected.retry_after)


def respond(reply: object) -> Answer:
    """A JSON response, which no cache keeps."""
    response = Response(msgspec.json.encode(reply), content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def problem(status: int, text: str, *, retry_after: int | None = None) -> Answer:
    """An error response; ``retry_after`` is in seconds."""
    response = jsonify(error=text)
    response.headers["Cache-Control"] = "no-store"
    if (after := retry_after or RETRY_AFTER.get(status)) is not None:
        response.headers["Retry-After"] = str(after)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response, status
