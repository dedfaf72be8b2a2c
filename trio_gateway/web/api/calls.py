"""The calls of the API, in one table: routes, docs and the OpenAPI document follow it."""

from typing import Final

from ...core.api_keys import Scope
from .control import disconnect, refresh
from .guard import Call
from .history import history
from .nodes import nodes
from .publish import MAX_BYTES, publish

CALLS: Final = (
    Call("publish", "POST", Scope.PUBLISH, publish, MAX_BYTES, takes_turns=True),
    Call("disconnect", "POST", Scope.CONTROL, disconnect),
    Call("refresh", "POST", Scope.CONTROL, refresh),
    Call("nodes", "GET", Scope.READ, nodes),
    Call("history", "GET", Scope.READ, history),
)
