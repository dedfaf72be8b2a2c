"""``GET /ws/api/slo``: the delivery times of tenants."""

from typing import Final

import msgspec
from quart import Response, request

from ...cluster.delivery_query import SloReport, delivery_times
from ...core.api_keys import ApiKey
from ...parts import Parts
from ..responses import Answer
from .guard import Invalid
from .reading import check_tenant, read_id

__all__ = ["MOST", "SloReport", "slo"]

MOST: Final = 1000  # tenants in an answer
_DEFAULT: Final = 100


async def slo(parts: Parts, key: ApiKey) -> Answer:
    """The delivery times of the key's tenants in the last 5 minutes and hour, the slowest first."""
    assert parts.cluster is not None
    tenants = key.tenants
    if "tenant_id" in request.args:
        tenant = read_id("tenant_id")
        check_tenant(key, tenant)
        tenants = frozenset({tenant})
    most = read_id("limit") if "limit" in request.args else _DEFAULT
    if most > MOST:
        raise Invalid(422, f"limit must be at most {MOST}")
    found = await delivery_times(parts.cluster.control, tenants, most=most)
    response = Response(msgspec.json.encode(found), content_type="application/json")
    response.headers["Cache-Control"] = "no-store"
    return response
