"""Health checks, for supervisors, load balancers and people."""

from typing import Any

from quart import jsonify

from ..core.resilience import State
from ..parts import Parts
from .responses import Answer


def _connections(parts: Parts) -> dict[str, Any]:
    by_endpoint = {endpoint.label: number for endpoint, number in parts.hub.by_endpoint.items()}
    return {"total": len(parts.hub), "by_endpoint": by_endpoint}


async def alive(parts: Parts) -> Answer:
    """200 while the process runs; `status` is `healthy` or `degraded`."""
    breakers = [parts.breakers[name] for name in ("commands", "writes", "database")]
    works = parts.ready and not parts.streams.unreadable
    healthy = works and all(each.state is State.CLOSED for each in breakers)
    status = "healthy" if healthy else "degraded"
    return jsonify(status=status, connections=_connections(parts)), 200


async def ready(parts: Parts) -> Answer:
    """For load balancers: 200 if ready, else 503; 503 as soon as draining starts."""
    is_ready = parts.ready and await _check(parts) is None
    return jsonify(ready=is_ready, draining=parts.draining), 200 if is_ready else 503


async def placement(parts: Parts) -> Answer:
    """The process that a proxy has chosen, as `{"process":"…"}`; for `trio-gateway rebalance`."""
    return jsonify(process=parts.placement.process), 200


async def detailed(parts: Parts) -> Answer:
    """The state of every part; 503 unless everything that is needed works."""
    error = await _check(parts)
    worst = max(parts.breakers.values(), key=lambda breaker: breaker.state is not State.CLOSED)
    is_ready = parts.ready and error is None and not parts.streams.unreadable
    body = {
        "status": "healthy" if is_ready else "degraded",
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
            **({"unreadable": [*unreadable]} if (unreadable := parts.streams.unreadable) else {}),
        },
    }
    return jsonify(body), 200 if is_ready else 503


def _database(parts: Parts) -> dict[str, Any]:
    """The state of the database. The gateway is ready without it, by older data or token claims."""
    if (sector_assignments := parts.sector_assignments) is None:
        return {"status": "not configured"}
    breaker = parts.breakers["database"]
    return {
        "status": _status(not breaker.failures),
        "known": sector_assignments.known,
        "pending": sector_assignments.pending,
    }


def _status(connected: bool) -> str:
    return "connected" if connected else "disconnected"


async def _check(parts: Parts) -> str | None:
    """Return None if Redis answers and accepts writes, otherwise the reason."""
    return await parts.readiness.ask()
