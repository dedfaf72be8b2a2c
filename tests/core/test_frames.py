"""A server's frames: their bytes, and taking joined ones apart again."""

from itertools import accumulate

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from trio_gateway.core.frames import (
    CLOSE,
    PING,
    PING_FRAME,
    PONG,
    TEXT,
    boundary,
    close_frame,
    frame,
    split,
    text_frame,
)

payloads = st.one_of(
    st.binary(max_size=200), st.sampled_from([0, 125, 126, 127, 65_535, 65_536]).map(bytes)
)
frames = st.lists(st.tuples(st.sampled_from([TEXT, CLOSE, PING, PONG]), payloads), max_size=5)


@pytest.mark.parametrize(
    ("size", "head"),
    [
        (0, "81 00"),
        (125, "81 7d"),
        (126, "81 7e 00 7e"),
        (65_535, "81 7e ff ff"),
        (65_536, "81 7f 00 00 00 00 00 01 00 00"),
    ],
)
def test_text_frame_is_final_and_unmasked_with_the_shortest_length(size: int, head: str) -> None:
    payload = b"x" * size

    assert text_frame(payload) == bytes.fromhex(head) + payload


def test_ping_is_two_bytes() -> None:
    assert bytes.fromhex("89 00") == PING_FRAME


@given(frames)
def test_joined_frames_split_into_what_they_were_made_of(made: list[tuple[int, bytes]]) -> None:
    joined = b"".join(frame(opcode, payload) for opcode, payload in made)

    assert [(opcode, bytes(payload)) for opcode, payload in split(joined)] == made
    assert list(split(memoryview(joined))) == list(split(joined))


@given(frames, st.data())
def test_boundary_is_the_first_end_of_a_frame_that_is_not_before_the_offset(
    made: list[tuple[int, bytes]], data: st.DataObject
) -> None:
    whole = [frame(opcode, payload) for opcode, payload in made]
    ends = [0, *accumulate(map(len, whole))]
    offset = data.draw(st.sampled_from(ends) | st.integers(0, ends[-1]))

    assert boundary(b"".join(whole), offset) == min(end for end in ends if end >= offset)


def test_close_frame_has_its_code_and_reason() -> None:
    assert close_frame(1000) == bytes.fromhex("88 02 03 e8")
    assert close_frame(4001, "no") == bytes.fromhex("88 04 0f a1") + b"no"


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
@example("x" * 123)
@example("x" * 124)
@example("é" * 62)
@example("x" + "é" * 62)
@example("x" * 120 + "😀")
@example("x" * 122 + "ñ")
def test_reason_is_cut_between_characters(reason: str) -> None:
    [(opcode, payload)] = split(close_frame(1001, reason))
    shown = bytes(payload[2:]).decode()

    assert opcode == CLOSE
    assert reason.startswith(shown)
    assert len(payload) <= 125  # RFC 6455, 5.5
    if shown != reason:  # then not one character more would fit
        assert len(payload) + len(reason[len(shown)].encode()) > 125
