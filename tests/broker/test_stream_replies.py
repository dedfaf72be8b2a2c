"""Replies about streams: parsed into types, or a lost connection."""

from collections.abc import Callable
from functools import partial
from typing import Any

import hiredis
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.broker.stream_replies import Info, read_entries, read_info, read_news, read_time
from trio_gateway.core.event_ids import START, Position
from trio_gateway.runtime.source import Entry
from trio_gateway.runtime.supervision import ConnectionLost

INFO = partial(read_info, name="s")
SHAPES: list[Any] = [
    b"OK", 1, [], [1], [[b"a"]], [[b"a", 1]], [[b"a", [[b"1-1"]]]], [[b"a", [[b"1-1", [b"b"]]]]],
    [[b"a", [[b"x", [b"data", b"b"]]]]], [[b"\xff", [[b"1-1", None]]]],
    [[b"a", [[b"1-1", [1, 2]]]]],
    [b"1-1", None], [[b"1-1", [b"data", 5]]], [b"length"], [b"length", 1], [1, 2], {},
    [b"length", b"1", b"last-generated-id", b"1-1", b"first-entry", None], float("nan"), True,
]  # fmt: skip


@pytest.mark.parametrize("read", [read_news, read_entries, INFO, read_time])
@pytest.mark.parametrize("reply", SHAPES, ids=repr)
def test_reply_of_another_shape_is_a_lost_connection(
    reply: Any, read: Callable[[Any], Any]
) -> None:
    if reply == [] and read in {read_news, read_entries}:
        assert read(reply) == []
        return
    with pytest.raises(ConnectionLost, match="unexpected reply"):
        read(reply)


@given(st.lists(st.tuples(*[st.integers(0, 3) | st.integers(0, 2**64 - 1)] * 2)))
def test_ids_of_all_sizes_are_parsed(found: list[tuple[int, int]]) -> None:
    entries = [[f"{ms}-{n}".encode(), [b"data", b"{}"]] for ms, n in found]
    assert [entry.position for entry in read_entries(entries)] == found


@pytest.mark.parametrize("wrong", ["x", "1", "", "-1-1", "1-2-3", "1,2", "1-2],[3-4", "1.0-1"])
def test_reply_with_one_wrong_id_among_others_is_a_lost_connection(wrong: str) -> None:
    entries = [[each.encode(), [b"data", b"{}"]] for each in ("1-1", wrong, "5-1")]
    with pytest.raises(ConnectionLost, match="unexpected reply"):
        read_entries(entries)


def test_replies_are_parsed() -> None:
    assert read_news(None) == []
    entries = [[b"1-2", [b"other", b"a", b"data", b"b"]], [b"1-3", None], [b"1-4", [b"x", b"y"]]]
    found = {(1, 2): b"b", (1, 3): None, (1, 4): None}
    payloads = [Entry(Position(position), payload) for position, payload in found.items()]
    assert read_news([[b"events", entries]]) == [("events", payloads)]
    assert read_entries(entries) == payloads
    info: list[Any] = [b"length", 3, b"last-generated-id", b"5-0", b"first-entry", entries[0]]
    assert read_info(info, "s") == ((5, 0), (1, 2), 3, None, START)
    assert read_info([*info, b"entries-added", 9, b"new-in-redis-99", b"?"], "s").added == 9
    assert read_info(hiredis.ReplyError("ERR no such key"), "s") == Info()
    assert read_time([b"1700000000", b"250000"]) == 1_700_000_000.25
    assert read_time(hiredis.ReplyError("NOPERM no")) is None
    with pytest.raises(ConnectionLost, match=r"XINFO events:\{3} failed: NOPERM"):
        read_info(hiredis.ReplyError("NOPERM no"), "events:{3}")
