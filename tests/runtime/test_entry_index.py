"""Which positions are those of events in the history."""

from collections import deque

from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.event_ids import Position, Stream
from trio_gateway.runtime.entry_index import EntryIndex
from trio_gateway.runtime.raw_events import StoredEvent

STREAMS = Stream("aaaa"), Stream("bbbb")


@given(st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30), st.booleans())))
def test_events_that_are_kept_are_found_and_no_others(
    steps: list[tuple[int, int, bool]],
) -> None:
    index, kept, newest = EntryIndex(), deque[StoredEvent](), 0
    ever = set[tuple[Stream, Position]]()
    for added, dropped, asks in steps:
        for _ in range(added):
            newest += 2  # all odd ones are of no entry
            stream, position = STREAMS[newest % 4 // 2], Position((newest, 0))
            kept.append(StoredEvent(stream, position, 0.0, b"", (), 0))
            ever.add((stream, position))
        for _ in range(min(dropped, len(kept))):
            kept.popleft()
        if asks:
            there = {(each.stream, each.position) for each in kept}
            found = {
                (stream, Position((n, 0)))
                for stream in STREAMS
                for n in range(newest + 2)
                if index.has(kept, stream, Position((n, 0)))
            }
            assert there <= found <= ever
