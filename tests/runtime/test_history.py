"""History: which events it holds and for how long, and what a client has missed."""

import time
from collections.abc import Collection, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.audiences import Audience, BranchId, TenantId, admins, floor, kitchen
from trio_gateway.core.event_ids import START, Position, Stream
from trio_gateway.core.events import Event
from trio_gateway.runtime.history import History, StoredEvent
from trio_gateway.testing import make_event

A, B = Stream("aaaa"), Stream("bbbb")
TENANT, BRANCH = TenantId(1), BranchId(1)
FLOOR, KITCHEN, ADMINS = floor(TENANT, BRANCH), kitchen(TENANT, BRANCH), admins(TENANT, BRANCH)
ALL = (FLOOR, KITCHEN, ADMINS)


def at(milliseconds: int, sequence: int = 0) -> Position:
    return Position((milliseconds, sequence))


def event(
    stream: Stream, position: Position, data: object = None, received_at: float = 0.0
) -> Event:
    return make_event(data=data, received_at=received_at, stream=stream, position=position)


def add(
    history: History,
    position: Position,
    *,
    stream: Stream = A,
    audiences: Collection[Audience] = ALL,
    now: float = 0.0,
    data: object = None,
) -> None:
    history.add(event(stream, position, data, now), audiences, now=now)
    history.extent.advance(stream, position)


def begun(*streams: Stream, **bounds: float) -> History:
    """A history of empty streams."""
    history = History(
        events=int(bounds.pop("events", 1000)),
        size=int(bounds.pop("size", 10**9)),
        age=bounds.pop("age", 10**9),
    )
    assert not bounds
    for stream in streams or (A,):
        history.extent.begin(stream, START, whole=True)
        history.extent.advance(stream, START)
    return history


def milliseconds_of(stored: Sequence[StoredEvent]) -> list[int]:
    return [each.position[0] for each in stored]


def missed(
    history: History, position: Position, *audiences: Audience, stream: Stream = A
) -> list[int]:
    return milliseconds_of(history.missed({stream: position}, audiences or ALL))


# Bounds


def test_history_is_bounded_by_count_and_the_oldest_event_goes_first() -> None:
    history = begun(events=3)
    for n in range(1, 6):
        add(history, at(n))

    assert len(history) == 3
    assert missed(history, START) == [3, 4, 5]
    assert history.extent.covers({A: at(2)})
    assert not history.extent.covers({A: at(1)})


def test_history_is_bounded_by_the_bytes_of_its_frames() -> None:
    frame = len(event(A, at(1)).frame)
    history = begun(size=3 * frame)
    for n in range(1, 6):
        add(history, at(n))
        assert history.bytes == min(n, 3) * frame

    assert missed(history, START) == [3, 4, 5]


def test_event_bigger_than_the_bound_is_forgotten_at_once() -> None:
    history = begun(size=10)
    add(history, at(1))

    assert (len(history), history.bytes) == (0, 0)
    assert not history.extent.covers({A: START})
    assert history.extent.covers({A: at(1)})


def test_age_is_counted_from_receipt_and_not_from_the_entry_id() -> None:
    history = begun(age=10)
    add(history, at(5), now=5)
    add(history, at(3_600_009), now=9)
    add(history, at(3_600_010), now=15)
    assert missed(history, START) == [5, 3_600_009, 3_600_010]
    history.trim(15.001)
    assert missed(history, START) == [3_600_009, 3_600_010]

    history.trim(1000)
    assert (len(history), history.bytes) == (0, 0)
    assert history.extent.covers({A: at(3_600_010)})
    assert not history.extent.covers({A: at(3_600_009)})


def test_emptied_history_holds_no_memory() -> None:
    history = begun(A, B, age=10)
    for n in range(1, 100):
        add(
            history, at(n), stream=A if n % 3 else B, audiences=[admins(TENANT, BranchId(n)), FLOOR]
        )

    history.trim(1000)

    assert (len(history), history.bytes) == (0, 0)
    assert not history._by_audience
    assert not history._kept


# What was missed


def test_audience_missed_its_own_events_only() -> None:
    history = begun()
    add(history, at(1), audiences=[FLOOR])
    add(history, at(2), audiences=[KITCHEN])
    add(history, at(3), audiences=[FLOOR, ADMINS])
    add(history, at(4), audiences=[])

    assert missed(history, START, FLOOR) == [1, 3]
    assert missed(history, START, KITCHEN) == [2]
    assert missed(history, START, floor(TenantId(2), BRANCH)) == []
    assert history.missed({A: START}, []) == []


def test_event_for_several_audiences_of_one_client_is_missed_once() -> None:
    history = begun()
    for n in range(1, 5):
        add(history, at(n))
    assert missed(history, at(1), FLOOR, KITCHEN, ADMINS) == [2, 3, 4]


def test_only_streams_of_the_cursor_are_replayed_in_the_order_of_their_entries() -> None:
    history = begun(A, B)
    for n in range(1, 9):
        add(history, at(n), stream=A if n % 2 else B)

    assert missed(history, at(3)) == [5, 7]
    assert missed(history, at(4), stream=B) == [6, 8]
    assert milliseconds_of(history.missed({A: at(3), B: at(4)}, ALL)) == [5, 6, 7, 8]


