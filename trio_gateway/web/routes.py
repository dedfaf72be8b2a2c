"""The web: the Quart-Trio routes. Four endpoints, health, metrics, tickets."""

from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

import trio
from quart import Response, abort, jsonify, request, websocket

from ..access.revocations import TICKET_LIFE
from ..broker.commands import Unavailable
from ..core.audiences import Endpoint
from ..core.close_codes import Rejected
from ..core.resilience import State
from ..telemetry import prometheus as metrics
from ..transports.asgi import DRAIN, AsgiSocket, read_scope
from ..transports.handshake import SUBPROTOCOL, bearer
from . import catchup, console, operations
from .explain import MOST_BYTES, explain
from .responses import Answer, identify, problem, refusal
from .static import add_files

if TYPE_CHECKING:
    from ..gateway import Gateway

_BODY_TIMEOUT: Final = 10  # seconds until a request's body must be here; then 408


def add_routes(app: "Gateway") -> None:
    """Give the app its routes."""
    app.config |= {
        "MAX_CONTENT_LENGTH": MOST_BYTES,
        "BODY_TIMEOUT": _BODY_TIMEOUT,
        "RESPONSE_TIMEOUT": None,  # a transfer may take as long as it moves
    }
    for endpoint in Endpoint:
        app.add_websocket(endpoint.path, endpoint.label, _second_door(app, endpoint))
        app.add_url_rule(endpoint.path, f"{endpoint.label}_plain", _upgrade_required)
    for (method, path), answer in HTTP.items():
        app.add_url_rule(path, path, _bound(path, answer, app), methods=[method])
    add_files(app)


def _bound(
    path: str, answer: "Callable[[Gateway], Awaitable[Answer]]", app: "Gateway"
) -> Callable[[], Awaitable[Answer]]:
    async def view() -> Answer:
        # By the route: Quart takes `//ws/metrics` for the same.
        if app.settings.ws_operations_bind is not None and operations.hides(request.scope, path):
            abort(404)
        return await answer(app)

    return view


