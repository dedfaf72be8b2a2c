"""Escalation: what is inside a wrapper reaches clients, byte for byte, with the original's id."""

import json
from typing import Any

import pytest

from trio_gateway.core.audiences import (
    Audience,
    BranchId,
    SectorId,
    TenantId,
    admins,
    floor,
    waiters,
)
from trio_gateway.core.escalation import ESCALATED
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.events import MAX_EVENT_BYTES, Event, InvalidEvent, parse_event
from trio_gateway.core.routing import ROUTES

STREAM = tag("events:critical")
ORIGINAL = (
    b'{"type": "SERVICE_CALL_CREATED","tenant_id":1, "branch_id":1,"sector_id":5,"x":"\\u00e9" }'
)
ONE, BRANCH = TenantId(1), BranchId(1)


def wrapper(event: bytes = ORIGINAL, **keys: Any) -> bytes:
    found: dict[str, Any] = {
        "type": ESCALATED,
        "tenant_id": 1,
        "branch_id": 1,
        "sector_id": 5,
        "event_id": "5-0-4723",
        "of": "SERVICE_CALL_CREATED",
        "to": "floor",
        "unless": ["waiters", "admins"],
        "step": 1,
    }
    text = json.dumps(found | keys, separators=(",", ":")).encode()
    return text[:-1] + b',"event":' + event + b"}"


def parsed(payload: bytes, **where: Any) -> Event:
    place = {"stream": STREAM, "position": Position((9, 0))} | where
    return parse_event(payload, channel="", received_at=0.0, **place)


def test_clients_get_what_is_inside_with_the_id_of_the_original() -> None:
    event = parsed(wrapper())

    assert event.durable
    assert event.event_id == "5-0-4723"
    assert event.text == ORIGINAL[:-2].rstrip() + b' ,"event_id":"5-0-4723"}'


def test_wrapper_goes_to_its_audience_without_the_earlier_ones() -> None:
    event = parsed(wrapper())

    assert ROUTES.audiences(event) == [floor(ONE, BRANCH)]
    earlier: set[Audience] = {waiters(ONE, BRANCH, SectorId(5)), admins(ONE, BRANCH)}
    assert ROUTES.excluded(event) == earlier
    assert ROUTES.excluded(parsed(ORIGINAL)) == frozenset()


def test_audience_of_a_newer_version_is_nobody() -> None:
    assert ROUTES.audiences(parsed(wrapper(to="cooks"))) == []


def test_wrapper_has_room_for_the_biggest_event() -> None:
    big = b'{"type":"A","tenant_id":1,"branch_id":1,"x":"'
    big += b"x" * (MAX_EVENT_BYTES - len(big) - 2) + b'"}'

    assert parsed(wrapper(big)).text.startswith(big[:-1])
    with pytest.raises(InvalidEvent):
        parsed(b" " + wrapper(big))
    with pytest.raises(InvalidEvent):
        parsed(wrapper(big), stream=None, position=None)


@pytest.mark.parametrize(
    "payload",
    [
        wrapper(step=0),
        wrapper(step="1"),
        wrapper(to=None),
        wrapper(event_id=5),
        wrapper().replace(b',"event":' + ORIGINAL, b""),
    ],
)
def test_what_is_no_wrapper_is_an_event_of_an_unknown_type(payload: bytes) -> None:
    event = parsed(payload)

    assert event.escalation is None
    assert not event.durable
    assert ROUTES.audiences(event) == [admins(ONE, BRANCH)]


def test_nobody_but_the_gateway_publishes_a_wrapper() -> None:
    with pytest.raises(InvalidEvent, match="the gateway alone"):
        parsed(wrapper(), stream=None, position=None)
