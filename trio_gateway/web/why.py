"""``/ws/why``: the path of an event, see :mod:`..core.event_path`."""

from ..broker.commands import Unavailable
from ..broker.event_lookup import look_up
from ..core.event_path import trace
from ..core.path_words import UNKNOWN_STREAM, tell, why_unknown
from ..core.receipt_report import Asker
from ..core.receipts import Place
from ..parts import Parts
from .receipts import flush, for_admin
from .responses import Answer, problem, respond


async def why(parts: Parts) -> Answer:
    """The path of an event, see Why; for a MANAGER or ADMIN of its branch."""
    return await for_admin(parts, report_path)


async def report_path(parts: Parts, place: Place, asker: Asker) -> Answer:
    """The response with the path of an event."""
    try:
        missing = await flush(parts)
        known = await look_up(parts.receipt_store, place, has_receipts=parts.receipts.events.tracks)
    except KeyError:
        return problem(404, f"nothing is known of this event: {UNKNOWN_STREAM}")
    except Unavailable as error:
        return problem(503, error.cause, retry_after=1)
    if known.about is None or not asker.may_know(known.about):
        return problem(404, f"nothing is known of this event: {why_unknown(known)}")
    routes, ttl = parts.settings.routes, parts.settings.ws_receipt_ttl
    path = trace(known, routes, ttl, missing, asker.may_name)
    return respond(tell(path, known, routes, ttl))
