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
