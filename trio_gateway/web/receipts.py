"""``/ws/receipts``: who has received an event, and what clients confirm by HTTP."""

from collections.abc import Callable
from typing import Final

import msgspec
import trio
from quart import Response, request

from ..broker.commands import Unavailable
from ..core.audiences import Endpoint
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..core.control_messages import FlushReceipts
from ..core.event_ids import event_id
from ..core.receipts import Place, Receipt, Receipts, State, TrackedEvent, Who, read_place
from ..core.routing import names_of
from ..parts import Parts
from ..runtime.concurrency_limiter import Overloaded
from ..runtime.resume import PATIENCE
from .responses import Answer, identify, problem, refusal

_UNKNOWN: Final = "no receipts are known of this event"


class ReceiptReply(msgspec.Struct):
    """How far an event has come to one user, or session, on an endpoint; ``at`` is unix time."""

    endpoint: str
    state: str
    at: float | None
    user_id: str | msgspec.UnsetType = msgspec.UNSET
    session_id: int | msgspec.UnsetType = msgspec.UNSET


class StepReply(msgspec.Struct):
    """An audience that the event was sent to later; ``at`` is unix time."""

    to: str
    at: float


class ReceiptsReply(msgspec.Struct):
    """Who has received an event. ``missing`` are processes whose receipts may not be counted."""

    event_id: str
    type: str
    at: float
    written: int
    delivered: int
    seen: int
    by: list[ReceiptReply]
    steps: list[StepReply]
    complete: bool
    missing: list[str]


class Confirmation(msgspec.Struct):
    """What a client confirms: everything up to an event, or that it has seen one."""

    last_event_id: str | None = None
    event_id: str | None = None

    def __post_init__(self) -> None:
        if (self.last_event_id is None) == (self.event_id is None):
            raise ValueError("needs one of last_event_id and event_id")


async def read(parts: Parts) -> Answer:
    """Who has received an event, see Receipts; for a MANAGER or ADMIN of its branch."""
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
    tenant, branches = admin.tenant, admin.branches
    try:
        give_back = await parts.catch_ups.take(admin.owner)
    except Overloaded:
        return problem(429, "too many simultaneous requests of this user", retry_after=1)
    try:
        return await report(
            parts,
            place,
            lambda event: event.tenant_id == tenant and event.branch_id in (0, *branches),
            lambda receipt: not receipt.branches or not receipt.branches.isdisjoint(branches),
        )
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
                        parts.receipts.confirm_earlier(principal, place)
    return Response(status=204)


def _is_from_allowed_page(parts: Parts) -> bool:
    """Whether staff may use the page that sent this request; the preflight request allowed any."""
    origin = request.headers.get("Origin")
    return origin is None or parts.admission.is_allowed(origin, request.headers.get("Host", ""))


async def report(
    parts: Parts,
    place: Place,
    may_know: Callable[[TrackedEvent], bool],
    may_name: Callable[[Receipt], bool] = lambda receipt: True,
) -> Answer:
    """The response about an event. For who may not know of it, it does not exist.

    ``may_name`` says whose receipts are named; all are counted.
    """
    missing: list[str] = []
    try:
        if parts.cluster is None:
            if not await parts.receipt_writing.flush(parts.receipt_store.write):
                raise Unavailable("receipts not written")
        else:
            missing = (await parts.cluster.control.ask("flush_receipts", FlushReceipts())).missing
        found = await parts.receipt_store.read(place)
    except KeyError:  # the stream is not ours
        return problem(404, _UNKNOWN)
    except Unavailable as error:
        return problem(503, error.cause, retry_after=1)
    if found is None or not (_is_kept(parts, found.event) and may_know(found.event)):
        return problem(404, _UNKNOWN)
    reply = _describe(parts, place, found, missing, may_name)
    response = Response(msgspec.json.encode(reply), content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response


def _is_kept(parts: Parts, event: TrackedEvent) -> bool:
    return (
        event.type in parts.settings.routes.tracked_types
        and event.at / 1000 + parts.settings.ws_receipt_ttl > parts.clock()
    )


def _describe(
    parts: Parts,
    place: Place,
    found: Receipts,
    missing: list[str],
    may_name: Callable[[Receipt], bool],
) -> ReceiptsReply:
    steps = parts.settings.routes.route_of(found.event.type).steps
    by = {who: each for who, each in found.by.items() if each.state >= State.WRITTEN}
    written, delivered, seen = (
        sum(receipt.state >= state for receipt in by.values())
        for state in (State.WRITTEN, State.DELIVERED, State.SEEN)
    )
    return ReceiptsReply(
        event_id=event_id(*place),
        type=found.event.type,
        at=found.event.at / 1000,
        written=written,
        delivered=delivered,
        seen=seen,
        by=[_describe_one(who, by[who]) for who in sorted(by) if may_name(by[who])],
        steps=[
            StepReply(names_of(steps[step + 1].to)[0], at / 1000)
            for step, at in sorted(found.steps.items())
            if step + 1 < len(steps)
        ],
        complete=not missing,
        missing=missing,
    )


def _describe_one(who: Who, receipt: Receipt) -> ReceiptReply:
    is_diner = who.endpoint == Endpoint.DINER.label
    return ReceiptReply(
        endpoint=who.endpoint,
        state=receipt.state.label,
        at=None if receipt.at is None else receipt.at / 1000,
        user_id=msgspec.UNSET if is_diner else who.id,
        session_id=int(who.id) if is_diner else msgspec.UNSET,
    )