def _second_door(app: "Gateway", endpoint: Endpoint) -> Callable[[], Awaitable[None]]:
    async def door() -> None:
        scope: Any = websocket.scope
        if operations.came_by_it(scope):
            app.refused[404] += 1
            abort(404)
        if app.draining:
            app.refused[503] += 1
            abort(503)
        handshake = read_scope(endpoint, scope)
        # Hypercorn takes the offered subprotocols out of the headers of HTTP/2.
        offered = scope.get("subprotocols") or []
        subprotocol = handshake.subprotocol or (SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            await websocket.accept(subprotocol=subprotocol)
        except TimeoutError:  # it takes nothing, not even that
            return
        socket = AsgiSocket(websocket._get_current_object(), app.max_message_size)  # type: ignore[attr-defined]
        await app.serve_connection(handshake, socket)
        # Quart's inbound channel holds ten messages; left full, it and two tasks leak.
        with trio.move_on_after(DRAIN):
            while True:
                await websocket.receive()

    return door


async def _upgrade_required() -> Answer:
    response = Response("This is a WebSocket endpoint.\n", 426, content_type="text/plain")
    response.headers["Upgrade"] = "websocket"
    response.headers["Connection"] = "Upgrade"
    response.headers["Sec-WebSocket-Version"] = "13"
    return response


def _connections(app: "Gateway") -> dict[str, Any]:
    by_endpoint = {endpoint.label: number for endpoint, number in app.hub.by_endpoint.items()}
    return {"total": len(app.hub), "by_endpoint": by_endpoint}


async def _health(app: "Gateway") -> Answer:
    """200 while the process lives; `status` is `healthy` or `degraded`."""
    parts = [app.breakers[name] for name in ("commands", "writes", "database")]
    healthy = app.ready and all(breaker.state is State.CLOSED for breaker in parts)
    status = "healthy" if healthy else "degraded"
    return jsonify(status=status, connections=_connections(app)), 200


async def _health_ready(app: "Gateway") -> Answer:
    """200 or 503: for load balancers; 503 as soon as draining starts."""
    ready = app.ready and await _check(app) is None
    return jsonify(ready=ready, draining=app.draining), 200 if ready else 503


async def _health_detailed(app: "Gateway") -> Answer:
    """Every part; 503 unless all that is needed works."""
    error = await _check(app)
    worst = max(app.breakers.values(), key=lambda breaker: breaker.state is not State.CLOSED)
    ready = app.ready and error is None
    pubsub, streams = app.pubsub, app.streams
    body = {
        "status": "healthy" if ready else "degraded",
        "draining": app.draining,
        "connections": _connections(app),
        "redis_async": {"status": _status(pubsub is not None and pubsub.connected)},
        "redis_sync": {"status": _status(error is None), **({"error": error} if error else {})},
        "circuit_breaker": {
            "state": worst.state.name.lower(),
            "failures": sum(breaker.failures for breaker in app.breakers.values()),
            "by_name": {name: b.state.name.lower() for name, b in app.breakers.items()},
        },
        "database": _database(app),
        "rate_limiter": {
            "tracked_connections": sum(c.rate_limited for c in app.hub.connections),
        },
        "event_queue": {
            "depth": app.heard.depth,
            "capacity": app.heard.capacity,
            "dropped": app.heard.dropped,
        },
        "stream": {
            "status": _status(streams is not None and streams.connected),
            "cursor": streams.cursors if streams is not None else {},
            "lag": app.read.depth,
        },
    }
    return jsonify(body), 200 if ready else 503


def _database(app: "Gateway") -> dict[str, Any]:
    """Not needed to be ready: without it, what it said last holds, or the tokens' claims."""
    if (sector_assignments := app.sector_assignments) is None:
        return {"status": "not configured"}
    breaker = app.breakers["database"]
    return {
        "status": _status(not breaker.failures),
        "known": sector_assignments.known,
        "owed": sector_assignments.pending,
    }


def _status(connected: bool) -> str:
    return "connected" if connected else "disconnected"


async def _check(app: "Gateway") -> str | None:
    """None if Redis answers and takes what we write, else why not."""
    return "not started" if app.readiness is None else await app.readiness.ask()


async def _metrics(app: "Gateway") -> Answer:
    """Prometheus text, summed over the workers of one master."""
    return Response(metrics.render(app.samples()), content_type=metrics.CONTENT_TYPE)


async def _ticket(app: "Gateway") -> Answer:
    """A ticket for the token, see Tokens; 401, 403, 503."""
    token = bearer(request.headers.get("Authorization"))
    if token is None:
        return problem(401, "Authorization: Bearer with a token is needed")
    try:
        await identify(app, token)  # good on some endpoint: no other token ever costs a key
        assert app.admission.tickets is not None
        ticket = await app.admission.tickets.issue(token)
    except Rejected as rejected:
        return refusal(rejected)
    except Unavailable:
        return problem(503, "can't issue a ticket now")
    response = jsonify(ticket=ticket, expires_in=TICKET_LIFE)
    response.headers["Cache-Control"] = "no-store"
    return response


# The first line of each docstring is the words of docs/protocol.md.
HTTP: Final[Mapping[tuple[str, str], "Callable[[Gateway], Awaitable[Answer]]"]] = {
    ("GET", "/ws/health"): _health,
    ("GET", "/ws/health/detailed"): _health_detailed,
    ("GET", "/ws/health/ready"): _health_ready,
    ("GET", "/ws/metrics"): _metrics,
    ("GET", "/ws/catchup"): catchup.branch,
    ("GET", "/ws/catchup/session"): catchup.session,
    ("POST", "/ws/ticket"): _ticket,
    ("POST", "/ws/explain"): explain,
    ("GET", "/ws/console"): console.page,
    ("POST", "/ws/console/token"): console.token,
    ("POST", "/ws/console/publish"): console.publish,
}
