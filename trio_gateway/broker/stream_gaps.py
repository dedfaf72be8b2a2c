"""Gap detection: whether entries of a stream were lost between two reads.

XREAD does not tell when entries were trimmed before they were read, nor when Redis came back with
an older or another stream. XINFO STREAM does, by how many entries there have ever been.
"""

from typing import NamedTuple

from ..core.event_ids import START, Position
from .stream_cursor import StreamCursor, after, before
from .stream_replies import Info


class Gap(NamedTuple):
    """Entries were lost, or may have been.

    A client that has seen less than ``since`` has missed some; reading goes on from ``end``.
    """

    reason: str
    since: Position
    end: Position


class Check(NamedTuple):
    """What a comparison of a cursor with its stream says."""

    gap: Gap | None
    read_count: int | None  # the cursor's from now on


def check(cursor: StreamCursor, info: Info, *, is_tail_there: bool) -> Check:
    """Find out whether the entry that would be read next is the one that came next.

    ``is_tail_there`` is False if the last entry that was read is known and no longer in its place.
    """
    here, count = cursor.position, cursor.read_count
    last, added = info.last, info.added
    first = info.first or after(last)  # the place of the next entry, if there is none
    if last < here:
        # Redis came back without its newest entries. What it still holds was read before.
        return Check(Gap("stream was recreated", since=after(here), end=last), added)
    if not is_tail_there and first <= here and info.deleted < here:
        # Older entries than ours are there, and ours is not and was not deleted by its id. Others
        # may stand before the cursor, as many as there were, if Redis' clock was set back.
        return Check(Gap("another stream", since=after(here), end=here), None)
    if not is_tail_there and last > here and info.deleted < here and added is not None:
        # Ours was trimmed, or was never there. What a new primary lacks can be as many as were
        # trimmed of what it has instead, so the counts prove nothing.
        end = before(first)
        return Check(
            Gap("entries may have been lost unread", since=end, end=end), added - info.length
        )
    if added is None:
        return Check(_gap_without_counts(cursor, first, last), count)
    if last == here:
        if count in (added, None):
            return Check(None, added)
        return Check(Gap("entries were taken away unread", since=here, end=here), added)
    # All entries before the first one were taken away: as many as were read, if all is well.
    taken = added - info.length
    if first <= here or taken == count:
        return Check(None, count)
    if count is not None and taken < count:
        return Check(Gap("stream was recreated", since=after(here), end=here), taken)
    end = before(first)
    return Check(Gap("stream was trimmed beyond the cursor", since=end, end=end), taken)


def _gap_without_counts(cursor: StreamCursor, first: Position, last: Position) -> Gap | None:
    """Before Redis 7 nothing says how many entries there were.

    All have been read if nothing was added since the last check, or if the stream still begins
    at or before the position of that check. Otherwise a gap is told on suspicion.
    """
    here = cursor.position
    if first <= after(cursor.proven) or last == cursor.proven:
        return None
    if cursor.proven == START and first == cursor.first_read:
        return None
    end = here if first <= here or last == here else before(first)
    return Gap("entries may have been trimmed unread", since=end, end=end)
