"""Answers: what the HTTP routes have in common. Who asks, and how he is refused."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

import trio
from quart import Response, jsonify, request

from ..core.audiences import Principal
from ..core.close_codes import Close, Rejected

if TYPE_CHECKING:
    from ..gateway import Gateway

_STATUS: Final[Mapping[int, int]] = {
    Close.GOING_AWAY: 503,
    Close.POLICY_VIOLATION: 403,
    Close.INTERNAL_ERROR: 500,
    Close.SERVER_OVERLOADED: 503,
    Close.FORBIDDEN: 403,
    Close.RATE_LIMITED: 429,
}
RETRY_AFTER: Final[Mapping[int, int]] = {503: 1, 429: 60}  # seconds, where nothing else is known
_OWN_LIMIT_AGAIN: Final = 5  # seconds: connections that are dead are found in that time
Answer = tuple[Response, int] | Response


async def identify(
    app: "Gateway",
    token: str | None,
    *,
    staff: bool | None = None,
    ticket: str | None = None,
) -> list[Principal]:
    """Who holds this token, or the one that the ticket stands for, which is not redeemed by this.

    An invalid one counts for the address as it does at connect.
    """
    forwarded_for = ", ".join(request.headers.getlist("X-Forwarded-For"))
    address = app.addresses.of(lambda: request.remote_addr or "", forwarded_for)
    app.addresses.check(address, trio.current_time())
    try:
        if ticket is not None:
            token = await app.admission.token_of(ticket)
        return await app.admission.identify(token, staff=staff)
    except Rejected as rejected:
        if rejected.close is Close.AUTH_FAILED:
            app.addresses.failed(address, trio.current_time())
        raise


def status_of(close: int) -> int:
    """The HTTP status that refuses a client as this close code would."""
    return _STATUS.get(close, 401)


def refusal_status(rejected: Rejected) -> tuple[int, int | None]:
    """The HTTP status of a refusal, and the seconds after which to try again, if that helps.

    Load balancers take a 503 for a server that fails. What one client alone has caused is none.
    """
    if rejected.own_limit:
        return 429, _OWN_LIMIT_AGAIN
    status = status_of(rejected.close)
    return status, RETRY_AFTER.get(status)


def refusal(rejected: Rejected) -> Answer:
    status, retry_after = refusal_status(rejected)
    return problem(status, rejected.text, retry_after=retry_after)


def problem(status: int, text: str, *, retry_after: int | None = None) -> Answer:
    """An error; ``retry_after`` is in seconds."""
    response = jsonify(error=text)
    response.headers["Cache-Control"] = "no-store"
    if (after := retry_after or RETRY_AFTER.get(status)) is not None:
        response.headers["Retry-After"] = str(after)
    if status == 401:
        response.headers["WWW-Authenticate"] = "Bearer"
    return response, status
