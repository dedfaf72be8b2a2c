"""The contract as an AsyncAPI 3.0 document, generated from the tables that the gateway uses.

The document is public. It contains no address and no secret.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import quote

import msgspec

from .. import __version__
from ..core.audiences import (
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    SessionId,
    TenantId,
    audiences_of,
)
from ..core.client_request import SUBPROTOCOL
from ..core.close_codes import Close
from ..core.control_messages import REVOKED, SECTORS_CHANGED, Revoked, SectorsChanged
from ..core.events import MAX_EVENT_BYTES, Keys, parse_event
from ..core.message_schemas import ANSWERS, REQUESTS, Answer, Request, Schema
from ..core.routing import UNKNOWN, Routing
from ..transports.sse import PATHS

if TYPE_CHECKING:
    from ..settings import Settings

_Object = dict[str, Any]


def describe(settings: "Settings") -> _Object:
    """Make the document for a gateway with these settings: its routes, patterns and streams."""
    routes = settings.routes
    sources = _sources(
        settings.redis_channel_patterns, settings.redis_streams, settings.redis_stream_shards
    )
    channels: _Object = {}
    operations: _Object = {}
    for endpoint in Endpoint:
        received = [_event_name(name) for name in received_at(endpoint, routes)]
        if received_at(endpoint, Routing({"any other": UNKNOWN})):
            received.append("event")
        _add_endpoint(endpoint, received, channels, operations)
    for name, (address, words) in sources.items():
        channels[name] = _redis_channel(address, words, "event")
        operations[f"receive_{name}"] = _operation("receive", name, ["event"])
    for name, address in {"revoked": REVOKED, "sectors_changed": SECTORS_CHANGED}.items():
        channels[name] = _redis_channel(address, "A control message to the gateway itself.", name)
        operations[f"receive_{name}"] = _operation("receive", name, [name])
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "trio-gateway",
            "version": __version__,
            "description": "Delivers events from Redis to the clients that may receive them.",
            "license": {"name": "MIT"},
        },
        "defaultContentType": "application/json",
        "servers": _SERVERS,
        "channels": channels,
        "operations": operations,
        "components": {
            "schemas": _schemas(),
            "messages": _messages(routes),
            "securitySchemes": _SECURITY,
        },
        "x-close-codes": [
            {"code": int(close), "name": close.name, "when": close.when, "then": close.then}
            for close in Close
            if close.sent
        ],
    }


def received_at(endpoint: Endpoint, routes: Routing) -> list[str]:
    """The event types that a client on this endpoint may receive, found by routing one of each."""
    tenant, branch, sector, session = TenantId(1), BranchId(1), SectorId(1), SessionId(1)
    principal = Principal(
        endpoint=endpoint,
        tenant=tenant,
        branches=frozenset({branch}),
        expires_at=0,
        roles=endpoint.roles,
        sectors={branch: frozenset({sector})},
        session=None if endpoint.staff else session,
    )
    audiences = audiences_of(principal)
    keys = {"tenant_id": tenant, "branch_id": branch, "sector_id": sector, "session_id": session}

    def receives(name: str) -> bool:
        payload = msgspec.json.encode({"type": name, **keys})
        event = parse_event(payload, channel="", received_at=0)
        return not audiences.isdisjoint(routes.audiences(event))

    return [name for name in routes if receives(name)]


_SERVERS: Final[_Object] = {
    name: {
        "host": "{host}",
        "protocol": protocol,
        "variables": {"host": {"default": default, "description": words}},
    }
    for name, protocol, default, words in (
        ("websocket", "wss", "gateway.example", "the gateway's host name; TLS may end at a proxy"),
        ("websocket_plain", "ws", "localhost:8001", "a gateway without TLS, in development"),
        ("http", "https", "gateway.example", "as for WebSockets"),
        ("http_plain", "http", "localhost:8001", "as for WebSockets"),
        ("redis", "redis", "localhost:6380", "the Redis that backends publish to (REDIS_URL)"),
    )
}
_SECURITY: Final[_Object] = {
    "token": {"type": "httpApiKey", "in": "query", "name": "token"},
    "table_token": {"type": "httpApiKey", "in": "query", "name": "table_token"},
    "ticket": {
        "type": "httpApiKey",
        "in": "query",
        "name": "ticket",
        "description": "From `POST /ws/ticket`: valid once, for 30 seconds.",
    },
    "bearer": {"type": "http", "scheme": "bearer", "bearerFormat": "JWT"},
    "subprotocol": {
        "type": "httpApiKey",
        "in": "header",
        "name": "Sec-WebSocket-Protocol",
        "description": f"`{SUBPROTOCOL}, bearer.<token>`, answered with `{SUBPROTOCOL}`.",
    },
}


def _add_endpoint(
    endpoint: Endpoint, types: Sequence[str], channels: _Object, operations: _Object
) -> None:
    requests = {name: each for name, each in REQUESTS.items() if endpoint in each.endpoints}
    answered = {each.answer for each in requests.values()}
    unasked = [name for name, each in ANSWERS.items() if endpoint in each.unasked]
    answers = [name for name in ANSWERS if name in answered or name in unasked]
    token = "token" if endpoint.staff else "table_token"
    words = f"For {', '.join(sorted(endpoint.roles))}." if endpoint.staff else "For diners."
    query: Schema = {
        "type": "object",
        "properties": {name: {"type": "string"} for name in (token, "ticket", "last_event_id")},
    }
    names = ("websocket", "websocket_plain")
    channel = _channel(endpoint.path, names, [*requests, *answers, *types])
    channel |= {
        "description": f"{words} The upgrade is always accepted; a rejection is a close code.",
        "bindings": {"ws": {"method": "GET", "query": query, "bindingVersion": "0.1.0"}},
    }
    here = endpoint.label
    channels[here] = channel
    schemes = [token, "ticket", "bearer"]
    for name, each in requests.items():
        operation = _operation("receive", here, [name], [*schemes, "subprotocol"])
        if each.answer is not None:
            operation["reply"] = {
                "channel": _ref("channels", here),
                "messages": [_ref("channels", here, "messages", each.answer)],
            }
        operations[f"{here}_{name}"] = operation
    operations[f"send_{here}"] = _operation(
        "send", here, [*unasked, *types], [*schemes, "subprotocol"]
    )
    path = next(path for path, other in PATHS.items() if other is endpoint)
    events = f"{here}_events"
    messages = ["resumed", "gap", *types, "close"]
    channels[events] = _channel(path, ("http", "http_plain"), messages) | {
        "description": f"{words} Server-Sent Events; a rejection is an HTTP status."
    }
    http = {"http": {"method": "GET", "query": query, "bindingVersion": "0.3.0"}}
    operations[f"send_{events}"] = _operation("send", events, messages, schemes) | {
        "bindings": http
    }


def _sources(
    patterns: Iterable[str], streams: Iterable[str], shards: int
) -> dict[str, tuple[str, str]]:
    """The sources of events: address and description, by channel name in the document."""
    body = "The body of an event decides who receives it, not the channel."
    stream = "A Redis stream: XADD with one field `data`, the event. Publish durable types here."
    found = {f"pubsub_{n}": (p, f"PUBLISH. {body}") for n, p in enumerate(patterns, 1)}
    if shards > 1:
        streams = [f"{name}:{{k}}" for name in streams]
        stream += f" k, in braces, is CRC-16/XMODEM of tenant_id in decimal, modulo {shards}."
    return found | {f"stream_{n}": (name, stream) for n, name in enumerate(streams, 1)}


def _redis_channel(pattern: str, words: str, message: str) -> _Object:
    *parts, last = pattern.split("*")
    address = "".join(f"{part}{{any_{n}}}" for n, part in enumerate(parts, 1)) + last
    channel = _channel(address, ["redis"], [message]) | {"title": pattern, "description": words}
    if "{" in pattern:  # Redis allows what would be a parameter here
        channel["address"] = None
    elif parts:
        channel["parameters"] = {f"any_{n}": {} for n in range(1, len(parts) + 1)}
    return channel


def _channel(address: str, servers: Iterable[str], messages: Iterable[str]) -> _Object:
    return {
        "address": address,
        "servers": [_ref("servers", name) for name in servers],
        "messages": {name: _ref("components", "messages", name) for name in messages},
    }


def _operation(
    action: str, channel: str, messages: Iterable[str], schemes: Sequence[str] = ()
) -> _Object:
    operation: _Object = {
        "action": action,
        "channel": _ref("channels", channel),
        "messages": [_ref("channels", channel, "messages", name) for name in messages],
    }
    if schemes:  # any of them
        operation["security"] = [_ref("components", "securitySchemes", name) for name in schemes]
    return operation


def _ref(*path: str) -> _Object:
    return {"$ref": "/".join(["#", *path])}


def event_schema() -> _Object:
    """The JSON Schema of an event."""
    _, found = msgspec.json.schema_components([Keys])
    event: _Object = found["Keys"]
    event |= {
        "title": "Event",
        "description": f"At most {MAX_EVENT_BYTES} bytes. Other keys are passed through unchanged.",
    }
    event["properties"]["event_id"] = {
        "type": "string",
        "description": "Added by the gateway as the last key of durable events from a stream.",
    }
    return event


def _schemas() -> _Object:
    _, found = msgspec.json.schema_components(
        [Revoked, SectorsChanged], ref_template="#/components/schemas/{name}"
    )
    return {"Event": event_schema(), **found}


def _messages(routes: Routing) -> _Object:
    found: _Object = {}
    client_messages: Mapping[str, Request | Answer] = {**REQUESTS, **ANSWERS}
    for name, message in client_messages.items():
        text = not message.example.startswith("{")
        found[name] = {
            "name": name,
            "summary": message.note or f"Answered with `{REQUESTS[name].answer}`.",
            "contentType": "text/plain" if text else "application/json",
            "payload": message.schema,
            "examples": [{"payload": message.example if text else json.loads(message.example)}],
        }
    found["close"] = {
        "name": "close",
        "summary": "The last message of a stream of Server-Sent Events, `event: close`.",
        "payload": {
            "type": "object",
            "properties": {
                "code": {"enum": [int(close) for close in Close if close.sent]},
                "reason": {"type": "string"},
            },
            "required": ["code", "reason"],
        },
        "examples": [{"payload": {"code": 1001, "reason": "retry in 3.2s"}}],
    }
    for name, schema in {"revoked": "Revoked", "sectors_changed": "SectorsChanged"}.items():
        found[name] = {"name": name, "payload": _ref("components", "schemas", schema)}
    any_event = _ref("components", "schemas", "Event")
    found["event"] = {
        "name": "event",
        "summary": "An event of any type. A type that has no route goes to the admins.",
        "payload": any_event,
    }
    for name, each in routes.items():
        described = found[_event_name(name)] = {
            "name": name,
            "payload": {
                "allOf": [
                    any_event,
                    {"properties": {"type": {"const": name}}},
                ]
            },
            "x-to": [to.name.lower() for to in each.to if to.name],
            "x-durable": each.durable,
        }
        if name in sample_events():
            described["examples"] = [{"payload": sample_events()[name]}]
    return found


def _event_name(event_type: str) -> str:
    """The key of a type's message. A type may be any text; a key has a limited alphabet."""
    safe = quote(event_type, safe="").replace("~", "%7E").replace(".", "%2E")
    return f"event.{safe.replace('%', '.')}"


@cache
def sample_events() -> Mapping[str, _Object]:
    """The first sample event of each type."""
    text = files("trio_gateway").joinpath("data", "events.jsonl").read_text("utf-8")
    events = [json.loads(line)["event"] for line in text.splitlines()]
    return {event["type"]: event for event in reversed(events)}
