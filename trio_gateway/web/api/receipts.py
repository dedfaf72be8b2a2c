"""``GET /ws/api/receipts`` and ``why``: who has received an event, and its path."""

from quart import request

from ...core.api_keys import ApiKey
from ...core.receipt_report import Asker
from ...core.receipts import Place, read_place
from ...parts import Parts
from ..receipts import report
from ..responses import Answer
from ..why import report_path
from .guard import Invalid


async def receipts(parts: Parts, key: ApiKey) -> Answer:
    """Who has received an event of one of the key's tenants, as `/ws/receipts`."""
    return await report(parts, _read_place(), _asker(key))


async def why(parts: Parts, key: ApiKey) -> Answer:
    """The path of an event of one of the key's tenants, as `/ws/why`."""
    return await report_path(parts, _read_place(), _asker(key))


def _read_place() -> Place:
    if (place := read_place(request.args.get("event_id", ""))) is None:
        raise Invalid(422, "event_id must be the id of one event")
    return place


def _asker(key: ApiKey) -> Asker:
    return Asker(lambda event: key.may_act_for(event.tenant_id))
