"""The catalogue: each message between a client and the gateway, with its schema and an example.

docs/protocol.md and the AsyncAPI document are made from it. Events have a schema of their own.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from . import messages
from .audiences import Endpoint, SectorId
from .messages import Command

Schema = Mapping[str, Any]
_STRING: Final[Schema] = {"type": "string"}
_COUNT: Final[Schema] = {"type": "integer", "minimum": 0}
_SECONDS: Final[Schema] = {"type": "number", "minimum": 0}
_ALL: Final = frozenset(Endpoint)


def _object(name: str, **keys: Schema) -> Schema:
    return {
        "type": "object",
        "properties": {"type": {"const": name}, **keys},
        "required": ["type", *keys],
    }


@dataclass(frozen=True)
class Answer:
    """Something that the gateway says by itself; ``example`` is the text of a frame."""

    example: str
    schema: Schema
    note: str


@dataclass(frozen=True)
class Request:
    """Something that a client may say; ``answer`` names one of :data:`ANSWERS`, if there is any."""

    example: str
    schema: Schema
    answer: str | None
    note: str = ""
    endpoints: frozenset[Endpoint] = _ALL


_SECTORS: Final = [SectorId(5), SectorId(6)]

ANSWERS: Final[Mapping[str, Answer]] = {
    "pong": Answer(messages.PONG.decode(), _object("pong"), "to a `ping`"),
    "sectors_updated": Answer(
        messages.sectors_updated(_SECTORS, Command.REFRESH_SECTORS_JSON).decode(),
        _object("sectors_updated", sector_ids={"type": "array", "items": {"type": "integer"}}),
        "what it hears from now on, of all its branches",
    ),
    "sectors_updated_text": Answer(
        messages.sectors_updated(_SECTORS, Command.REFRESH_SECTORS).decode(),
        {"type": "string", "pattern": "^sectors_updated:([0-9]+(,[0-9]+)*)?$"},
        "the same, to who asked by the word alone",
    ),
    "auth_ok": Answer(
        messages.auth_ok(1790000000).decode(),
        _object("auth_ok", expires_at={"type": "integer", "description": "unix seconds"}),
        "the new token counts; its end",
    ),
    "resumed": Answer(
        messages.resumed(recovered=True, count=2, last_event_id="AbCd").decode(),
        _object("resumed", recovered={"type": "boolean"}, count=_COUNT, last_event_id=_STRING),
        "to who asked to resume, before the `count` events that it missed",
    ),
    "intervals": Answer(
        messages.intervals(
            heartbeat_timeout=60.0, receive_timeout=90.0, ping_interval=25.0
        ).decode(),
        _object(
            "intervals",
            heartbeat_timeout=_SECONDS,
            receive_timeout=_SECONDS,
            ping_interval=_SECONDS,
        ),
        "the gateway's own settings in seconds: send something at least once in half of the "
        "smaller of the first two; the gateway sends something at least once in the third",
    ),
    "statistics": Answer(
        messages.statistics({"at": 1790000000.5, "pid": 42, "numbers": {}}, []).decode(),
        _object("statistics", at={"type": "number"}, pid=_COUNT, numbers={"type": "object"}),
        "to an ADMIN that watches, once a second: this process's metrics, breakers and links, and "
        "the slow clients of its tenant",
    ),
    "gap": Answer(
        messages.GAP.decode(),
        _object("gap"),
        "durable events were lost and can't be replayed: refetch your state",
    ),
}

REQUESTS: Final[Mapping[str, Request]] = {
    "ping": Request('{"type":"ping"}', _object("ping"), "pong", "whatever its other keys"),
    "ping_text": Request("ping", {"const": "ping"}, "pong"),
    "refresh_sectors": Request(
        '{"type":"refresh_sectors"}',
        _object("refresh_sectors"),
        "sectors_updated",
        "waiters only. Over five in ten seconds, or while the database fails, it is what is "
        "known already",
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
        "a token of somebody else closes with 4003, a bad one with 4001; while Redis can't say "
        "whether the token is revoked nothing is answered and the old one holds: try again",
    ),
    "ask_intervals": Request(
        '{"type":"intervals"}',
        _object("intervals"),
        "intervals",
        "after a `resume`, if there is one: that must be the first message",
    ),
    "watch": Request(
        '{"type":"watch"}',
        _object("watch"),
        "statistics",
        "for the role ADMIN on `/ws/admin`, until it says `unwatch`",
        frozenset({Endpoint.ADMIN}),
    ),
    "unwatch": Request(
        '{"type":"unwatch"}',
        _object("unwatch"),
        None,
        "no more figures",
        frozenset({Endpoint.ADMIN}),
    ),
    "resume": Request(
        '{"type":"resume","last_event_id":"…"}',
        _object("resume", last_event_id=_STRING),
        "resumed",
        "as its first message; then what it missed, see Resume",
    ),
}
