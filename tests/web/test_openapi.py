"""The OpenAPI document is valid, and says what the API accepts and answers."""

import json
import re
from typing import Any

import msgspec
import pytest
from jsonschema import Draft202012Validator, ValidationError
from openapi_spec_validator import OpenAPIV31SpecValidator

from tests.support.gateways import make_settings
from trio_gateway.core.events import InvalidEvent, parse_event
from trio_gateway.core.routing import ROUTES
from trio_gateway.web.api.calls import CALLS
from trio_gateway.web.api.guard import Invalid
from trio_gateway.web.api.history import check_since
from trio_gateway.web.asyncapi import describe as describe_events
from trio_gateway.web.openapi import describe

SETTINGS = make_settings("redis://user:hush@127.0.0.1:1")
DOCUMENT = describe(SETTINGS)
EVENT = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}


def validator(schema: Any) -> Draft202012Validator:
    """For values of a schema that may refer to the document."""
    return Draft202012Validator({**schema, "components": DOCUMENT["components"]})


def test_the_document_is_valid_by_the_official_schema() -> None:
    # As a program reads it: an object has no tuples.
    assert list(OpenAPIV31SpecValidator(json.loads(json.dumps(DOCUMENT))).iter_errors()) == []
    broken = json.loads(json.dumps(DOCUMENT))
    del broken["paths"]["/ws/api/publish"]["post"]["responses"]["200"]["description"]
    assert list(OpenAPIV31SpecValidator(broken).iter_errors())


def test_the_document_has_every_call_with_its_scope_and_no_secret() -> None:
    assert set(DOCUMENT["paths"]) == {call.path for call in CALLS}
    for call in CALLS:
        operation = DOCUMENT["paths"][call.path][call.method.lower()]
        assert f"`{call.scope}`" in operation["description"]
        assert operation["summary"]
        assert {"200", "401", "403", "404", "422", "429", "503"} <= set(operation["responses"])
    assert "hush" not in json.dumps(DOCUMENT)
    assert set(DOCUMENT["x-event-types"]) == set(ROUTES)


BODIES: list[tuple[str, Any]] = [
    ("publish", {"events": [EVENT]}),
    ("publish", {"events": []}),
    ("publish", {}),
    ("publish", {"events": EVENT}),
    ("publish", {"events": [], "x": 1}),
    ("publish", {"events": [EVENT] * 1001}),
    *(
        ("disconnect", {"tenant_id": 1} | more)
        for more in (
            {"user_id": "21"},
            {"user_id": 21},
            {"session_id": 456, "reason": "moved"},
            {"jti": "a"},
            {"jti": "a", "user_id": None},
            {"jti": "a", "user_id": 21},
            {"jti": None},
            {},
            {"user_id": "a"},
            {"user_id": ""},
            {"user_id": "2" * 41},
            {"user_id": -1},
            {"session_id": 0},
            {"jti": ""},
            {"jti": "a", "reason": "x" * 101},
            {"user": "21"},
            {"user_id": "21", "tenant_id": 0},
            {"user_id": "21", "tenant_id": "1"},
            {"user_id": "21", "tenant_id": 2**63},
        )
    ),
    ("refresh", {"tenant_id": 1, "waiter_id": "21"}),
    ("refresh", {"tenant_id": 1}),
    ("refresh", {"tenant_id": 1, "waiter_id": "a"}),
    ("refresh", {"tenant_id": 1, "waiter_id": 1.5}),
]


@pytest.mark.parametrize(("name", "body"), BODIES, ids=lambda each: str(each)[:60])
def test_the_schema_of_a_body_accepts_what_the_call_accepts(name: str, body: Any) -> None:
    call = next(each for each in CALLS if each.name == name)
    assert call.body is not None
    operation = DOCUMENT["paths"][call.path]["post"]
    schema = operation["requestBody"]["content"]["application/json"]["schema"]
    try:
        msgspec.json.decode(json.dumps(body), type=call.body)
    except msgspec.ValidationError:
        with pytest.raises(ValidationError):
            validator(schema).validate(body)
    else:
        validator(schema).validate(body)


def patterns(node: Any) -> list[str]:
    """Those in a schema or document."""
    if not isinstance(node, dict):
        return (
            [p for each in node for p in patterns(each)] if isinstance(node, list | tuple) else []
        )
    own = [node["pattern"]] if isinstance(node.get("pattern"), str) else []
    return own + [p for each in node.values() for p in patterns(each)]


def test_patterns_are_in_the_dialect_of_json_schema() -> None:
    found = patterns(DOCUMENT) + patterns(describe_events(SETTINGS))
    assert "^[0-9]{1,40}$" in found
    python_only = re.compile(r"\\[AZ]|\(\?(?![:=!]|<[=!])")  # ECMA-262 does not have these
    assert [each for each in found if python_only.search(each)] == []


@pytest.mark.parametrize(
    "since",
    ["0", "1.5", "1-0-4723", "1-0-4723.2-0-00ff", "0-0-none", "-1", "1-0", "1-0-47G3", "1-0-NONE"],
)
def test_the_schema_of_since_accepts_what_the_call_accepts(since: str) -> None:
    (parameters,) = (each.query for each in CALLS if each.name == "history")
    schema = next(each.schema for each in parameters if each.name == "since")
    try:
        value: Any = float(since)
    except ValueError:
        value = since
    try:
        check_since(since)
    except Invalid:
        with pytest.raises(ValidationError):
            validator(schema).validate(value)
    else:
        validator(schema).validate(value)


@pytest.mark.parametrize(
    ("entry", "is_valid"), [({}, False), ({"event_id": None}, True), ({"error": "x"}, True)]
)
def test_the_schema_of_an_outcome_requires_one(entry: Any, is_valid: bool) -> None:
    schema = {"$ref": "#/components/schemas/Published"}
    assert validator(schema).is_valid(entry) == is_valid


@pytest.mark.parametrize("changed", [{"tenant_id": 0}, {"type": ""}, {"id": 5}, {}], ids=str)
def test_the_schema_of_an_event_accepts_what_the_gateway_accepts(changed: dict[str, Any]) -> None:
    schema = {"$ref": "#/components/schemas/Event"}
    event = EVENT | changed
    if not changed:
        validator(schema).validate(event)
        return
    with pytest.raises(InvalidEvent):
        parse_event(json.dumps(event).encode(), channel="", received_at=0)
    with pytest.raises(ValidationError):
        validator(schema).validate(event)
