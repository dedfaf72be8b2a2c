"""Event ids: each names one cursor, and no other text does."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.event_ids import (
    START,
    Position,
    Stream,
    cursor_id,
    event_id,
    read_cursor,
    read_position,
    tag,
)

MOST = 2**64 - 1
numbers = st.integers(0, MOST)
positions = st.builds(lambda ms, n: Position((ms, n)), numbers, numbers)
streams = st.text(string.hexdigits.lower()[:16], min_size=4, max_size=4).map(Stream)


@given(positions, streams)
def test_event_id_names_exactly_one_position(position: Position, stream: Stream) -> None:
    assert read_cursor(event_id(stream, position)) == {stream: position}


@given(st.dictionaries(streams, positions, min_size=1, max_size=4))
def test_id_of_a_cursor_in_several_streams_is_read_as_that_cursor(
    cursor: dict[Stream, Position],
) -> None:
    text = cursor_id(cursor)
    assert read_cursor(text) == cursor
    assert text.isascii()
    assert set(text) <= {*string.hexdigits.lower(), "-", "."}


def test_id_does_not_depend_on_the_order_of_the_streams() -> None:
    a, b = Stream("aaaa"), Stream("bbbb")
    one, two = Position((1, 0)), Position((2, 0))
    assert cursor_id({a: one, b: two}) == cursor_id({b: two, a: one}) == "1-0-aaaa.2-0-bbbb"


@given(positions, positions)
def test_positions_sort_as_redis_sorts_entries(a: Position, b: Position) -> None:
    assert (a < b) == (a[0] < b[0] or (a[0] == b[0] and a[1] < b[1]))
    assert a >= START


def test_empty_cursor_has_an_id_of_its_own() -> None:
    """An empty id asks for the present position: resuming from there would recover nothing."""
    assert read_cursor(cursor_id({})) == {Stream("none"): START}


def test_position_is_read_as_redis_writes_it() -> None:
    assert read_position("1748-3") == (1748, 3)
    assert read_position("0-0") == START
    assert read_position(f"{MOST}-{MOST}") == (MOST, MOST)


@pytest.mark.parametrize(
    "text",
    [
        "", "-", "1", "1-", "-1", "a-1", "1-a", "1-1-1", "+1-1", " 1-1", "1-1\n", "1.0-1", "1_0-1",
        "-1-1", "1--1", f"{MOST + 1}-0", f"0-{MOST + 1}", "9" * 5000 + "-0", "\u0661-1", "\xb2-1",
    ],
)  # fmt: skip
def test_text_that_redis_would_not_write_is_not_a_position(text: str) -> None:
    with pytest.raises(ValueError, match="entry id"):
        read_position(text)


@pytest.mark.parametrize(
    "text",
    [
        "", ".", "1-1", "1-1-", "1-1-abc", "1-1-abcde", "1-1-ABCD", "1-1-zzzz",
        "1-0-none", "0-0-none.1-1-abcd", "1-1-ab\nd", "1-1-abc\u0661", "abcd", "-abcd", "1-abcd",
        "1-1-abcd.", ".1-1-abcd", "1-1-abcd,2-1-abcd", "1-1-1-abcd", "x-1-abcd", "$", "0", "null",
        "1" * 10_000,
    ],
)  # fmt: skip
def test_text_that_is_not_an_event_id_is_not_a_cursor(text: str) -> None:
    with pytest.raises(ValueError, match="id"):
        read_cursor(text)


@given(st.text(max_size=60) | st.text(string.digits + "-.abcd", max_size=60))
def test_any_text_is_a_cursor_or_a_value_error(text: str) -> None:
    try:
        found = read_cursor(text)
    except ValueError:
        return
    assert found
    assert all(0 <= n <= MOST for position in found.values() for n in position)


@given(st.text(max_size=30))
def test_tag_is_the_same_in_every_process_and_fits_an_id(name: str) -> None:
    assert tag(name) == tag(name)
    assert read_cursor(event_id(tag(name), START)) == {tag(name): START}


def test_default_stream_keeps_its_tag_from_release_to_release() -> None:
    """Clients hold ids across an upgrade."""
    assert tag("events:critical") == "4723"
