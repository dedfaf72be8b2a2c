"""Sets of events: few are counted exactly, many about, and none twice."""

import sys
from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.distinct import MOST, count, include, join, number_of
from trio_gateway.core.event_ids import Position, Stream, tag

STREAM = tag("events:critical")
PLACES = st.tuples(
    st.sampled_from([STREAM, tag("events:other")]),
    st.tuples(st.integers(1, 2**42), st.integers(0, 100)),
)


def kept(places: Iterable[tuple[Stream, tuple[int, int]]]) -> bytes:
    found = b""
    for stream, position in places:
        found = include(found, number_of(stream, Position(position)))
    return found


def numbered(*numbers: int) -> bytes:
    """A set of events that came one after the other."""
    return kept((STREAM, (1_796_059_123_684 + n // 10, n % 10)) for n in numbers)


@given(st.lists(PLACES, max_size=MOST - 1), st.lists(PLACES, max_size=MOST - 1))
def test_few_are_counted_exactly_however_often_they_are_added(
    one: list[tuple[Stream, tuple[int, int]]], other: list[tuple[Stream, tuple[int, int]]]
) -> None:
    assert count(kept(one + one)) == len(set(one))
    if len(together := {*one, *other}) < MOST:
        assert count(join(kept(one), kept(other))) == len(together)


@given(st.lists(st.integers(0, 5000)), st.lists(st.integers(0, 5000)))
def test_a_joined_set_is_that_of_all_its_events(one: list[int], other: list[int]) -> None:
    assert join(numbered(*one), numbered(*other)) == numbered(*one, *other)


def test_many_are_counted_about_and_take_no_more_memory() -> None:
    for number in (200, 1000, 20_000):
        here, there = numbered(*range(number)), numbered(*range(number // 2, number))
        assert abs(count(join(here, there)) / number - 1) < 0.27
        assert sys.getsizeof(here) <= 4 * MOST + 40
