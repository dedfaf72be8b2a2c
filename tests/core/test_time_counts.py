"""Durations in buckets: their quantiles are close, and sums over processes are exact."""

from collections.abc import Sequence
from math import ceil

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.distinct import MOST, number_of
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.time_counts import (
    BOUNDS,
    Delivered,
    Figures,
    TimeCounts,
    Window,
    Written,
    add,
    quantiles,
    summary,
)

MS = st.integers(0, 300_000) | st.integers(0, 1100)
LIMIT = 1000


def counts(values: Sequence[int], process: int = 0) -> TimeCounts:
    """Of different events."""
    found = TimeCounts()
    for n, ms in enumerate(values):
        number = number_of(tag("events:critical"), Position((n, process)))
        add([found], ms, number if ms > LIMIT else None)
    return found


@given(st.lists(MS, min_size=1))
def test_quantiles_are_at_most_a_fifth_above_those_of_the_values(values: list[int]) -> None:
    ordered = sorted(values)
    for q, found in zip((0.5, 0.95, 0.99), quantiles(counts(values)), strict=True):
        exact = max(1, ordered[ceil(q * len(values)) - 1])
        assert found is not None
        assert min(exact, BOUNDS[-1]) - 0.1 <= found * 1000 <= exact * 1.2 + 0.1


@given(st.lists(st.lists(MS)))
def test_sums_of_processes_are_those_of_all_values(processes: list[list[int]]) -> None:
    total = TimeCounts()
    for process, values in enumerate(processes):
        answer = msgspec.json.encode(counts(values, process))
        total.merge(msgspec.json.decode(answer, type=TimeCounts))
    together = [ms for values in processes for ms in values]
    assert total.counts == counts(together).counts
    assert total.count == len(together)
    if (late := sum(ms > LIMIT for ms in together)) < MOST:
        assert total.over == late


def test_event_that_was_late_in_several_processes_is_one() -> None:
    values = [1, 2000, 3000]
    total = counts(values)
    total.merge(counts(values))
    assert (total.count, total.over) == (6, 2)


def test_no_more_events_are_late_than_there_are() -> None:
    assert counts([2000] * 2000).over <= 2000


def test_without_values_there_are_no_quantiles() -> None:
    assert summary(Figures()) == Window(
        Written(0, None, None, None, 0), Delivered(0, None, None, None, 0, 0)
    )


def test_slowness_is_that_of_the_slower_figure() -> None:
    figures = Figures(counts([1] * 100), counts([100, 2000]))
    window = summary(figures)
    assert window.slowness == window.delivered.p95
    assert window.delivered.over == 1


def test_clients_that_confirm_to_another_process_leave_no_negative_number() -> None:
    sent, confirmed = Figures(unconfirmed=3), Figures(unconfirmed=-5)
    sent.merge(confirmed)
    assert summary(sent).delivered.unconfirmed == 0