@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.sets(st.sampled_from(ALL))), max_size=30),
    st.integers(1, 30),
    st.integers(0, 31),
    st.sets(st.sampled_from(ALL)),
)
def test_missed_events_agree_with_a_plain_list(
    happened: list[tuple[Stream, set[Audience]]], most: int, seen: int, mine: set[Audience]
) -> None:
    history = begun(A, B, events=most)
    for n, (stream, audiences) in enumerate(happened, 1):
        add(history, at(n), stream=stream, audiences=audiences)

    stored = list(enumerate(happened, 1))[-most:] if happened else []
    for cursor in ({A: at(seen)}, {A: at(seen), B: at(seen // 2)}):
        expected = [
            n for n, (stream, routed) in stored
            if stream in cursor and cursor[stream] < at(n) and routed & mine
        ]  # fmt: skip
        assert milliseconds_of(history.missed(cursor, mine)) == expected


def test_cost_of_a_replay_depends_on_what_was_missed_only() -> None:
    def cost(happened: int, streams: Sequence[Stream]) -> float:
        history = begun(*streams, events=10**6)
        for n in range(1, happened):
            add(history, at(n), stream=streams[n % len(streams)])
        cursor = {streams[0]: at(happened - 20)}
        took = []
        for _ in range(20):
            started = time.perf_counter()
            history.missed(cursor, ALL)
            took.append(time.perf_counter() - started)
        return min(took)

    for streams in ([A], [A, B]):
        assert cost(20_000, streams) < 20 * cost(200, streams)  # it would be 100 times as much


def test_restart_of_one_stream_among_many_events_of_another_is_quick() -> None:
    history = begun(A, B, events=10**6)
    for n in range(1, 20_000):
        add(history, at(n), stream=A if n % 2 else B, audiences=[FLOOR])

    started = time.perf_counter()
    history.restart(A, since=at(30_000), end=at(30_000))

    assert time.perf_counter() - started < 1  # it was ten and more
    assert missed(history, START) == []
    assert len(missed(history, START, stream=B)) == len(history) == 9_999


# When entries were lost


def test_stream_trimmed_beyond_the_cursor_continues_at_its_first_entry() -> None:
    history = begun()
    for n in (1, 2, 3):
        add(history, at(n))
    history.restart(A, since=at(9), end=at(9))

    assert (len(history), history.bytes) == (0, 0)
    assert not history.extent.covers({A: at(3)})
    assert not history.extent.covers({A: START})
    assert history.extent.covers(history.extent.end)
    add(history, at(10))
    assert missed(history, at(9)) == [10]


def test_recreated_stream_does_not_cover_positions_of_the_old_one() -> None:
    """Redis came back with 1 and 2 of 1, 2, 3: a client that saw 2 has missed 3, unnoticed."""
    history = begun()
    for n in (1, 2, 3):
        add(history, at(n))
    history.restart(A, since=at(3, 1), end=at(2))
    add(history, at(10))
    add(history, at(11))

    for n in (1, 2, 3):
        assert not history.extent.covers({A: at(n)})
    assert history.extent.covers({A: at(10)})
    assert missed(history, at(10)) == [11]


def test_stream_recreated_twice_does_not_cover_positions_of_the_first() -> None:
    history = begun()
    for n in (1, 2, 3):
        add(history, at(n))
    history.restart(A, since=at(3, 1), end=START)
    history.restart(A, since=at(0, 1), end=START)
    add(history, at(10))
    assert not history.extent.covers({A: at(2)})
    assert history.extent.covers({A: at(10)})


def test_restart_does_not_change_other_streams() -> None:
    history = begun(A, B)
    for n in range(1, 9):
        add(history, at(n), stream=A if n % 2 else B)
    history.restart(A, since=at(20), end=at(20))

    assert missed(history, START) == []
    assert missed(history, START, stream=B) == [2, 4, 6, 8]
    assert history.extent.covers({B: START})
    add(history, at(21))
    history.trim(10**10)
    assert (len(history), history.bytes) == (0, 0)
    assert not history._by_audience


# Since a time


@pytest.mark.parametrize(
    ("moment", "expected"),
    [
        (0, [1000, 2000, 3000]), (-1e300, [1000, 2000, 3000]), (1.0, [1000, 2000, 3000]),
        (1.0009, [1000, 2000, 3000]), (1.0011, [2000, 3000]), (3, [3000]), (3.001, []), (1e300, []),
    ],
)  # fmt: skip
def test_time_is_compared_with_the_milliseconds_of_the_entry_id(
    moment: float, expected: list[int]
) -> None:
    history = begun()
    for n in (1000, 2000, 3000):
        add(history, at(n))
    cursor, complete = history.extent.place_before(moment)
    assert (milliseconds_of(history.missed(cursor, ALL)), complete) == (expected, True)


@given(
    st.lists(st.tuples(st.sampled_from([A, B]), st.sets(st.sampled_from(ALL))), max_size=40),
    st.integers(0, 41),
    st.integers(0, 41),
    st.sets(st.sampled_from(ALL)),
    st.integers(1, 7),
)
def test_chunks_together_are_all_that_was_missed(
    added: list[tuple[Stream, set[Audience]]], a: int, b: int, mine: set[Audience], most: int
) -> None:
    history = begun(A, B, events=30)
    for n, (stream, audiences) in enumerate(added, 1):
        add(history, at(n), stream=stream, audiences=audiences)
    cursor = {A: at(a), B: at(b)}
    expected, found = history.missed(cursor, mine), []
    while chunk := history.following(cursor, mine, most):
        assert len(chunk) <= most
        found += chunk
        for stored in chunk:
            cursor = {**cursor, stored.stream: stored.position}
    assert found == expected


def test_time_before_the_history_is_not_complete() -> None:
    history = begun(events=2)
    for n in (1000, 2000, 3000):
        add(history, at(n))
    assert [history.extent.place_before(t)[1] for t in (0.5, 1, 1.5)] == [False, False, True]

    late = History(age=10**9)
    assert late.extent.place_before(9) == ({}, False)
    late.extent.begin(A, at(2000))
    late.extent.advance(A, at(2000))
    assert [late.extent.place_before(t)[1] for t in (1, 2, 2.5)] == [False, False, True]
