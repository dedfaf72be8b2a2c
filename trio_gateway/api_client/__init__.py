"""The HTTP API of the gateway, for backends that do not reach Redis; needs the extra ``http``.

::

    with ApiClient("https://gateway.example", secret) as api:
        api.publish({"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}, id="round-9001")
        api.disconnect(1, user_id="21", reason="signed out")
"""

try:
    import httpx as _httpx  # noqa: F401
except ModuleNotFoundError:
    raise ImportError("trio_gateway.api_client needs httpx: install trio-gateway[http]") from None

from .asynchronous import AsyncApiClient
from .errors import CallFailed
from .sync import ApiClient
from .values import (
    ClientReceipt,
    Disconnected,
    EventPath,
    EventReceipts,
    HistoryPage,
    Node,
    PathAudience,
    PathClient,
    PathMoment,
    PathStep,
    Presence,
    PresentSession,
    PresentUser,
    Published,
    ReceiptStep,
    Refreshed,
    Slo,
    TenantTimes,
    Times,
    TimesWindow,
)

__all__ = [
    "ApiClient",
    "AsyncApiClient",
    "CallFailed",
    "ClientReceipt",
    "Disconnected",
    "EventPath",
    "EventReceipts",
    "HistoryPage",
    "Node",
    "PathAudience",
    "PathClient",
    "PathMoment",
    "PathStep",
    "Presence",
    "PresentSession",
    "PresentUser",
    "Published",
    "ReceiptStep",
    "Refreshed",
    "Slo",
    "TenantTimes",
    "Times",
    "TimesWindow",
]
