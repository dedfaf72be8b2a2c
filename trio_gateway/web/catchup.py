"""Catch-up: missed events over HTTP, in pages, for clients that cannot resume.

A page is read from the history in short pieces while it is sent: no other client waits for a long
page, and a slow reader costs the memory of one piece.
"""

import math
from collections.abc import AsyncIterator, Hashable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Final

import trio
from quart import Response, request

from ..core.audiences import Audience, BranchId, Principal, TenantId, audiences_of
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..core.decimals import is_decimal
from ..core.event_ids import Cursor, cursor_id, read_cursor
from ..core.events import MAX_ID
from ..core.frames import split
from ..parts import Parts
from ..runtime.concurrency_limiter import Overloaded
from ..runtime.history import History, StoredEvent
from ..runtime.older_events import OlderEvents
from ..runtime.resume import PATIENCE
from .responses import Answer, identify, problem, refusal

PAGE_BYTES: Final = 1_000_000  # the largest body
_PIECE_EVENTS: Final = 100  # read without a checkpoint, in less than a millisecond
_PIECE_BYTES: Final = 65_536
# Seconds in the future: more than the error of a clock, less than a time in milliseconds.
_FAR: Final = 86_400
_TAIL_BYTES: Final = 100  # reserved for the keys after the events
_POSITION_BYTES: Final = 48  # reserved for each stream's position in `next`


async def branch(parts: Parts) -> Answer:
    """The durable events of one branch that this member of staff missed, in pages, see Resume."""
    try:
        principals = await identify(parts, _token("token"), staff=True)
    except Rejected as rejected:
        return refusal(rejected)
    wanted = request.args.get("branch_id", "")
    if not is_id(wanted):
        return problem(422, "branch_id must be a positive integer")
    members = [p for p in principals if int(wanted) in p.branches]
    if not members:
        return problem(403, "branch_id is not a branch of this token")
    only = frozenset({BranchId(int(wanted))})
    return await _missed(parts, [replace(principal, branches=only) for principal in members])


async def session(parts: Parts) -> Answer:
    """The durable events that the diners of a session missed, in pages, see Resume."""
    try:
        principals = await identify(parts, _token("table_token"), staff=False)
    except Rejected as rejected:
        return refusal(rejected)
    wanted = request.args.get("session_id", "")
    if not is_id(wanted):
        return problem(422, "session_id must be a positive integer")
    if int(wanted) != principals[0].session:
        return problem(403, "session_id is not the session of this token")
    return await _missed(parts, principals)


async def _missed(parts: Parts, principals: Sequence[Principal]) -> Answer:
    audiences = frozenset[Audience]().union(*map(audiences_of, principals))
    return await missed(parts, principals[0].tenant, audiences, principals[0].owner)


async def missed(
    parts: Parts, tenant: TenantId, audiences: frozenset[Audience], owner: Hashable
) -> Answer:
    """One page of the durable events of a tenant for these audiences, after the query's `since`.

    Each owner may ask for a few at a time.
    """
    since = request.args.get("since", "")
    try:
        moment, after = _read_since(since)
    except ValueError:
        return problem(422, "since must be a unix time or an event id")
    if moment is not None and moment > parts.clock() + _FAR:
        return problem(422, "since is far in the future: it is a unix time in seconds")
    try:
        give_back = await parts.catch_ups.take(owner)
    except Overloaded:
        return problem(
            429, "too many simultaneous requests of one user, session or key", retry_after=1
        )
    held: ExitStack = request.scope["until_sent"]  # type: ignore[typeddict-item]  # HttpConnection's
    held.callback(give_back)
    held.enter_context(parts.following.client_of(tenant))
    if not await parts.places.wait_known(tenant, PATIENCE):
        return problem(503, "the events have not been read from Redis yet", retry_after=1)
    parts.history.trim(trio.current_time())
    older: Cursor = {}
    if moment is not None:
        cursor, complete = parts.extent.place_before(moment, parts.places.streams_of(tenant))
        if cursor and not complete and (complete := await parts.older_events.find(cursor)):
            older = parts.older_events.behind(cursor)
    else:
        assert after is not None
        place = None
        with trio.move_on_after(PATIENCE):  # another process may have read on further
            place = await parts.places.after(after, tenant)
        complete = place is not None and parts.extent.covers(place)
        if place is not None and not complete:
            complete = await parts.older_events.find(place)
            older = parts.older_events.behind(place) if complete else {}
        if place is not None:
            complete = complete and await parts.older_events.name_entries(place)
        cursor = parts.places.of(tenant, place or after)
        cursor = {stream: seen for stream, seen in cursor.items() if stream in parts.extent.end}
    response = Response(_page(parts, cursor, older, audiences), content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    if not complete:  # the contract has no key for it in the body
        response.headers["Gateway-Complete"] = "false"
    return response


async def _page(
    parts: Parts, cursor: Cursor, older: Cursor, audiences: frozenset[Audience]
) -> AsyncIterator[bytes]:
    """Yield the body in pieces. If there are more events, ``next`` is the id to continue after.

    ``older`` is the part of the cursor that is before the history.
    """
    history, extent = parts.history, parts.extent
    events: History | OlderEvents
    was_whole = not extent.forgot(cursor)
    room, count, more = PAGE_BYTES - _TAIL_BYTES - _POSITION_BYTES * len(cursor), 0, False
    piece = bytearray(b'{"events":[')
    while not more:
        await history.prepare(cursor, audiences)
        if older:
            older = {stream: cursor[stream] for stream in older}
            is_known, events = parts.older_events.covers(older), parts.older_events
            if is_known and not events.following(older, audiences, 1):
                cursor, older = {**cursor, **events.ends(older)}, {}
                was_whole = True
                continue
        else:
            is_known, events = not (was_whole and extent.forgot(cursor)), history
        if not is_known:  # since the last piece; the next page reports it
            more = True
            break
        found = events.following(older or cursor, audiences, _PIECE_EVENTS)
        for stored in found:
            text = _text(stored)
            if more := len(text) + 1 > room:
                break
            piece += b"," if count else b""
            piece += text
            room -= len(text) + 1
            count += 1
            cursor = {**cursor, stored.stream: stored.position}
            if len(piece) >= _PIECE_BYTES:
                break
        else:
            if len(found) < _PIECE_EVENTS and not older:
                break
        yield bytes(piece)
        piece.clear()
        await trio.lowlevel.checkpoint()
    piece += b'],"count":%d' % count
    if more:
        piece += b',"next":"%b"' % cursor_id(cursor).encode()
    yield bytes(piece + b"}")


def _text(stored: StoredEvent) -> memoryview:
    ((_, payload),) = split(stored.frame)
    return payload


def _read_since(text: str) -> tuple[float | None, Cursor | None]:
    """Parse a unix time or an event id; raises :exc:`ValueError` if it is neither."""
    try:
        moment = float(text)
    except ValueError:
        return None, read_cursor(text)
    if not math.isfinite(moment * 1000):
        raise ValueError("not a time")
    return moment, None


def _token(name: str) -> str | None:
    return request.args.get(name) or bearer(request.headers.get("Authorization"))


def is_id(text: str) -> bool:
    """Whether this is the id of a branch or session, in decimal digits."""
    return is_decimal(text, 19) and 0 < int(text) <= MAX_ID
