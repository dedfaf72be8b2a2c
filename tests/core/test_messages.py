import json
from functools import partial

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_gateway.core.audiences import SectorId
from trio_gateway.core.messages import (
    PONG,
    Command,
    Message,
    Reauthenticate,
    Resume,
    auth_ok,
    intervals,
    read_message,
    resumed,
    sectors_updated,
)

UNDERSTOOD: list[tuple[str, Message]] = [
    ("ping", Command.PING),
    ('{"type":"ping"}', Command.PING),
    (' \r\n{ "type" :\t"ping" } ', Command.PING),
    ('{"id":7,"type":"ping","data":{"type":"auth"}}', Command.PING),
    ('{"type":"auth","type":"ping"}', Command.PING),
    (r'{"\u0074ype":"p\u0069ng"}', Command.PING),
    ('{"type":"ping","token":[1e3,{}],"last_event_id":null}', Command.PING),
    ("refresh_sectors", Command.REFRESH_SECTORS),
    ('{"type":"refresh_sectors"}', Command.REFRESH_SECTORS_JSON),
    ('{"type":"auth","token":"abc"}', Reauthenticate("abc")),
    ('{"token":"ñ","x":1,"type":"auth"}', Reauthenticate("ñ")),
    ('{"type":"auth"}', Reauthenticate(None)),
    ('{"type":"auth","token":null}', Reauthenticate(None)),
    ('{"type":"auth","token":["abc"]}', Reauthenticate(None)),
    ('{"type":"resume","last_event_id":"1-0"}', Resume("1-0")),
    ('{"type":"resume","last_event_id":""}', Resume("")),
    ('{"type":"intervals","x":1}', Command.INTERVALS),
    ('{"type":"resume","last_event_id":"1-0","confirm":false}', Resume("1-0", confirms=False)),
    ('{"type":"resume","last_event_id":"1-0","confirm":0}', Resume("1-0")),
    ('{"type":"resume"}', Resume(None)),
    ('{"type":"resume","last_event_id":10}', Resume(None)),
]


@pytest.mark.parametrize(("text", "message"), UNDERSTOOD)
def test_a_message_is_understood_whatever_its_form(text: str, message: Message) -> None:
    assert read_message(text) == message


OTHER = [
    "", " ", "PING", "ping ", " ping", "pong", '"ping"', "null", "[]", "1", "{}", "{", "{}{}",
    '["ping"]', '[{"type":"ping"}]', '{"type":"PING"}', '{"type":"pong"}', '{"type":""}',
    '{"type":null}', '{"type":1}', '{"type":["ping"]}', '{"Type":"ping"}', '{"type":"ping"',
    '{"type":"ping"}x', "{'type':'ping'}", '\ufeff{"type":"ping"}', '{"data":{"type":"ping"}}',
    "sectors_updated:5", "refresh_sectors\n", "\0", "[" * 100_000, '{"a":' * 100_000, "\x85{",
]  # fmt: skip


@pytest.mark.parametrize("text", OTHER)
def test_any_other_text_is_unknown(text: str) -> None:
    assert read_message(text) is Command.UNKNOWN


def is_a_message(text: str) -> bool:
    """Whether it happens to be one: Hypothesis also tries strings that the code contains."""
    try:
        message = json.loads(text)
    except (ValueError, RecursionError):
        return text in ("ping", "refresh_sectors")
    return isinstance(message, dict) and message.get("type") in (
        "ping", "refresh_sectors", "auth", "resume", "intervals"
    )  # fmt: skip


@given(st.text(st.characters()) | st.text('{}[]":,\\ud8 typeingauth01'))
@example("\ud800")
@example('{"type":"\ud800"}')
@example(r'{"type":"\ud800"}')
def test_random_text_is_unknown_and_raises_nothing(text: str) -> None:
    assert read_message(text) is Command.UNKNOWN or is_a_message(text)


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_a_token_is_read_as_it_was_sent(token: str) -> None:
    assert read_message(json.dumps({"type": "auth", "token": token})) == Reauthenticate(token)


def test_answers_are_byte_for_byte_those_of_the_contract() -> None:
    sectors = {SectorId(n) for n in (11, 5, 6)}

    assert PONG == b'{"type":"pong"}'
    assert auth_ok(1_779_278_400.9) == b'{"type":"auth_ok","expires_at":1779278400}'
    assert sectors_updated(sectors, Command.REFRESH_SECTORS) == b"sectors_updated:5,6,11"
    assert (
        sectors_updated(sectors, Command.REFRESH_SECTORS_JSON)
        == b'{"type":"sectors_updated","sector_ids":[5,6,11]}'
    )
    assert (
        resumed(recovered=True, count=3, last_event_id="1-0")
        == b'{"type":"resumed","recovered":true,"count":3,"last_event_id":"1-0"}'
    )


def test_waiter_without_sectors_gets_an_empty_list() -> None:
    assert sectors_updated((), Command.REFRESH_SECTORS) == b"sectors_updated:"
    assert (
        sectors_updated((), Command.REFRESH_SECTORS_JSON)
        == b'{"type":"sectors_updated","sector_ids":[]}'
    )


@pytest.mark.parametrize("odd", [r'"\ud800"', "1e999", "NaN"])
def test_ping_is_recognised_whatever_its_other_keys_hold(odd: str) -> None:
    assert read_message(f'{{"x":{odd},"type":"ping","token":{odd}}}') is Command.PING


def test_intervals_name_the_tracked_types_if_there_are_any() -> None:
    answer = partial(intervals, heartbeat_timeout=60, receive_timeout=90, ping_interval=25)
    seconds = {"heartbeat_timeout": 60, "receive_timeout": 90, "ping_interval": 25}
    assert json.loads(answer()) == {"type": "intervals", **seconds}
    assert json.loads(answer(receipts=frozenset({"B", "A", "C"})))["receipts"] == ["A", "B", "C"]
