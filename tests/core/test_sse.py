"""Frames as Server-Sent Events: what a browser's EventSource makes of them."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.event_source import Message, Parser
from trio_gateway.core.close_codes import Close
from trio_gateway.core.event_ids import Position, event_id, tag
from trio_gateway.core.frames import PING_FRAME, PONG, frame, text_frame
from trio_gateway.core.messages import GAP, resumed
from trio_gateway.core.sse import HELLO, EventWriter, close_event
from trio_gateway.testing import make_event

STREAM = tag("events:critical")
ID = event_id(STREAM, Position((1790000000000, 7)))


def parsed(data: bytes) -> list[Message]:
    return Parser().feed(data)


def as_events(data: bytes) -> bytes:
    return EventWriter().convert(data)


def durable(number: int = 7, **keys: object) -> bytes:
    position = Position((1790000000000, number))
    return make_event(stream=STREAM, position=position, **keys).frame  # type: ignore[arg-type]


def test_event_is_one_message_byte_for_byte() -> None:
    text = '{"type":"X",  "n":1.50, "s":"é🙏\\u00e9"}'
    assert as_events(text_frame(text.encode())) == f"data: {text}\n\n".encode()


def test_joined_frames_are_messages_in_their_order() -> None:
    frames = [make_event(n=n).frame for n in range(3)]
    assert [m.json["n"] for m in parsed(as_events(b"".join(frames)))] == [0, 1, 2]


def test_durable_event_sets_the_last_event_id_and_later_messages_do_not_change_it() -> None:
    messages = parsed(as_events(durable() + text_frame(GAP)))
    assert [m.last_event_id for m in messages] == [ID, ID]
    assert messages[0].json["event_id"] == ID


def test_event_that_is_older_than_others_leaves_the_last_event_id_unchanged() -> None:
    writer, parser = EventWriter(), Parser()
    data = writer.convert(durable(6)) + writer.convert(durable(7) + durable(5) + durable(8))
    last = [message.last_event_id.split("-")[1] for message in parser.feed(data)]
    assert last == ["6", "7", "7", "8"]
    back = resumed(recovered=False, count=0, last_event_id=event_id(STREAM, Position((1, 0))))
    data = writer.convert(text_frame(back) + durable(3))
    last = [message.last_event_id for message in parser.feed(data)]
    assert last == ["1-0-4723", "1790000000000-3-4723"]


@pytest.mark.parametrize("recovered", [True, False])
@pytest.mark.parametrize("last_event_id", [ID, f"{ID}.5-0-00ff", "0-0-none"])
def test_answer_to_a_resume_sets_the_last_event_id(recovered: bool, last_event_id: str) -> None:
    text = resumed(recovered=recovered, count=12, last_event_id=last_event_id)
    (message,) = parsed(as_events(text_frame(text)))
    assert message == ("message", text.decode(), last_event_id)


@pytest.mark.parametrize(
    "payload",
    [
        b'{"type":"X","event_id":"whatever"}',
        b'{"type":"X","event_id":"1-2-abcd\\nid: 9-9-ffff"}',
        b'{"type":"X","event_id":"1-2-abcd","n":1}',
        b'{"type":"X","data":{"n":1,"event_id":"1-2-abcd"}}',
        b'{"type":"X","text":",\\"event_id\\":\\"1-2-abcd\\"}"}',
        b'{"type":"resumed","tenant_id":1,"branch_id":1,"last_event_id":"1-2-abcd"}',
    ],
)
def test_text_that_only_looks_like_an_event_id_sets_no_id(payload: bytes) -> None:
    assert parsed(as_events(text_frame(payload))) == [("message", payload.decode(), "")]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_event_on_several_lines_means_the_same_to_the_client(end: str) -> None:
    payload = '{\n  "type": "X",\n\n  "data: ": "id: 5"\n}\n'.replace("\n", end)
    (message,) = parsed(as_events(text_frame(payload.encode())))
    assert message.json == json.loads(payload)
    assert message.last_event_id == ""


def test_ping_is_a_comment_that_pages_do_not_see() -> None:
    parser = Parser()
    assert parser.feed(as_events(PING_FRAME)) == []
    assert parser.comments == ["ping"]
    assert as_events(frame(PONG, b"hm")) == b""


def test_close_has_its_code_and_reason_and_sets_the_retry_time() -> None:
    parser = Parser()
    (message,) = parser.feed(HELLO + close_event(Close.GOING_AWAY, "retry in 3.2s"))
    assert message == ("close", '{"code":1001,"reason":"retry in 3.2s"}', "")
    assert parser.retry == 3200


def test_close_without_a_hint_does_not_change_the_retry_time() -> None:
    parser = Parser()
    (message,) = parser.feed(HELLO + close_event(Close.AUTH_FAILED, 'a "bad"\ntoken'))
    assert message.json == {"code": 4001, "reason": 'a "bad"\ntoken'}
    assert parser.retry == 3000


_WHITE = st.text(alphabet=" \t\r\n", max_size=3)
_VALUES = st.recursive(
    st.none() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=40)
@given(st.lists(st.tuples(_WHITE, _VALUES, st.booleans()), min_size=1, max_size=4))
def test_any_published_json_arrives_with_the_same_value(
    published: list[tuple[str, object, bool]],
) -> None:
    texts = []
    for white, value, ascii_only in published:
        text = json.dumps({"v": value}, indent=white, ensure_ascii=ascii_only)
        texts.append(text.encode(errors="replace").decode())
    data = b"".join(text_frame(text.encode()) for text in texts)
    assert [m.json for m in parsed(as_events(data))] == [json.loads(text) for text in texts]
