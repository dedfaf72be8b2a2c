"""The web: the Quart-Trio routes. Four endpoints, health, metrics, tickets."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final

import trio
from quart import Response, abort, jsonify, request, websocket
from quart_trio import QuartTrio

from .. import stats
from ..access.tickets import TICKET_LIFE
from ..broker.commands import Unavailable
from ..core.audiences import Endpoint
from ..core.client_request import SUBPROTOCOL, bearer
from ..core.close_codes import Rejected
from ..core.resilience import State
from ..parts import Parts
from ..reception import Reception
from ..telemetry import prometheus
from ..transports.asgi import DRAIN, AsgiSocket, read_scope
from . import catchup, console, operations
from .explain import MOST_BYTES, explain
from .responses import Answer, identify, problem, refusal
from .static import add_files

_BODY_TIMEOUT: Final = 10  # seconds until a request's body must be here; then 408


def add_routes(app: QuartTrio, parts: Parts, reception: Reception) -> None:
    """Give the app its routes."""
    app.config |= {
        "MAX_CONTENT_LENGTH": MOST_BYTES,
        "BODY_TIMEOUT": _BODY_TIMEOUT,
        "RESPONSE_TIMEOUT": None,  # a transfer may take as long as it moves
    }
    for endpoint in Endpoint:
        app.add_websocket(endpoint.path, endpoint.label, _websocket(parts, reception, endpoint))
        app.add_url_rule(endpoint.path, f"{endpoint.label}_plain", _upgrade_required)
    for (method, path), answer in HTTP.items():
        app.add_url_rule(path, path, _bound(path, answer, parts), methods=[method])
    add_files(app, parts.settings)


def _bound(
    path: str, answer: Callable[[Parts], Awaitable[Answer]], parts: Parts
) -> Callable[[], Awaitable[Answer]]:
    async def view() -> Answer:
        # By the route: Quart takes `//ws/metrics` for the same.
        if parts.settings.ws_operations_bind is not None and operations.hides(request.scope, path):
            abort(404)
        return await answer(parts)

    return view


def _websocket(
    parts: Parts, reception: Reception, endpoint: Endpoint
) -> Callable[[], Awaitable[None]]:
    async def view() -> None:
        scope: Any = websocket.scope
        if operations.came_by_it(scope):
            parts.counts.refused[404] += 1
            abort(404)
        if parts.draining:
            parts.counts.refused[503] += 1
            abort(503)
        handshake = read_scope(endpoint, scope)
        # Hypercorn takes the offered subprotocols out of the headers of HTTP/2.
        offered = scope.get("subprotocols") or []
        subprotocol = handshake.subprotocol or (SUBPROTOCOL if SUBPROTOCOL in offered else None)
        try:
            await websocket.accept(subprotocol=subprotocol)
        except TimeoutError:  # it takes nothing, not even that
            return
        socket = AsgiSocket(websocket._get_current_object(), parts.settings.ws_max_message_size)  # type: ignore[attr-defined]
        await reception.serve_connection(handshake, socket)
        # Quart's inbound channel holds ten messages; left full, it and two tasks leak.
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


def _connections(parts: Parts) -> dict[str, Any]:
    by_endpoint = {endpoint.label: number for endpoint, number in parts.hub.by_endpoint.items()}
    return {"total": len(parts.hub), "by_endpoint": by_endpoint}


async def _health(parts: Parts) -> Answer:
    """200 while the process runs; `status` is `healthy` or `degraded`."""
    breakers = [parts.breakers[name] for name in ("commands", "writes", "database")]
    healthy = parts.ready and all(each.state is State.CLOSED for each in breakers)
    status = "healthy" if healthy else "degraded"
    return jsonify(status=status, connections=_connections(parts)), 200


async def _health_ready(parts: Parts) -> Answer:
    """For load balancers: 200 if ready, else 503; 503 as soon as draining starts."""
    ready = parts.ready and await _check(parts) is None
    return jsonify(ready=ready, draining=parts.draining), 200 if ready else 503


async def _health_detailed(parts: Parts) -> Answer:
    """The state of every part; 503 unless everything that is needed works."""
    error = await _check(parts)
    worst = max(parts.breakers.values(), key=lambda breaker: breaker.state is not State.CLOSED)
    ready = parts.ready and error is None
    body = {
        "status": "healthy" if ready else "degraded",
        "draining": parts.draining,
        "connections": _connections(parts),
        "redis_async": {"status": _status(parts.pubsub.connected)},
        "redis_sync": {"status": _status(error is None), **({"error": error} if error else {})},
        "circuit_breaker": {
            "state": worst.state.name.lower(),
            "failures": sum(breaker.failures for breaker in parts.breakers.values()),
            "by_name": {name: b.state.name.lower() for name, b in parts.breakers.items()},
        },
        "database": _database(parts),
        "rate_limiter": {
            "tracked_connections": sum(c.rate_limited for c in parts.hub.connections),
        },
        "event_queue": {
            "depth": parts.pubsub_queue.depth,
            "capacity": parts.pubsub_queue.capacity,
            "dropped": parts.pubsub_queue.dropped,
        },
        "stream": {
            "status": _status(parts.streams.connected),
            "cursor": parts.streams.cursors,
            "lag": parts.stream_queue.depth,
        },
    }
    return jsonify(body), 200 if ready else 503


def _database(parts: Parts) -> dict[str, Any]:
    """Not needed to be ready: without it, what it said last holds, or the tokens' claims."""
    if (sector_assignments := parts.sector_assignments) is None:
        return {"status": "not configured"}
    breaker = parts.breakers["database"]
    return {
        "status": _status(not breaker.failures),
        "known": sector_assignments.known,
        "owed": sector_assignments.pending,
    }


def _status(connected: bool) -> str:
    return "connected" if connected else "disconnected"


async def _check(parts: Parts) -> str | None:
    """None if Redis answers and accepts writes, else why not."""
    return await parts.readiness.ask()


async def _metrics(parts: Parts) -> Answer:
    """Metrics in the Prometheus text format, summed over the workers of one supervisor."""
    return Response(
        prometheus.render(parts.worker_stats.all(stats.snapshot(parts))),
        content_type=prometheus.CONTENT_TYPE,
    )


async def _ticket(parts: Parts) -> Answer:
    """A ticket for the token, see Tokens; or 401, 403, 503."""
    token = bearer(request.headers.get("Authorization"))
    if token is None:
        return problem(401, "the header Authorization: Bearer <token> is required")
    try:
        await identify(parts, token)  # good on some endpoint: no other token ever costs a key
        ticket = await parts.tickets.issue(token)
    except Rejected as rejected:
        return refusal(rejected)
    except Unavailable:
        return problem(503, "cannot issue a ticket now")
    response = jsonify(ticket=ticket, expires_in=TICKET_LIFE)
    response.headers["Cache-Control"] = "no-store"
    return response


# The first line of each docstring is the words of docs/protocol.md.
HTTP: Final[Mapping[tuple[str, str], Callable[[Parts], Awaitable[Answer]]]] = {
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
