"""The AsyncAPI document matches the behaviour of the gateway."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from jsonschema import Draft7Validator, ValidationError

import trio_gateway
from tests.support.gateways import make_settings
from trio_gateway.core.audiences import ENDPOINTS, Endpoint
from trio_gateway.core.close_codes import Close
from trio_gateway.core.control_messages import REVOKED, SECTORS_CHANGED
from trio_gateway.core.events import InvalidEvent, parse_event
from trio_gateway.core.message_schemas import ANSWERS, REQUESTS
from trio_gateway.core.messages import Command, Message, read_message
from trio_gateway.core.routing import ROUTES
from trio_gateway.transports.sse import PATHS
from trio_gateway.web.asyncapi import describe

SETTINGS = make_settings("redis://user:hush@127.0.0.1:1")
DOCUMENT = describe(SETTINGS)
MESSAGES = DOCUMENT["components"]["messages"]
DATA = Path(trio_gateway.__file__).parent / "data" / "events.jsonl"
SAMPLES = [json.loads(line)["event"] for line in DATA.read_text("utf-8").splitlines()]


def check(name: str, payload: Any, document: Any = DOCUMENT) -> None:
    """Raise unless this is valid by the message's schema."""
    schema = {"$ref": f"#/components/messages/{name}/payload"}
    Draft7Validator({**document, **schema}).validate(payload)


def messages_of(channel: str) -> set[str]:
    """The names of the messages that a channel carries."""
    return set(DOCUMENT["channels"][channel]["messages"])


def references(part: Any) -> Iterator[str]:
    if isinstance(part, dict):
        if isinstance(part.get("$ref"), str):
            yield part["$ref"]
        for each in part.values():
            yield from references(each)
    elif isinstance(part, list):
        for each in part:
            yield from references(each)


def test_every_reference_resolves() -> None:
    found = set(references(DOCUMENT))
    assert len(found) > len(ROUTES)
    for reference in found:
        part = DOCUMENT
        for step in reference.removeprefix("#/").split("/"):
            part = part[step]


@pytest.mark.parametrize("name", ROUTES)
def test_every_event_type_is_on_the_endpoints_that_receive_it(name: str) -> None:
    to = set(MESSAGES[f"event.{name}"]["x-to"])
    roles_of = {
        "waiter": to & {"waiters", "floor", "admins"},  # admins may connect there
        "kitchen": to & {"kitchen"},
        "admin": to & {"admins"},
        "diner": to & {"diners", "branch_diners"},
    }
    for endpoint, because in roles_of.items():
        for channel in (endpoint, f"{endpoint}_events"):
            assert (f"event.{name}" in messages_of(channel)) == bool(because)


def test_submitted_round_is_not_on_the_kitchen_channel_and_unknown_types_are_for_admins() -> None:
    assert "event.ROUND_SUBMITTED" not in messages_of("kitchen")
    assert [e.label for e in Endpoint if "event" in messages_of(e.label)] == ["waiter", "admin"]


def test_every_endpoint_and_every_source_has_its_address() -> None:
    channels = DOCUMENT["channels"].values()
    addresses = {channel["address"] for channel in channels}
    assert addresses >= {*ENDPOINTS, *PATHS, REVOKED, SECTORS_CHANGED, *SETTINGS.redis_streams}
    assert {channel.get("title") for channel in channels} >= set(SETTINGS.redis_channel_patterns)


def test_every_close_code_that_is_sent_is_documented() -> None:
    codes = {each["code"]: each for each in DOCUMENT["x-close-codes"]}
    assert codes.keys() == set(Close) - {Close.NO_STATUS, Close.ABNORMAL}
    assert all(each["when"] and each["then"] for each in codes.values())


@pytest.mark.parametrize("name", MESSAGES)
def test_every_schema_is_valid_and_accepts_its_examples(name: str) -> None:
    Draft7Validator.check_schema(MESSAGES[name]["payload"])
    for each in MESSAGES[name].get("examples", []):
        check(name, each["payload"])


@pytest.mark.parametrize("event", SAMPLES, ids=lambda event: str(event["type"]))
def test_sample_events_match_the_schema_of_their_type_only(event: dict[str, Any]) -> None:
    check(f"event.{event['type']}", event)
    other = next(name for name in ROUTES if name != event["type"])
    with pytest.raises(ValidationError):
        check(f"event.{other}", event)


@pytest.mark.parametrize(
    "changed",
    [
        {"type": ""},
        {"type": None},
        {"tenant_id": 0},
        {"tenant_id": True},
        {"branch_id": -1},
        {"sector_id": "5"},
        {"session_id": 2**63},
        {"table_id": 0},
        {"id": 5},
    ],
    ids=str,
)
def test_schema_rejects_what_the_gateway_rejects(changed: dict[str, Any]) -> None:
    event = SAMPLES[0] | changed
    with pytest.raises(InvalidEvent):
        parse_event(json.dumps(event).encode(), channel="", received_at=0)
    with pytest.raises(ValidationError):
        check("event", event)


def test_every_client_message_is_documented_as_it_is_read() -> None:
    read = {name: read_message(request.example) for name, request in REQUESTS.items()}
    named = {each for each in read.values() if isinstance(each, Command)}
    assert named == set(Command) - {Command.UNKNOWN}
    assert {type(each) for each in read.values()} == set(get_args(Message))
    answers = {request.answer for request in REQUESTS.values()} - {None}
    assert answers | {name for name, each in ANSWERS.items() if each.unasked} == set(ANSWERS)


def test_any_type_name_and_stream_name_is_escaped(tmp_path: Path) -> None:
    file = tmp_path / "routes.toml"
    file.write_text(
        '[routes."día/1.~%"]\nto = ["diners"]\n[routes.ROUND_READY]\nto = ["kitchen"]\n'
    )
    document = describe(
        make_settings("redis://127.0.0.1:1", ws_routes_file=file, redis_streams=["{a}:events"])
    )
    name = "event.d.C3.ADa.2F1.2E.7E.25"
    keys = {"tenant_id": 1, "branch_id": 1}
    check(name, {"type": "día/1.~%", **keys}, document)
    assert name in document["channels"]["diner"]["messages"]
    assert "event.ROUND_READY" not in document["channels"]["diner"]["messages"]
    stream = document["channels"]["stream_1"]
    assert (stream["title"], stream["address"]) == ("{a}:events", None)


def test_document_contains_no_secret_and_no_internal_address() -> None:
    text = json.dumps(DOCUMENT)
    for secret in (SETTINGS.jwt_secret, SETTINGS.table_token_secret, "hush", "127.0.0.1"):
        assert secret
        assert secret not in text
