"""``/ws/receipts``: who has received an event, and what clients confirm by HTTP."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, Final

import msgspec
from quart import Response, jsonify, request

from ..broker.commands import Unavailable
from ..broker.receipt_store import Receipts
from ..core.audiences import BranchId, Endpoint, TenantId
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..core.control_messages import FlushReceipts
from ..core.event_ids import event_id, read_cursor
from ..core.receipts import Place, Receipt, State, TrackedEvent, Who
from ..core.routing import names_of
from ..parts import Parts
from .responses import Answer, identify, problem, refusal

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
    token = request.args.get("token") or bearer(request.headers.get("Authorization"))
    try:
        principals = await identify(parts, token, staff=True)
    except Rejected as rejected:
        return refusal(rejected)
    try:
        place = read_place(request.args.get("event_id", ""))
    except ValueError as error:
        return problem(422, f"event_id {error}")
    admin = next((each for each in principals if each.endpoint is Endpoint.ADMIN), None)
    if admin is None:
        return problem(403, "for the roles MANAGER and ADMIN only")
    return await report(parts, place, admin.tenant, admin.branches)


async def confirm(parts: Parts) -> Answer:
    """Confirm an event, see Receipts; for clients that cannot send messages, with their token."""
    token = bearer(request.headers.get("Authorization"))
    try:
        principals = await identify(parts, token)
    except Rejected as rejected:
        return refusal(rejected)
    try:
        body = msgspec.json.decode(await request.get_data(as_text=False), type=Confirmation)
        place = read_place(body.event_id or body.last_event_id or "")
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, 'not a JSON object {"last_event_id": "…"} or {"event_id": "…"}')
    except ValueError as error:
        return problem(422, f"event_id or last_event_id {error}")
    for principal in principals:
        if body.event_id is not None:
            parts.receipts.see_earlier(principal, place)
        else:
            parts.receipts.confirm_earlier(principal, place)
    return Response(status=204)


def read_place(event_id: str) -> Place:
    """The place that an event id names. Raises :exc:`ValueError`."""
    cursor = read_cursor(event_id)
    if len(cursor) != 1:
        raise ValueError("is not the id of one event")
    return Place(*next(iter(cursor.items())))


async def report(
    parts: Parts, place: Place, tenant: TenantId | None, branches: frozenset[BranchId] | None
) -> Answer:
    """The response about an event of this tenant and these branches; None: of any.

    To everybody else the event does not exist.
    """
    missing: list[str] = []
    try:
        if parts.cluster is None:
            await parts.receipts.flush(parts.receipt_store.write)
        else:
            missing = (await parts.cluster.control.ask("flush_receipts", FlushReceipts())).missing
        found = await parts.receipt_store.read(place)
    except KeyError:  # the stream is not ours
        return problem(404, _UNKNOWN)
    except Unavailable:
        return problem(503, "Redis is not available", retry_after=1)
    if found is None or not _may_know(parts, found.event, tenant, branches):
        return problem(404, _UNKNOWN)
    response = jsonify(_describe(parts, place, found, missing))
    response.headers["Cache-Control"] = "no-store"
    return response


def _may_know(
    parts: Parts,
    event: TrackedEvent,
    tenant: TenantId | None,
    branches: frozenset[BranchId] | None,
) -> bool:
    return (
        event.type in parts.settings.routes.tracked_types
        and event.at / 1000 + parts.settings.ws_receipt_ttl > parts.clock()
        and tenant in (None, event.tenant_id)
        and (branches is None or not event.branch_id or event.branch_id in branches)
    )


def _describe(
    parts: Parts, place: Place, found: Receipts, missing: Sequence[str]
) -> dict[str, Any]:
    states = Counter(receipt.state for receipt in found.by.values())
    steps = parts.settings.routes.route_of(found.event.type).steps
    return {
        "event_id": event_id(*place),
        "type": found.event.type,
        "at": found.event.at / 1000,
        **{
            state.label: sum(number for other, number in states.items() if other >= state)
            for state in State
        },
        "by": [_describe_one(who, found.by[who]) for who in sorted(found.by)],
        "steps": [
            {"to": names_of(steps[step + 1].to)[0], "at": at / 1000}
            for step, at in sorted(found.steps.items())
            if step + 1 < len(steps)
        ],
        "complete": not missing,
        "missing": missing,
    }


def _describe_one(who: Who, receipt: Receipt) -> dict[str, Any]:
    is_diner = who.endpoint == Endpoint.DINER.label
    named = {"session_id": int(who.id)} if is_diner else {"user_id": who.id}
    at = None if receipt.at is None else receipt.at / 1000
    return {**named, "endpoint": who.endpoint, "state": receipt.state.label, "at": at}
