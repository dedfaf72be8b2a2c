"""Gap detection: a cursor is compared with the reply to XINFO."""

import pytest

from trio_gateway.broker.stream_cursor import StreamCursor
from trio_gateway.broker.stream_gaps import Check, Gap, check
from trio_gateway.broker.stream_replies import Info
from trio_gateway.core.event_ids import START, Position, tag
from trio_gateway.runtime.source import Entry


def at(milliseconds: int, sequence: int = 0) -> Position:
    return Position((milliseconds, sequence))


BEFORE_5 = at(4, 2**64 - 1)


def cursor_after(*milliseconds: int, added: int | None = 0) -> StreamCursor:
    """A cursor that began in an empty stream and has read these entries."""
    cursor = StreamCursor("s", tag("s"), Info(added=added))
    for n in milliseconds:
        cursor.passed([Entry(at(n), b"{}")])
    return cursor


def gap(reason: str, since: Position, end: Position | None = None) -> Gap:
    return Gap(reason, since, since if end is None else end)


@pytest.mark.parametrize(
    ("info", "expected"),
    [
        (Info(at(3), at(1), 3, 3), Check(None, 3)),
        (Info(at(6), at(1), 6, 6), Check(None, 3)),
        (Info(at(6), at(5), 2, 5), Check(None, 3)),  # all that was trimmed had been read
        (
            Info(at(6), at(5), 2, 6),
            Check(gap("stream was trimmed beyond the cursor", BEFORE_5), 4),
        ),
        (Info(at(3), at(1), 3, 4), Check(gap("entries were taken away unread", at(3)), 4)),
        (Info(at(2), at(1), 2, 2), Check(gap("stream was recreated", at(3, 1), at(2)), 2)),
        (Info(at(6), at(5), 2, 2), Check(gap("stream was recreated", at(3, 1), at(3)), 0)),
        (Info(), Check(gap("stream was recreated", at(3, 1), START), 0)),
    ],
)
def test_counts_show_what_was_lost_after_three_entries(info: Info, expected: Check) -> None:
    assert check(cursor_after(1, 2, 3), info, is_tail_there=True) == expected


def test_missing_last_entry_means_another_stream_unless_it_was_deleted() -> None:
    info = Info(at(6), at(1), 6, 6)
    found = check(cursor_after(1, 2, 3), info, is_tail_there=False)
    assert found == Check(gap("another stream", at(3, 1), at(3)), None)

    deleted = info._replace(deleted=at(3))
    assert check(cursor_after(1, 2, 3), deleted, is_tail_there=False) == Check(None, 3)


# A failover: the replica that became the primary has read less of the stream than we.
FAILED_OVER = {
    "nothing was added since": (
        Info(at(3), at(1), 3, 3),
        Check(gap("stream was recreated", at(5, 1), at(3)), 3),
    ),
    "as many as were lost were added": (
        Info(at(8), at(1), 5, 5),
        Check(gap("another stream", at(5, 1), at(5)), None),
    ),
    "more were added": (
        Info(at(9), at(1), 8, 8),
        Check(gap("another stream", at(5, 1), at(5)), None),
    ),
    "its clock is behind, and the new ones are before the cursor": (
        Info(at(4), at(1), 4, 4),
        Check(gap("stream was recreated", at(5, 1), at(4)), 4),
    ),
    "an id of ours was given again": (
        Info(at(5), at(1), 5, 5),
        Check(gap("another stream", at(5, 1), at(5)), None),
    ),
    "all of ours were trimmed, and some of its own": (
        Info(at(20), at(19), 2, 9),
        Check(gap("entries may have been lost unread", at(18, 2**64 - 1)), 7),
    ),
    "as many were trimmed as we have read": (
        Info(at(20), at(11), 3, 8),
        Check(gap("entries may have been lost unread", at(10, 2**64 - 1)), 5),
    ),
    "the stream was never replicated": (
        Info(),
        Check(gap("stream was recreated", at(5, 1), START), 0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAILED_OVER)
def test_what_a_new_primary_lacks_is_one_gap(case: str) -> None:
    cursor = cursor_after(1, 2, 3, 4, 5)
    info, expected = FAILED_OVER[case]
    found = check(cursor, info, is_tail_there=False)
    assert found == expected

    assert found.gap is not None
    cursor.set_back(found.gap.end)
    cursor.read_count = found.read_count
    assert check(cursor, info, is_tail_there=True).gap is None


def test_new_primary_that_has_the_entry_at_the_cursor_has_all_before_it() -> None:
    cursor = cursor_after(1, 2, 3)
    assert check(cursor, Info(at(3), at(1), 3, 3), is_tail_there=True) == Check(None, 3)
    assert check(cursor, Info(at(9), at(1), 5, 5), is_tail_there=True) == Check(None, 3)


def test_entries_of_a_new_primary_whose_clock_is_behind_are_read_each_once() -> None:
    cursor = cursor_after(10, 20, 30)
    cursor.set_back(at(10))  # 20 and 30 were delivered, and are lost
    assert [n for n in (11, 20, 25, 30, 31) if cursor.has_read(at(n))] == [20, 30]


@pytest.mark.parametrize(
    ("first", "is_gap"),
    [(1, False), (2, True)],
    ids=["from the first entry read", "from a later one"],
)
def test_without_counts_a_stream_that_begins_later_is_a_gap_on_suspicion(
    first: int, is_gap: bool
) -> None:
    cursor = cursor_after(1, 2, 3, added=None)
    found = check(cursor, Info(at(6), at(first), 7 - first, None), is_tail_there=True)
    expected = gap("entries may have been trimmed unread", at(3)) if is_gap else None
    assert found == Check(expected, None)


def test_ids_delivered_before_the_cursor_was_set_back_are_known() -> None:
    cursor = cursor_after(5, 6, 7)
    assert not cursor.has_read(at(8))

    cursor.set_back(at(2))
    assert [n for n in range(1, 10) if cursor.has_read(at(n))] == [1, 2, 3, 4, 5, 6, 7]
