"""Answers: what the HTTP routes have in common. Who asks, and how he is refused."""

import trio
from quart import Response, jsonify, request

from ..core.audiences import Principal
from ..core.close_codes import RETRY_AFTER, Close, Rejected
from ..parts import Parts

Answer = tuple[Response, int] | Response


async def identify(
    parts: Parts,
    token: str | None,
    *,
    staff: bool | None = None,
    ticket: str | None = None,
) -> list[Principal]:
    """Who holds this token, or the one that the ticket stands for, which is not redeemed by this.

    An invalid one counts for the address as it does at connect.
    """
    forwarded_for = ", ".join(request.headers.getlist("X-Forwarded-For"))
    address = parts.addresses.of(lambda: request.remote_addr or "", forwarded_for)
    parts.addresses.check(address, trio.current_time())
    try:
        if ticket is not None:
            token = await parts.admission.token_of(ticket)
        return await parts.admission.identify(token, staff=staff)
    except Rejected as rejected:
        if rejected.close is Close.AUTH_FAILED:
            parts.addresses.failed(address, trio.current_time())
        raise


def refusal(rejected: Rejected) -> Answer:
    """The response to a client that is not admitted."""
    return problem(rejected.status, rejected.text, retry_after=rejected.retry_after)


def problem(status: int, text: str, *, retry_after: int | None = None) -> Answer:
    """An error; ``retry_after`` is in seconds."""
    response = jsonify(error=text)
    response.headers["Cache-Control"] = "no-store"
    if (after := retry_after or RETRY_AFTER.get(status)) is not None:
        response.headers["Retry-After"] = str(after)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response, status
