"""``GET /ws/api/presence``: who is present in a branch."""

from ...cluster.presence_query import PresenceReport
from ...core.api_keys import ApiKey
from ...core.audiences import BranchId, TenantId
from ...parts import Parts
from ..presence import report
from ..responses import Answer
from .guard import Invalid
from .reading import check_tenant, read_id

__all__ = ["PresenceReport", "presence"]


async def presence(parts: Parts, key: ApiKey) -> Answer:
    """Who is present in a branch, as `/ws/presence`; with WS_CLUSTER."""
    tenant = TenantId(read_id("tenant_id"))
    check_tenant(key, tenant)
    branch = BranchId(read_id("branch_id"))
    if parts.cluster is None or parts.cluster.presence is None:
        raise Invalid(404, "presence is not known: WS_CLUSTER is not set")
    return await report(parts, tenant, branch, ("api", key.name))
