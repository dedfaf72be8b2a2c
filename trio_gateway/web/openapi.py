"""The API for backends as an OpenAPI 3.1 document, generated from the tables that it uses.

The document is public. It contains no address and no secret.
"""

from typing import TYPE_CHECKING, Any, Final

import msgspec

from .. import __version__
from .api.calls import CALLS
from .api.control import WHOSE
from .api.guard import Call
from .asyncapi import event_schema, sample_events

if TYPE_CHECKING:
    from ..settings import Settings

_Object = dict[str, Any]
_REF: Final = "#/components/schemas/{name}"
_ERRORS: Final = {
    401: "no key, or an unknown one",
    403: "the key does not have the scope, or is not for that tenant; nothing was done",
    404: "there is no API here: WS_API_KEYS_FILE is not set",
    408: "the rest of the body did not come",
    413: "the body is too big",
    422: "the request is invalid; the text names the field",
    429: "too many requests of the key, or wrong secrets of the address",
    503: "Redis does not answer or refuses, or the process has too much to do",
}
_WITH_BODY: Final = frozenset({408, 413})
_TRY_AGAIN: Final = frozenset({429, 503})


def describe(settings: "Settings") -> _Object:
    """Make the document for a gateway with these settings: its routes decide what is durable."""
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "trio-gateway: API for backends",
            "version": __version__,
            "description": "Publishes events, controls clients and reads, over HTTP.",
            "license": {"name": "MIT", "identifier": "MIT"},
        },
        "servers": [
            {
                "url": "https://{host}",
                "variables": {
                    "host": {"default": "gateway.example", "description": "the gateway's host name"}
                },
            }
        ],
        "security": [{"key": []}],
        "tags": [{"name": scope} for scope in dict.fromkeys(str(call.scope) for call in CALLS)],
        "paths": {call.path: {call.method.lower(): _operation(call)} for call in CALLS},
        "components": {
            "securitySchemes": {
                "key": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "The secret of a key in WS_API_KEYS_FILE.",
                }
            },
            "schemas": _schemas(),
            "responses": {f"Error{status}": _error(status) for status in _ERRORS},
        },
        "x-event-types": {
            name: {"durable": route.durable, "to": [to.name.lower() for to in route.to if to.name]}
            for name, route in settings.routes.items()
        },
    }


def _operation(call: Call) -> _Object:
    words = (call.answer.__doc__ or "").partition("\n")[0]
    found: _Object = {
        "operationId": call.name,
        "tags": [str(call.scope)],
        "summary": words,
        "description": f"Needs the scope `{call.scope}`.",
        "responses": {
            "200": {"description": "done", "content": _json(call.reply)},
            **{
                str(status): {"$ref": f"#/components/responses/Error{status}"}
                for status in _ERRORS
                if call.body is not None or status not in _WITH_BODY
            },
        },
    }
    if call.query:
        found["parameters"] = [
            {
                "name": each.name,
                "in": "query",
                "required": each.required,
                "description": each.words,
                "schema": each.schema,
            }
            for each in call.query
        ]
    if call.body is not None:
        found["requestBody"] = {
            "required": True,
            "description": f"At most {call.most_bytes} bytes.",
            "content": _json(call.body),
        }
    return found


def _json(kind: type[msgspec.Struct]) -> _Object:
    return {"application/json": {"schema": {"$ref": _REF.format(name=kind.__name__)}}}


def _error(status: int) -> _Object:
    found: _Object = {
        "description": _ERRORS[status],
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
    }
    if status in _TRY_AGAIN:
        found["headers"] = {
            "Retry-After": {"description": "seconds", "schema": {"type": "integer", "minimum": 1}}
        }
    return found


def _schemas() -> _Object:
    kinds = [kind for call in CALLS for kind in (call.body, call.reply) if kind is not None]
    _, found = msgspec.json.schema_components(kinds, ref_template=_REF)
    event = {"$ref": _REF.format(name="Event")}
    for name in ("PublishRequest", "HistoryReply"):
        found[name]["properties"]["events"]["items"] = event
    # msgspec does not know what is checked after decoding, or never left out.
    found["Published"]["anyOf"] = [{"required": ["event_id"]}, {"required": ["error"]}]
    found["DisconnectRequest"]["oneOf"] = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in WHOSE
    ]
    return {
        **found,
        "Event": {**event_schema(), "examples": list(sample_events().values())[:3]},
        "Error": {
            "type": "object",
            "properties": {"error": {"type": "string"}},
            "required": ["error"],
        },
    }
