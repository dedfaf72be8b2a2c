"""Extent: which cursors it covers, and who waits until a place has been read."""

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.event_ids import LAST, START, Position, Stream
from trio_gateway.runtime.extent import Extent

A, B = Stream("aaaa"), Stream("bbbb")


def at(milliseconds: int, sequence: int = 0) -> Position:
    return Position((milliseconds, sequence))


def begun(*streams: Stream) -> Extent:
    """The extent of empty streams."""
    extent = Extent()
    for stream in streams or (A,):
        extent.begin(stream, START, whole=True)
        extent.advance(stream, START)
    return extent


def test_stream_that_was_read_from_its_first_entry_is_covered_from_its_start() -> None:
    extent = begun()
    assert extent.covers({A: START})
    extent.advance(A, at(5))
    extent.advance(A, at(6))

    assert extent.covers({A: START})
    assert extent.covers({A: at(5)})
    # No entry had that id: it is of a stream that was deleted.
    assert not extent.covers({A: at(4)})


def test_stream_that_was_trimmed_is_covered_from_its_first_entry_on() -> None:
    extent = Extent()
    extent.begin(A, at(5))
    extent.advance(A, at(5))
    extent.advance(A, at(6))

    assert extent.covers({A: at(5)})
    assert not extent.covers({A: at(4, 9)})
    assert not extent.covers({A: START})


def test_empty_cursor_and_a_cursor_in_an_unknown_stream_are_not_covered() -> None:
    extent = begun()
    extent.advance(A, at(5))
    assert not extent.covers({})
    assert not extent.covers({B: at(5)})
    assert not extent.covers({A: at(5), B: at(5)})


def test_cursor_of_a_faster_process_is_ahead() -> None:
    extent = begun()
    extent.advance(A, at(5))
    assert not extent.is_ahead({A: at(5)})
    assert extent.is_ahead({A: at(5, 1)})
    assert not extent.is_ahead({A: at(5), B: at(1)})  # no task reads that stream
    extent.advance(A, at(7))  # not all that is read is an event
    assert not extent.is_ahead({A: at(7)})
    assert extent.covers({A: at(7)})


async def test_all_that_wait_for_a_position_are_woken_when_it_is_read(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    extent, woken = begun(), list[tuple[int, float]]()

    async def wait(milliseconds: int) -> None:
        await extent.wait_for({A: at(milliseconds)})
        woken.append((milliseconds, trio.current_time()))

    await wait(0)
    for milliseconds in (3, 2, 2, 3):
        nursery.start_soon(wait, milliseconds)
    for n in (1, 2, 3):
        await trio.sleep(1)
        extent.advance(A, at(n))
    await wait_all_tasks_blocked()

    assert sorted(woken) == [(0, 0), (2, 2), (2, 2), (3, 3), (3, 3)]


async def test_wait_begun_returns_after_the_first_reading(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    extent, woken = Extent(), list[float]()

    async def wait() -> None:
        await extent.wait_begun()
        woken.append(trio.current_time())

    nursery.start_soon(wait)
    nursery.start_soon(wait)
    await trio.sleep(1)
    extent.begin(A, at(1))
    await trio.sleep(1)
    assert not woken
    assert extent.end == {}  # so that a client that is accepted meanwhile is not sent the past
    extent.advance(A, at(1))
    await wait_all_tasks_blocked()

    assert woken == [2, 2]
    assert extent.began == {A: at(1)}


def test_place_before_a_time_is_not_beyond_what_was_read() -> None:
    extent = begun(A, B)
    extent.advance(A, at(1000))
    extent.advance(A, at(3000))
    assert extent.place_before(2.0) == ({A: (1999, LAST[1]), B: START}, True)
