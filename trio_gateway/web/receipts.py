"""``/ws/receipts``: who has received an event, and what clients confirm by HTTP."""

from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
import trio
from quart import Response, request

from ..broker.commands import Unavailable
from ..core.audiences import Endpoint
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..core.control_messages import FlushReceipts
from ..core.receipt_report import Asker, describe_receipts, is_kept
from ..core.receipts import Place, read_place
from ..parts import Parts
from ..runtime.concurrency_limiter import Overloaded
from ..runtime.resume import PATIENCE
from .responses import Answer, identify, problem, refusal, respond

_UNKNOWN: Final = "no receipts are known of this event"


class Confirmation(msgspec.Struct):
    """What a client confirms: everything up to an event, or that it has seen one."""

    last_event_id: str | None = None
    event_id: str | None = None

    def __post_init__(self) -> None:
        if (self.last_event_id is None) == (self.event_id is None):
            raise ValueError("needs one of last_event_id and event_id")


async def read(parts: Parts) -> Answer:
    """Who has received an event, see Receipts; for a MANAGER or ADMIN of its branch."""
    return await for_admin(parts, report)


async def for_admin(
    parts: Parts, report: Callable[[Parts, Place, Asker], Awaitable[Answer]]
) -> Answer:
    """Answer a MANAGER or ADMIN about the event that the query names."""
    token = request.args.get("token") or bearer(request.headers.get("Authorization"))
    try:
        principals = await identify(parts, token, staff=True)
    except Rejected as rejected:
        return refusal(rejected)
    if (place := read_place(request.args.get("event_id", ""))) is None:
        return problem(422, "event_id must be the id of one event")
    admin = next((each for each in principals if each.endpoint is Endpoint.ADMIN), None)
    if admin is None:
        return problem(403, "for the roles MANAGER and ADMIN only")
    try:
        give_back = await parts.catch_ups.take(admin.owner)
    except Overloaded:
        return problem(429, "too many simultaneous requests of this user", retry_after=1)
    try:
        return await report(parts, place, Asker.admin(admin))
    finally:
        give_back()


async def confirm(parts: Parts) -> Answer:
    """Confirm an event, see Receipts; for clients that cannot send messages, with their token."""
    token = bearer(request.headers.get("Authorization"))
    try:
        principals = await identify(parts, token)
    except Rejected as rejected:
        return refusal(rejected)
    if principals[0].endpoint.staff and not _is_from_allowed_page(parts):
        return problem(403, "origin not allowed")
    try:
        body = msgspec.json.decode(await request.get_data(as_text=False), type=Confirmation)
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, 'not a JSON object {"last_event_id": "…"} or {"event_id": "…"}')
    if (place := read_place(body.event_id or body.last_event_id or "")) is None:
        return problem(422, "event_id or last_event_id must be the id of one event")
    tenant = principals[0].tenant
    with parts.following.client_of(tenant):  # this process need not have read its stream before
        if not await parts.places.wait_known(tenant, PATIENCE):
            return problem(503, "the events have not been read from Redis yet", retry_after=1)
        with trio.move_on_after(PATIENCE):  # another process may have read on further
            if await parts.places.after({place.stream: place.position}, tenant) is not None:
                for principal in principals:
                    if body.event_id is not None:
                        parts.receipts.see_earlier(principal, place)
                    else:
                        parts.receipts.confirm_earlier(principal, place, names_event=True)
    return Response(b"", 204)  # without a body, Quart runs asyncio code to make one


def _is_from_allowed_page(parts: Parts) -> bool:
    """Whether staff may use the page that sent this request; the preflight request allowed any."""
    origin = request.headers.get("Origin")
    return origin is None or parts.admission.is_allowed(origin, request.headers.get("Host", ""))


async def report(parts: Parts, place: Place, asker: Asker) -> Answer:
    """The response about an event."""
    try:
        missing = await flush(parts)
        found = await parts.receipt_store.read(place)
    except KeyError:  # the stream is not ours
        return problem(404, _UNKNOWN)
    except Unavailable as error:
        return problem(503, error.cause, retry_after=1)
    routes, ttl = parts.settings.routes, parts.settings.ws_receipt_ttl
    if (
        found is None
        or not is_kept(found.event, routes, ttl, parts.clock())
        or not asker.may_know(found.event)
    ):
        return problem(404, _UNKNOWN)
    return respond(describe_receipts(place, found, routes, missing, asker.may_name))


async def flush(parts: Parts) -> list[str]:
    """Have all processes write their receipts to Redis; return those that did not answer.

    Raises :exc:`Unavailable`.
    """
    if parts.cluster is not None:
        return (await parts.cluster.control.ask("flush_receipts", FlushReceipts())).missing
    if not await parts.receipt_writing.flush(parts.receipt_store.write):
        raise Unavailable("receipts not written")
    return []
