"""``GET /ws/api/receipts``: who has received an event."""

from quart import request

from ...core.api_keys import ApiKey
from ...core.receipts import read_place
from ...parts import Parts
from ..receipts import report
from ..responses import Answer
from .guard import Invalid


async def receipts(parts: Parts, key: ApiKey) -> Answer:
    """Who has received an event of one of the key's tenants, as `/ws/receipts`."""
    if (place := read_place(request.args.get("event_id", ""))) is None:
        raise Invalid(422, "event_id must be the id of one event")
    return await report(parts, place, lambda event: key.may_act_for(event.tenant_id))
