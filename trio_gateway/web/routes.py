"""The routes of the Quart-Trio app: WebSocket endpoints and HTTP paths."""

from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Any, Final

import trio
from quart import Response, abort, has_request_context, jsonify, request, websocket
from quart_trio import QuartTrio
from werkzeug.exceptions import HTTPException, MethodNotAllowed

from .. import stats
from ..access.tickets import TICKET_LIFE
from ..broker.commands import Unavailable
from ..core.audiences import Endpoint
from ..core.client_request import SUBPROTOCOL, bearer
from ..core.close_codes import Rejected
from ..parts import Parts
from ..reception import Reception
from ..telemetry import prometheus
from ..transports.asgi import DRAIN, AsgiSocket, read_scope
from . import catchup, console, dev, health, operations, receipts
from .api.calls import CALLS
from .api.guard import PREFIX as API
from .api.guard import no_api, view_of
from .explain import MAX_BYTES, explain
from .presence import presence
from .responses import Answer, identify, problem, refusal
from .static import add_files
from .why import why

_BODY_TIMEOUT: Final = 10  # seconds within which a request's body must arrive; else 408


def add_routes(app: QuartTrio, parts: Parts, reception: Reception) -> None:
    """Add all routes to the app."""
    app.config |= {
        "MAX_CONTENT_LENGTH": MAX_BYTES,
        "BODY_TIMEOUT": _BODY_TIMEOUT,
        "RESPONSE_TIMEOUT": None,  # a response may take any time while the client reads
    }
    for endpoint in Endpoint:
        app.add_websocket(endpoint.path, endpoint.label, _websocket(parts, reception, endpoint))
        app.add_url_rule(endpoint.path, f"{endpoint.label}_plain", _upgrade_required)
    for (method, path), answer in HTTP.items():
        app.add_url_rule(path, f"{method} {path}", _bound(path, answer, parts), methods=[method])
    app.register_error_handler(HTTPException, partial(_error, parts))
    add_files(app, parts.settings)


async def _error(parts: Parts, error: HTTPException) -> HTTPException | Answer:
    """The answer to a request that no view has answered; below the API it is JSON, too."""
    if not has_request_context() or not request.path.startswith(API):  # else it is a WebSocket
        return error
    if parts.api is None:
        return no_api()
    answer = problem(error.code or 500, error.name)
    if isinstance(error, MethodNotAllowed) and isinstance(answer, tuple):
        answer[0].headers["Allow"] = ", ".join(error.valid_methods or ())
    return answer


def _bound(
    path: str, answer: Callable[[Parts], Awaitable[Answer]], parts: Parts
) -> Callable[[], Awaitable[Answer]]:
    async def view() -> Answer:
        # Checked by route, because Quart also serves `//ws/metrics`.
        if parts.settings.ws_operations_bind is not None and operations.is_hidden(
            request.scope, path
        ):
            abort(404)
        return await answer(parts)

    return view


def _websocket(
    parts: Parts, reception: Reception, endpoint: Endpoint
) -> Callable[[], Awaitable[None]]:
    async def view() -> None:
        scope: Any = websocket.scope
        if operations.is_operations_request(scope):
            parts.counts.refused[404] += 1
            abort(404)
        if parts.draining:
            parts.counts.refused[503] += 1
            abort(503)
        client_request = read_scope(endpoint, scope)
        # With HTTP/2, Hypercorn removes the offered subprotocols from the headers.
        offered = scope.get("subprotocols") or []
        subprotocol = client_request.subprotocol or (
            SUBPROTOCOL if SUBPROTOCOL in offered else None
        )
        try:
            await websocket.accept(subprotocol=subprotocol)
        except TimeoutError:  # the client does not read
            return
        socket = AsgiSocket(websocket._get_current_object(), parts.settings.ws_max_message_size)  # type: ignore[attr-defined]
        await reception.serve_connection(client_request, socket)
        # Quart's inbound channel holds ten messages; if it is left full, it and two tasks leak.
        with trio.move_on_after(DRAIN):
            while True:
                await websocket.receive()

    return view


async def _upgrade_required() -> Answer:
    response = Response("This is a WebSocket endpoint.\n", 426, content_type="text/plain")
    response.headers["Upgrade"] = "websocket"
    response.headers["Connection"] = "Upgrade"
    response.headers["Sec-WebSocket-Version"] = "13"
    return response


async def _metrics(parts: Parts) -> Answer:
    """Metrics in the Prometheus text format, summed over the workers of one supervisor."""
    return Response(
        prometheus.render(await parts.worker_stats.all(partial(stats.snapshot, parts))),
        content_type=prometheus.CONTENT_TYPE,
    )


async def _ticket(parts: Parts) -> Answer:
    """A ticket for the token, see Tokens; or 401, 403, 503."""
    token = bearer(request.headers.get("Authorization"))
    if token is None:
        return problem(401, "the header Authorization: Bearer <token> is required")
    try:
        holder, *_ = await identify(parts, token)  # only valid tokens may cost a key in Redis
        ticket = await parts.tickets.issue(token, holder.tenant)
    except Rejected as rejected:
        return refusal(rejected)
    except Unavailable:
        return problem(503, "cannot issue a ticket now")
    response = jsonify(ticket=ticket, expires_in=TICKET_LIFE)
    response.headers["Cache-Control"] = "no-store"
    return response


# The table in docs/protocol.md has the first line of each handler's docstring.
HTTP: Final[Mapping[tuple[str, str], Callable[[Parts], Awaitable[Answer]]]] = {
    ("GET", "/ws/health"): health.alive,
    ("GET", "/ws/health/detailed"): health.detailed,
    ("GET", "/ws/health/ready"): health.ready,
    ("GET", "/ws/placement"): health.placement,
    ("GET", "/ws/metrics"): _metrics,
    ("GET", "/ws/catchup"): catchup.branch,
    ("GET", "/ws/catchup/session"): catchup.session,
    ("GET", "/ws/presence"): presence,
    ("GET", "/ws/receipts"): receipts.read,
    ("POST", "/ws/receipts"): receipts.confirm,
    ("GET", "/ws/why"): why,
    ("POST", "/ws/ticket"): _ticket,
    ("POST", "/ws/explain"): explain,
    ("GET", "/ws/console"): console.page,
    ("POST", "/ws/console/token"): dev.token,
    ("POST", "/ws/console/publish"): dev.publish,
    **{(call.method, call.path): view_of(call) for call in CALLS},
}
