"""Events: which payloads are valid, and that they pass through unchanged."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import trio_gateway
from trio_gateway.core.events import MAX_EVENT_BYTES, Event, InvalidEvent, parse_event
from trio_gateway.core.frames import TEXT, split
from trio_gateway.testing import make_payload

SAMPLES = Path(trio_gateway.__file__).parent / "data" / "events.jsonl"


def parse(payload: bytes | str) -> Event:
    data = payload if isinstance(payload, bytes) else payload.encode()
    return parse_event(data, channel="c", received_at=7.0)


def reason(payload: bytes | str) -> str:
    with pytest.raises(InvalidEvent) as caught:
        parse(payload)
    return caught.value.reason


def with_json(key: str, value: str) -> str:
    """An event whose ``key`` has a value that is JSON text."""
    keys = {"type": '"ROUND_READY"', "tenant_id": "1", "branch_id": "1"} | {key: value}
    return "{" + ", ".join(f'"{k}": {v}' for k, v in keys.items()) + "}"


def test_the_keys_that_route_are_read() -> None:
    event = parse(make_payload("T", tenant_id=2, branch_id=3, sector_id=4, session_id=5, id="x"))

    assert (event.type, event.tenant, event.branch) == ("T", 2, 3)
    assert (event.sector, event.session, event.id) == (4, 5, "x")
    assert (event.channel, event.received_at, event.event_id) == ("c", 7.0, None)


@pytest.mark.parametrize("value", [None, ...])
def test_optional_keys_may_be_null_or_left_out(value: object) -> None:
    keys: dict[str, Any] = dict.fromkeys(["sector_id", "session_id", "table_id", "id"], value)
    event = parse(make_payload(**keys))

    assert (event.sector, event.session, event.id) == (None, None, None)


@pytest.mark.parametrize("value", [None, ...])
@pytest.mark.parametrize("key", ["type", "tenant_id", "branch_id"])
def test_required_keys_may_be_neither_null_nor_left_out(key: str, value: Any) -> None:
    assert reason(make_payload(**{key: value})) == key


NO_INT = [
    "true", "false", '"1"', '""', "1.0", "1e3", "1E0", "1e400", "0.5", "[1]", "{}", "-1",
    "9223372036854775808", "-9223372036854775809", "18446744073709551617", "9" * 400,
]  # fmt: skip
INTS = ["tenant_id", "branch_id", "sector_id", "session_id", "table_id"]


@pytest.mark.parametrize("key", INTS)
@pytest.mark.parametrize("value", NO_INT)
def test_id_must_be_an_integer_in_range(key: str, value: str) -> None:
    assert reason(with_json(key, value)) == key


@pytest.mark.parametrize("key", INTS)
def test_an_id_may_be_as_large_as_63_bits_allow(key: str) -> None:
    largest = 2**63 - 1
    event = parse(with_json(key, str(largest)))

    found = {"tenant_id": event.tenant, "branch_id": event.branch, "sector_id": event.sector,
             "session_id": event.session, "table_id": largest}  # fmt: skip
    assert found[key] == largest


@pytest.mark.parametrize("key", ["tenant_id", "sector_id", "session_id", "table_id"])
@pytest.mark.parametrize("value", ["0", "-0"])
def test_0_is_not_a_valid_id(key: str, value: str) -> None:
    assert reason(with_json(key, value)) == key


def test_branch_0_is_the_whole_tenant() -> None:
    assert parse(make_payload(branch_id=0)).branch == 0


@pytest.mark.parametrize("value", ['""', "null", "1", "true", '["A"]'])
def test_type_must_be_a_string_that_is_not_empty(value: str) -> None:
    assert reason(with_json("type", value)) == "type"


@pytest.mark.parametrize("value", ["1", "true", '["A"]', "{}"])
def test_idempotency_key_must_be_a_string(value: str) -> None:
    assert reason(with_json("id", value)) == "id"


@pytest.mark.parametrize("text", ["[]", '["type"]', "null", "true", "1", '"{}"', "[[[["])
def test_payload_must_be_a_json_object(text: str) -> None:
    assert reason(text) == "not_object"


BROKEN: dict[str, bytes | str] = {
    "nothing": "",
    "blank": "  ",
    "cut off": '{"type":"A","tenant_id":1,"branch_id":1',
    "trailing comma": '{"type":"A","tenant_id":1,"branch_id":1,}',
    "trailing junk": '{"type":"A","tenant_id":1,"branch_id":1} x',
    "two objects": '{"type":"A","tenant_id":1,"branch_id":1}{}',
    "a trailing NUL": '{"type":"A","tenant_id":1,"branch_id":1}\0',
    "a byte order mark": '\ufeff{"type":"A","tenant_id":1,"branch_id":1}',
    "single quotes": "{'type':'A','tenant_id':1,'branch_id':1}",
    "a comment": '{"type":"A","tenant_id":1,"branch_id":1/**/}',
    "UTF-16": '{"type":"A","tenant_id":1,"branch_id":1}'.encode("utf-16-le"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_payload_must_be_json(name: str) -> None:
    assert reason(BROKEN[name]) == "not_json"


@pytest.mark.parametrize(
    "value",
    ['"a\nb"', '"\\q"', '"\\u12"', '"\\uzzzz"', "01", "1.", ".5", "+1", "NaN", "-Infinity", "tru",
     "[1,]", "[1 2]", '{"a":1,}', "{a:1}", '"\0"', "", "'a'", "--1", "1e+"],
)  # fmt: skip
def test_values_of_unread_keys_must_be_json(value: str) -> None:
    assert reason(with_json("data", value)) == "not_json"


def test_json_nested_too_deeply_is_invalid_without_a_crash() -> None:
    deep = 20_000
    assert reason(with_json("data", "[" * deep + "]" * deep)) == "too_deep"
    assert reason('{"a":' * 9_000) == "too_deep"


def test_json_nested_moderately_is_valid() -> None:
    parse(with_json("data", "[" * 100 + "]" * 100))


BAD_UTF8 = [b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80", b"\x80"]


@pytest.mark.parametrize("junk", BAD_UTF8)
def test_invalid_utf8_in_unread_keys_is_rejected(junk: bytes) -> None:
    whole = make_payload(data=["here"])

    assert reason(whole.replace(b"here", junk)) == "not_utf8"
    assert reason(whole.replace(b"data", junk)) == "not_utf8"


def test_size_is_counted_in_bytes() -> None:
    empty = make_payload(data="")
    room = MAX_EVENT_BYTES - len(empty)

    def filled(text: str) -> bytes:
        return empty.replace(b'""', f'"{text}"'.encode())

    assert MAX_EVENT_BYTES == 65_536
    parse(filled("x" * room))
    parse(filled("é" * (room // 2)))
    assert reason(filled("x" * (room + 1))) == "too_big"
    assert reason(filled("é" * (room // 2 + 1))) == "too_big"


HALF_PAIRS = [
    r"\ud83d", r"\ude00", r"cut \uD83D", r"\ud83d\ud83d\ude00", r"\ude00\ud83d", r"\ud83d\n",
    r"\\\ud83d", r"\ud83d\\", r"\ud83dA", r"\ud83d\u0041",
]  # fmt: skip


@pytest.mark.parametrize("text", HALF_PAIRS)
def test_text_cut_in_the_middle_of_an_emoji_is_passed_on_unchanged(text: str) -> None:
    payload = with_json("data", f'{{"note": "{text}"}}').encode()
    event = parse(payload)

    assert event.payload == payload
    assert event.type == "ROUND_READY"


@pytest.mark.parametrize("value", [r'"\ud83d', r'"\ud83d\q"', r'"\ud83"', r"\ud83d", r'"\\ud83d'])
def test_invalid_json_is_not_accepted_as_half_an_emoji(value: str) -> None:
    assert reason(with_json("data", value)) == "not_json"


def test_payload_with_half_an_emoji_is_checked_like_any_other() -> None:
    assert reason(with_json("tenant_id", r'"\ud83d"')) == "tenant_id"
    assert reason(with_json("data", r'"\ud83d", "tenant_id": true')) == "tenant_id"


def test_a_key_written_with_escapes_is_that_key() -> None:
    assert reason(r'{"type":"A","tenant_id":1,"branch_id":1,"\u0074enant_id":0}') == "tenant_id"


def test_last_of_two_equal_keys_counts_as_in_a_browser() -> None:
    assert parse('{"tenant_id":1,"type":"A","branch_id":1,"tenant_id":2}').tenant == 2


ODD = [
    ' \n{"type":"A","tenant_id":1,"branch_id":1}\r\n\t',
    '{"v":1.10,"type":"A","n":1e999,"tenant_id":1,"z":-0.0,"branch_id":1,"big":123456789012345678901}',
    '{"type":"A","tenant_id":1,"branch_id":1,"data":"ñ \\u00f1 \\/ 😀 \\ud83d\\ude00 \\u0000"}',
    '{"b":1,"a":2,"a":3,"type":"A","tenant_id":1,"branch_id":1,"event_id":"its own"}',
    '{"type":"A","tenant_id":1,"branch_id":1,"ts":{"any":["thing"]},"entity":null,"":[]}',
]


@pytest.mark.parametrize("text", ODD)
def test_payload_is_passed_on_byte_for_byte(text: str) -> None:
    event = parse(text)

    assert event.payload == text.encode()
    assert [(op, bytes(data)) for op, data in split(event.frame)] == [(TEXT, text.encode())]


def test_an_event_is_encoded_once() -> None:
    event = parse(make_payload())

    assert event.frame is event.frame


def test_the_samples_are_valid() -> None:
    lines = SAMPLES.read_text("utf-8").splitlines()
    samples = [json.dumps(json.loads(line)["event"]) for line in lines]

    assert len([parse(sample) for sample in samples]) == 39


@pytest.mark.parametrize(
    "payload",
    [make_payload(tenant_id="secret"), b'{"secret', make_payload(data="secret") + b"x",
     make_payload(id=["secret"]), make_payload(data="secret" * 20_000), b"\xffsecret"],
)  # fmt: skip
def test_an_error_names_the_rule_and_never_the_payload(payload: bytes) -> None:
    with pytest.raises(InvalidEvent) as caught:
        parse(payload)

    assert str(caught.value)
    assert "secret" not in str(caught.value)


def test_repr_of_an_event_does_not_contain_its_payload() -> None:
    assert repr(parse(make_payload("A", data="secret"))) == "<Event A tenant=1 branch=1>"


REASONS = {"too_big", "not_utf8", "not_json", "not_object", "type", "id", *INTS}
finite = st.floats(allow_nan=False, allow_infinity=False)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | finite | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


@given(st.binary() | st.text().map(lambda text: text.encode("utf-8", "surrogatepass")))
@example(b'{"type":"\\ud800')
@example(b"\\ud800\\")
def test_random_bytes_are_invalid_and_never_crash(junk: bytes) -> None:
    assert reason(junk) in REASONS


@given(st.data())
def test_damaged_event_is_valid_or_invalid_and_never_crashes(data: st.DataObject) -> None:
    whole = make_payload(data={"note": "\U0001f600 ñ"}, ts=1.5, sector_id=5, id="x")
    at = data.draw(st.integers(0, len(whole)))
    damaged = whole[:at] + data.draw(st.binary(max_size=3)) + whole[at + 1 :]
    try:
        event = parse(damaged)
    except InvalidEvent:
        return
    assert event.payload == damaged
    assert json.loads(damaged)["tenant_id"] == event.tenant


ids = st.sampled_from([1, 0, 2**63 - 1, 2**63, -1, True, 1.0, "1", None, ...])


def valid(value: object, *, least: int, optional: bool) -> bool:
    if value is None or value is ...:
        return optional
    return type(value) is int and least <= value < 2**63


@given(st.fixed_dictionaries(dict.fromkeys(INTS, ids)), json_values)
def test_an_event_is_valid_if_each_of_its_keys_is(keys: dict[str, Any], other: object) -> None:
    good = all(
        valid(value, least=key != "branch_id", optional=key not in {"tenant_id", "branch_id"})
        for key, value in keys.items()
    )
    payload = make_payload(**keys, data=other)
    if good:
        assert parse(payload).payload == payload
    else:
        assert reason(payload) in REASONS
