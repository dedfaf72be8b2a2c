"""``GET /ws/api/history``: the durable events of a branch, in pages."""

import re
from typing import Annotated, Final

import msgspec
from quart import request

from ...core.api_keys import ApiKey
from ...core.audiences import BranchId, TenantId, everything_at
from ...parts import Parts
from ..catchup import missed
from ..responses import Answer
from .guard import Invalid
from .reading import check_tenant, read_id

EVENT_ID: Final = "[0-9]{1,20}-[0-9]{1,20}-([0-9a-f]{4}|none)"
SINCE_ID: Final = rf"{EVENT_ID}(\.{EVENT_ID})*"


class HistoryReply(msgspec.Struct):
    """A page of events; ``next`` is there if there are more: the ``since`` of the next page."""

    events: list[msgspec.Raw]
    count: Annotated[int, msgspec.Meta(ge=0)]
    next: str | msgspec.UnsetType = msgspec.UNSET


async def history(parts: Parts, key: ApiKey) -> Answer:
    """The durable events of a branch since a time or an event, in pages as `/ws/catchup`."""
    tenant = TenantId(read_id("tenant_id"))
    check_tenant(key, tenant)
    check_since(request.args.get("since", ""))
    branch = BranchId(read_id("branch_id", least=0))
    return await missed(parts, tenant, everything_at(tenant, branch), ("api", key.name))


def check_since(text: str) -> None:
    """Raise :exc:`Invalid` unless this is a time or an event id; clients may send others."""
    try:
        is_valid = float(text) >= 0
    except ValueError:
        is_valid = re.fullmatch(SINCE_ID, text) is not None
    if not is_valid:
        raise Invalid(422, "since must be a unix time, not negative, or an event id")
