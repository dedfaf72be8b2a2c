"""``POST /ws/explain``: the receivers of an event, and whether given tokens would receive it."""

from collections import Counter
from typing import Annotated, Any, Final

import msgspec
from quart import jsonify, request
from werkzeug.exceptions import RequestEntityTooLarge

from ..core.audiences import Endpoint, Principal, Role
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..core.events import InvalidEvent, parse_event
from ..core.explanation import Verdict, describe, describe_type, judge, refused
from ..core.tokens import is_for_diners
from ..parts import Parts
from .responses import Answer, identify, problem, refusal

MAX_TOKENS: Final = 16
MAX_BYTES: Final = 256 * 1024  # of a body: an event and the longest tokens


class _Request(msgspec.Struct):
    event: msgspec.Raw
    tokens: Annotated[list[str], msgspec.Meta(max_length=MAX_TOKENS)] = []


async def explain(parts: Parts) -> Answer:
    """Who would receive an event, see below; for an ADMIN of its tenant and branch."""
    try:
        principals = await identify(parts, bearer(request.headers.get("Authorization")), staff=True)
    except Rejected as rejected:
        return refusal(rejected)
    admin = next((each for each in principals if each.endpoint is Endpoint.ADMIN), None)
    if admin is None or Role.ADMIN not in admin.roles:
        return problem(403, "for the role ADMIN only")
    try:
        body = msgspec.json.decode(await request.get_data(as_text=False), type=_Request)
        event = parse_event(bytes(body.event), channel="", received_at=0)
    except RequestEntityTooLarge:
        return problem(413, f"the body must have at most {MAX_BYTES} bytes")
    except InvalidEvent as invalid:
        return problem(422, f"event: {invalid}")
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, 'not a JSON object {"event": {…}, "tokens": ["…"]}')
    if event.tenant != admin.tenant:
        return problem(403, "the event is of another tenant")
    if event.branch and event.branch not in admin.branches:
        return problem(
            403, f"the event is for branch {event.branch}, which is not a branch of this token"
        )
    holders = [await _identify(parts, token) for token in body.tokens]
    # Nothing is awaited from here on, so that the whole response describes one moment.
    routes, audiences = parts.settings.routes, parts.dispatch.audiences(event)
    connected = Counter(each.principal.endpoint for each in parts.hub.members(audiences))
    found: dict[str, Any] = {
        **describe_type(event.type, routes),
        "audiences": [describe(each) for each in dict.fromkeys(audiences)],
        "connections": {endpoint.label: connected[endpoint] for endpoint in Endpoint},
        "tokens": [
            (each if isinstance(each, Verdict) else judge(event, each, routes, audiences)).as_json()
            for each in holders
        ],
    }
    response = jsonify(found)
    response.headers["Cache-Control"] = "no-store"
    return response


async def _identify(parts: Parts, token: str) -> list[Principal] | Verdict:
    """Identify a token of the body. An invalid one is a result here, not a failed login."""
    try:
        return await parts.admission.identify(token, staff=not is_for_diners(token))
    except Rejected as rejected:
        return refused(rejected.text)
