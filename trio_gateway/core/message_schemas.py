"""Each message between a client and the gateway, with its schema and an example.

docs/protocol.md and the AsyncAPI document are generated from these tables. Events have a schema
of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from . import messages
from .audiences import BranchId, Endpoint, SectorId
from .messages import Command
from .presence import Items, SessionItem, UserItem

Schema = Mapping[str, Any]
_STRING: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_ID: Final[Schema] = {"type": "integer", "minimum": 1}
_SECONDS: Final[Schema] = {"type": "number", "minimum": 0}
_ALL: Final = frozenset(Endpoint)


def _object(name: str, optional: Schema | None = None, **keys: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"type": {"const": name}, **keys, **(optional or {})},
        "required": ["type", *keys],
    }


@dataclass(frozen=True)
class Answer:
    """A message that the gateway sends and that is not an event; ``example`` is a frame's text.

    ``unasked`` are the endpoints on which it is more than the answer to a request.
    """

    example: str
    schema: Schema
    note: str
    unasked: frozenset[Endpoint] = frozenset()


@dataclass(frozen=True)
class Request:
    """A message that a client may send; ``answer`` is a key of :data:`ANSWERS`, or None."""

    example: str
    schema: Schema
    answer: str | None
    note: str = ""
    endpoints: frozenset[Endpoint] = _ALL


_IDS: Final[Schema] = {"type": "array", "items": {"type": "integer"}}
_USER: Final[Schema] = {
    "type": "object",
    "properties": {
        "user_id": _STRING,
        "endpoint": {"enum": [endpoint.label for endpoint in Endpoint if endpoint.staff]},
        "sector_ids": _IDS,
        "connections": _COUNT,
        "since": {"type": "number", "description": "unix seconds"},
    },
    "required": ["user_id", "endpoint", "sector_ids", "connections", "since"],
}
_SESSION: Final[Schema] = {
    "type": "object",
    "properties": {
        "session_id": {"type": "integer"},
        "table_id": {"type": ["integer", "null"]},
        "connections": _COUNT,
    },
    "required": ["session_id", "table_id", "connections"],
}


def _list(*items: Schema) -> Schema:
    return {"type": "array", "items": items[0] if len(items) == 1 else {"anyOf": list(items)}}


_ANA: Final = UserItem("21", "waiter", [5], 1, 1790000000.5)
_TABLE: Final = SessionItem(456, 10, 2)
_SECTORS: Final = [SectorId(5), SectorId(6)]

ANSWERS: Final[Mapping[str, Answer]] = {
    "pong": Answer(messages.PONG.decode(), _object("pong"), "the answer to a `ping`"),
    "sectors_updated": Answer(
        messages.sectors_updated(_SECTORS, Command.REFRESH_SECTORS_JSON).decode(),
        _object("sectors_updated", sector_ids=_IDS),
        "the sectors that the client receives events of from now on, in all its branches",
    ),
    "sectors_updated_text": Answer(
        messages.sectors_updated(_SECTORS, Command.REFRESH_SECTORS).decode(),
        {"type": "string", "pattern": "^sectors_updated:([0-9]+(,[0-9]+)*)?$"},
        "the same, as the answer to the bare word",
    ),
    "auth_ok": Answer(
        messages.auth_ok(1790000000).decode(),
        _object("auth_ok", expires_at={"type": "integer", "description": "unix seconds"}),
        "the new token is in force; when it expires",
    ),
    "resumed": Answer(
        messages.resumed(recovered=True, count=2, last_event_id="AbCd").decode(),
        _object("resumed", recovered={"type": "boolean"}, count=_COUNT, last_event_id=_STRING),
        "the answer to `resume`, before the `count` events that the client missed",
    ),
    "intervals": Answer(
        messages.intervals(
            heartbeat_timeout=60.0,
            receive_timeout=90.0,
            ping_interval=25.0,
            receipts=["SERVICE_CALL_CREATED"],
        ).decode(),
        _object(
            "intervals",
            heartbeat_timeout=_SECONDS,
            receive_timeout=_SECONDS,
            ping_interval=_SECONDS,
            optional={"receipts": {"type": "array", "items": _STRING, "minItems": 1}},
        ),
        "the gateway's settings, in seconds. Send something at least once in half of the smaller "
        "of the first two; the gateway sends something at least once in the third. Confirm events "
        "of the types in `receipts`, which is there only if there are any, with an `ack` within "
        "0.2 s, see [Receipts](#receipts)",
    ),
    "statistics": Answer(
        messages.statistics(
            {"at": 1790000000.5, "pid": 42, "nodes": [], "numbers": {}}, [], {}
        ).decode(),
        _object(
            "statistics",
            at={"type": "number"},
            pid=_COUNT,
            nodes={"type": "array", "items": {"type": "object"}},
            numbers={"type": "object"},
            delivery_times={"type": "object"},
        ),
        "sent once a second to an ADMIN that watches: the metrics, circuit breakers and Redis "
        "connections of this process, the live processes of the service, and of the ADMIN's "
        "tenant the slow clients and the [delivery times](#delivery-times) of this process",
    ),
    "presence": Answer(
        messages.presence_state(BranchId(1), Items([_ANA], [_TABLE])).decode(),
        _object("presence", branch_id=_ID, users=_list(_USER), sessions=_list(_SESSION)),
        "who is present in the branch, see [Presence](#presence): sent first, and again whenever "
        "changes may have been missed. It replaces what was sent before",
    ),
    "presence_change": Answer(
        messages.presence_change(BranchId(1), [_ANA], []).decode(),
        _object(
            "presence",
            branch_id=_ID,
            joined=_list(_USER, _SESSION),
            left=_list(_USER, _SESSION),
        ),
        "each change of that. One that is known already and joins again has other sectors, or "
        "another table: the new item replaces the old one",
        frozenset({Endpoint.ADMIN}),
    ),
    "gap": Answer(
        messages.GAP.decode(),
        _object("gap"),
        "durable events were lost and cannot be replayed, or a slow client has skipped events that "
        "are not durable: fetch your state again",
        _ALL,
    ),
}

REQUESTS: Final[Mapping[str, Request]] = {
    "ping": Request('{"type":"ping"}', _object("ping"), "pong", "other keys are ignored"),
    "ping_confirming": Request(
        '{"type":"ping","last_event_id":"1790000000000-0-4723"}',
        _object("ping", last_event_id=_STRING),
        "pong",
        "confirms everything up to that event, see [Receipts](#receipts)",
    ),
    "ack": Request(
        '{"type":"ack","last_event_id":"1790000000000-0-4723"}',
        _object("ack", last_event_id=_STRING),
        None,
        "confirms everything up to that event at once. It counts towards the rate limit only if "
        "there are more acks than events sent",
    ),
    "seen": Request(
        '{"type":"seen","event_id":"1790000000000-0-4723"}',
        _object("seen", event_id=_STRING),
        None,
        "the application, or its user, has seen that event",
    ),
    "ping_text": Request("ping", {"const": "ping"}, "pong"),
    "refresh_sectors": Request(
        '{"type":"refresh_sectors"}',
        _object("refresh_sectors"),
        "sectors_updated",
        "waiters only. After more than five in ten seconds, or while the database is down, the "
        "answer is what is known already",
        frozenset({Endpoint.WAITER}),
    ),
    "refresh_sectors_text": Request(
        "refresh_sectors",
        {"const": "refresh_sectors"},
        "sectors_updated_text",
        "the same",
        frozenset({Endpoint.WAITER}),
    ),
    "auth": Request(
        '{"type":"auth","token":"…"}',
        _object("auth", token=_STRING),
        "auth_ok",
        "another principal's token closes the connection with 4003, an invalid one with 4001. "
        "While Redis cannot say whether the token is revoked, there is no answer and the old "
        "token stays in force: try again",
    ),
    "ask_intervals": Request(
        '{"type":"intervals"}',
        _object("intervals"),
        "intervals",
        "a `resume` must come before it, as the first message",
    ),
    "watch": Request(
        '{"type":"watch"}',
        _object("watch"),
        "statistics",
        "for the role ADMIN on `/ws/admin`, until it sends `unwatch`",
        frozenset({Endpoint.ADMIN}),
    ),
    "unwatch": Request(
        '{"type":"unwatch"}',
        _object("unwatch"),
        None,
        "stops the statistics",
        frozenset({Endpoint.ADMIN}),
    ),
    "watch_presence": Request(
        '{"type":"watch_presence","branch_id":1}',
        _object("watch_presence", branch_id=_ID),
        "presence",
        "on `/ws/admin`, for a branch of the token, with `WS_CLUSTER`; otherwise there is no "
        "answer. Until it sends `unwatch_presence`, or the branch is not in a renewed token. Sent "
        "again it is answered with the state again",
        frozenset({Endpoint.ADMIN}),
    ),
    "unwatch_presence": Request(
        '{"type":"unwatch_presence","branch_id":1}',
        _object("unwatch_presence", branch_id=_ID),
        None,
        "stops it; without `branch_id`, for all branches",
        frozenset({Endpoint.ADMIN}),
    ),
    "resume": Request(
        '{"type":"resume","last_event_id":"…"}',
        _object("resume", last_event_id=_STRING, optional={"confirm": {"type": "boolean"}}),
        "resumed",
        "must be the first message; the missed events follow the answer, see Resume. With "
        '`"confirm":false` it confirms no events, see [Receipts](#receipts)',
    ),
}
