"""``GET /ws/api/history``: the durable events of a branch, in pages."""

from typing import Annotated

import msgspec
from quart import request

from ...core.api_keys import ApiKey
from ...core.audiences import BranchId, TenantId, everything_at
from ...parts import Parts
from ..catchup import missed
from ..responses import Answer
from .guard import Invalid
from .reading import check_tenant, read_id


class HistoryReply(msgspec.Struct):
    """A page of events; ``next`` is there if there are more: the ``since`` of the next page."""

    events: list[msgspec.Raw]
    count: Annotated[int, msgspec.Meta(ge=0)]
    next: str | msgspec.UnsetType = msgspec.UNSET


async def history(parts: Parts, key: ApiKey) -> Answer:
    """The durable events of a branch since a time or an event, in pages as `/ws/catchup`."""
    tenant = TenantId(read_id("tenant_id"))
    check_tenant(key, tenant)
    if request.args.get("since", "").strip().startswith("-"):
        raise Invalid(422, "since must not be negative")
    branch = BranchId(read_id("branch_id", least=0))
    return await missed(parts, tenant, everything_at(tenant, branch), ("api", key.name))
