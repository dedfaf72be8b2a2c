"""What a process does when a backend orders it: close connections, load sectors again."""

from collections.abc import Callable, Iterable
from typing import Final

import structlog

from ..core.audiences import TenantId, UserId
from ..core.close_codes import Close
from ..core.control_messages import Disconnect, Disconnected, SectorsChanged
from ..core.printable import printable
from ..runtime.connection import Connection
from ..runtime.hub import Hub
from .control import Control

log = structlog.get_logger()

_MOST_BYTES: Final = 100  # of a reason: a close frame has room for 123
_REASON: Final = "disconnected by the backend"


def carry_out_orders(
    control: Control, hub: Hub, sectors_changed: Callable[[SectorsChanged], None] | None
) -> None:
    """Carry out ``disconnect`` and ``refresh``; without assignments there is nothing to load."""

    async def disconnect(order: Disconnect, given_at: float) -> Disconnected:
        reason = clean_reason(order.reason)
        closed = 0
        for connection in list(_concerned(order, hub)):
            if connection.joined_at <= given_at and not connection.ending:
                connection.close(Close.AUTH_FAILED, reason)
                closed += 1
        if closed:
            log.info("disconnected by the backend", connections=closed, tenant=order.tenant_id)
        return Disconnected(closed)

    async def refresh(order: SectorsChanged, _given_at: float) -> None:
        if sectors_changed is not None:
            sectors_changed(order)

    control.handle_order("disconnect", Disconnect, disconnect)
    control.handle_order("refresh", SectorsChanged, refresh)


def _concerned(order: Disconnect, hub: Hub) -> Iterable[Connection]:
    for connection in hub.connections:
        principal = connection.principal
        if principal.tenant != TenantId(order.tenant_id):
            continue
        if order.user_id is not None:
            concerned = principal.user == UserId(str(order.user_id))
        elif order.session_id is not None:
            concerned = principal.session == order.session_id
        else:
            concerned = principal.token_id == order.jti
        if concerned:
            yield connection


def clean_reason(reason: str) -> str:
    """A reason that fits into a close frame, without control characters."""
    cleaned = printable(reason.strip()).encode("utf-8", "replace")[:_MOST_BYTES]
    return cleaned.decode("utf-8", "ignore") or _REASON
