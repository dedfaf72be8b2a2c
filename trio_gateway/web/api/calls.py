"""The calls of the API, in one table: routes, docs and the OpenAPI document follow it."""

from typing import Any, Final

from ...core.api_keys import Scope
from ...core.event_path import EventPath
from ...core.events import MAX_ID
from ...core.receipt_report import ReceiptsReply
from .control import (
    DisconnectReply,
    DisconnectRequest,
    RefreshReply,
    RefreshRequest,
    disconnect,
    refresh,
)
from .guard import Call, Parameter
from .history import EVENT_ID, SINCE_ID, HistoryReply, history
from .nodes import NodesReply, nodes
from .presence import PresenceReport, presence
from .publish import MAX_BYTES, PublishReply, PublishRequest, publish
from .receipts import receipts, why
from .slo import MOST, SloReport, slo


def _number(least: int = 1) -> dict[str, Any]:
    return {"type": "integer", "minimum": least, "maximum": MAX_ID}


_SINCE: Final = {
    "anyOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": f"^{SINCE_ID}$"},
    ]
}
_TENANT: Final = Parameter("tenant_id", _number(), "one of the key's tenants")

_EVENT: Final = Parameter("event_id", {"type": "string", "pattern": f"^{EVENT_ID}$"}, "the event")

CALLS: Final = (
    Call(
        name="publish",
        scope=Scope.PUBLISH,
        answer=publish,
        body=PublishRequest,
        reply=PublishReply,
        query=(
            Parameter(
                "confirm",
                {"anyOf": [{"type": "integer", "minimum": 0, "maximum": 999}, {"const": "all"}]},
                "how many replicas must have the durable events within a second; or all of them",
                required=False,
            ),
        ),
        most_bytes=MAX_BYTES,
        takes_turns=True,
    ),
    Call(
        name="disconnect",
        scope=Scope.CONTROL,
        answer=disconnect,
        body=DisconnectRequest,
        reply=DisconnectReply,
    ),
    Call(
        name="refresh",
        scope=Scope.CONTROL,
        answer=refresh,
        body=RefreshRequest,
        reply=RefreshReply,
    ),
    Call(
        name="presence",
        scope=Scope.READ,
        answer=presence,
        reply=PresenceReport,
        query=(
            _TENANT,
            Parameter("branch_id", _number(), "the branch"),
            Parameter(
                "node", {"type": "string"}, "one process, by its name; * for all", required=False
            ),
        ),
    ),
    Call(name="nodes", scope=Scope.READ, answer=nodes, reply=NodesReply),
    Call(
        name="history",
        scope=Scope.READ,
        answer=history,
        reply=HistoryReply,
        query=(
            _TENANT,
            Parameter("branch_id", _number(0), "the branch; 0: events of the whole tenant alone"),
            Parameter("since", _SINCE, "a unix time in seconds, or an event id"),
        ),
    ),
    Call(
        name="receipts",
        scope=Scope.READ,
        answer=receipts,
        reply=ReceiptsReply,
        query=(_EVENT,),
        asks_all=True,
    ),
    Call(
        name="why",
        scope=Scope.READ,
        answer=why,
        reply=EventPath,
        query=(_EVENT,),
        asks_all=True,
    ),
    Call(
        name="slo",
        scope=Scope.READ,
        answer=slo,
        reply=SloReport,
        asks_all=True,
        query=(
            _TENANT._replace(required=False),
            Parameter(
                "limit",
                {"type": "integer", "minimum": 1, "maximum": MOST},
                "how many tenants at most, the slowest first; by default 100",
                required=False,
            ),
        ),
    ),
)
