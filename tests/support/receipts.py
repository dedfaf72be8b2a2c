"""What tests of receipts share: a service call, a backend that publishes it, and who asks."""

import json
from pathlib import Path
from typing import Any

import redis
import trio
from trio_websocket import WebSocketConnection

from trio_gateway.testing import make_jwt

from .gateways import JWT_SECRET, Reachable, Reply, Running, admitted, http, receive_event, serving

EVENT = {"type": "SERVICE_CALL_CREATED", "tenant_id": 1, "branch_id": 1, "sector_id": 5}


def one(redis_url: str, folder: Path, routes: str, **settings: Any) -> Any:
    """A gateway with this routes file."""
    file = folder / "routes.toml"
    file.write_text(routes)
    return serving(redis_url, "direct", ws_routes_file=file, **settings)


def waiter_at(gateway: Running, user: str = "21", sector: int = 5, **claims: Any) -> Any:
    """A waiter that has been admitted: of the sector of the service call, unless it is another."""
    return admitted(gateway.staff_url("waiter", sub=user, sector_ids=[sector], **claims))


def publish(backend: "redis.Redis", stream: str = "events:critical", **keys: Any) -> str:
    """Publish a service call, with these keys changed; returns the id of its entry."""
    entry: Any = backend.xadd(stream, {"data": json.dumps(EVENT | keys)})
    return str(entry.decode())


async def ask(
    gateway: Reachable, event_id: object, *, path: str = "/ws/receipts", **claims: Any
) -> Reply:
    """Ask about an event, as a MANAGER."""
    token = make_jwt(JWT_SECRET, **{"roles": ["MANAGER"]} | claims)
    headers = {"Authorization": f"Bearer {token}"}
    return await http(gateway.port, f"{path}?event_id={event_id}", headers=headers)


async def post(gateway: Reachable, token: str, body: Any) -> int:
    """Confirm with a request; JSON as bytes is sent as it is. Returns the status."""
    headers = {"Authorization": f"Bearer {token}"}
    reply = await http(gateway.port, "/ws/receipts", method="POST", headers=headers, json_body=body)
    return reply.status


async def receipts(gateway: Reachable, event_id: object, **claims: Any) -> dict[str, Any]:
    reply = await ask(gateway, event_id, **claims)
    assert reply.status == 200, reply.text
    found: dict[str, Any] = json.loads(reply.text)
    return found


def numbers(found: dict[str, Any]) -> tuple[int, int, int]:
    return found["written"], found["delivered"], found["seen"]


async def say(client: WebSocketConnection, **message: Any) -> None:
    """Send a message, and wait until it has been handled."""
    await client.send_message(json.dumps(message))
    if message["type"] != "ping":
        await client.send_message("ping")
    while await receive_event(client) != {"type": "pong"}:
        pass


async def next_events(client: WebSocketConnection, number: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    with trio.fail_after(10):
        while len(found) < number:
            if (event := await receive_event(client, 10)).get("type") != "pong":
                found.append(event)
    return found
