"""The outbox: order, exact counts, and a discard that leaves no frame torn."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.frames import boundary, text_frame
from trio_gateway.runtime.outbox import Outbox


def take(outbox: Outbox, most: int) -> bytes:
    """What a kernel with room for so many bytes would take."""
    taken = bytes(outbox.head()[:most])
    outbox.took(len(taken))
    return taken


def test_new_outbox_is_empty() -> None:
    outbox = Outbox()

    assert (outbox.bytes, outbox.frames, outbox.partial) == (0, 0, False)


def test_head_of_an_empty_outbox_is_empty() -> None:
    outbox = Outbox()

    assert take(outbox, 10) == b""
    assert (outbox.bytes, outbox.frames) == (0, 0)


def test_small_chunks_are_joined_into_one_write() -> None:
    outbox = Outbox()
    for text in (b"a", b"b", b"c"):
        outbox.put(text_frame(text), 1)

    assert bytes(outbox.head()) == text_frame(b"a") + text_frame(b"b") + text_frame(b"c")


def test_joined_write_is_bounded() -> None:
    outbox = Outbox()
    for _ in range(100):
        outbox.put(text_frame(bytes(10_000)), 1)

    assert 65_536 <= len(outbox.head()) < 80_000


def test_large_chunk_is_not_copied() -> None:
    data = text_frame(bytes(100_000))
    outbox = Outbox()
    outbox.put(data, 1)
    outbox.put(text_frame(b"small"), 1)

    assert outbox.head().obj is data
    outbox.took(10)
    assert outbox.head().obj is data


def test_frames_that_are_written_no_longer_count() -> None:
    outbox = Outbox()
    for _ in range(900):
        outbox.put(text_frame(b"x" * 50), 1)

    take(outbox, 899 * 52 + 1)

    assert outbox.frames == 1
    assert outbox.bytes == 51


def test_empty_chunk_changes_nothing() -> None:
    outbox = Outbox()
    outbox.put(text_frame(b"hello"), 1, written=3)
    outbox.put(b"", 0)

    assert take(outbox, 100) == text_frame(b"hello")[3:]
    outbox.put(text_frame(b"again"), 1, written=2)
    assert take(outbox, 100) == text_frame(b"again")[2:]


def test_partial_is_between_the_ends_of_a_frame() -> None:
    one, two = text_frame(b"one"), text_frame(b"two")
    for written in range(len(one + two) + 1):
        outbox = Outbox()
        outbox.put(one + two, 2)
        take(outbox, written)
        assert outbox.partial is (written not in (0, len(one), len(one + two)))


def test_discard_keeps_the_rest_of_a_frame_that_is_partly_written() -> None:
    one, two, three = (text_frame(text) for text in (b"one", b"two", b"three"))
    outbox = Outbox()
    outbox.put(one + two, 2, written=len(one) + 1)
    outbox.put(three, 1)

    outbox.discard()

    assert (outbox.bytes, outbox.frames) == (len(two) - 1, 1)
    assert take(outbox, 100) == two[1:]
    assert (outbox.bytes, outbox.frames, outbox.partial) == (0, 0, False)


def test_discard_between_two_frames_leaves_nothing() -> None:
    one, two = text_frame(b"one"), text_frame(b"two")
    outbox = Outbox()
    outbox.put(one + two, 2, written=len(one))

    outbox.discard()

    assert (outbox.bytes, outbox.frames, outbox.partial) == (0, 0, False)
    assert take(outbox, 100) == b""


CHUNKS = st.lists(st.integers(0, 300), max_size=3)  # the sizes of the frames joined in one put


@given(st.lists(CHUNKS | st.integers(0, 2000), max_size=40), st.booleans())
def test_any_puts_and_takes_yield_the_frames_in_order(
    steps: list[list[int] | int], discards: bool
) -> None:
    outbox, added, taken, n = Outbox(), b"", b"", 0
    ends = {0: 0}  # where a put ends: how many frames there are before it

    for step in steps:
        if isinstance(step, list):
            data = b"".join(text_frame(b"x" * size) for size in step)
            outbox.put(data, len(step))
            n += len(step)
            added += data
            ends[len(added)] = n
        elif outbox.bytes:
            taken += take(outbox, step)
        assert outbox.bytes == len(added) - len(taken)
        # A put counts until its last byte is taken.
        assert outbox.frames == n - max(f for end, f in ends.items() if end <= len(taken))
        assert outbox.partial is (boundary(added, len(taken)) != len(taken))

    if discards:
        outbox.discard()
        added = added[: boundary(added, len(taken))]
    while outbox.bytes:
        taken += take(outbox, 7)
    assert taken == added
    assert outbox.frames == 0


@pytest.mark.parametrize("bounds", [{"max_bytes": 20}, {"max_frames": 2}])
def test_put_returns_whether_more_waits_than_a_bound_allows(bounds: dict[str, float]) -> None:
    outbox, data = Outbox(**bounds), text_frame(b"12345678")

    assert [outbox.put(data, 1) for _ in range(4)] == [False, False, True, True]

    take(outbox, 2 * len(data))
    assert not outbox.put(b"", 0)


def test_bytes_that_the_kernel_took_at_once_do_not_count_for_the_bound() -> None:
    data = text_frame(b"12345678")

    assert not Outbox(max_bytes=4).put(data, 1, written=len(data) - 4)


def test_bytes_discarded_while_they_were_sent_do_not_count_as_taken() -> None:
    outbox = Outbox()
    outbox.put(text_frame(b"a"), 1)
    sent = len(outbox.head())
    outbox.discard()

    outbox.took(sent)

    assert (outbox.bytes, outbox.frames, outbox.partial) == (0, 0, False)


@pytest.mark.parametrize(("chunks", "seconds", "fast"), [
    (51, 0, True),
    (50, 0, False),  # half full
    (51, 1, True),
    (51, 3, False),  # at an ordinary rate
])  # fmt: skip
def test_outbox_that_a_burst_has_half_filled(chunks: int, seconds: float, fast: bool) -> None:
    outbox = Outbox(max_bytes=1_000_000)
    outbox.began_at = 100.0
    for _ in range(chunks):
        outbox.put(bytes(10_000), 1)

    assert outbox.fills_fast(100 + seconds) is fast


def test_what_went_before_it_was_empty_is_no_burst() -> None:
    outbox = Outbox(max_frames=10)
    outbox.put(bytes(1_000_000), 1)
    outbox.took(1_000_000)
    for _ in range(6):
        outbox.put(bytes(10), 1)

    assert not outbox.fills_fast(1)


class FakeOwed(list[float]):
    """Notes when a client was written the events."""

    written = list[float].append


def test_events_are_written_when_their_last_byte_is_taken() -> None:
    outbox, first, second = Outbox(), FakeOwed(), FakeOwed()
    data = text_frame(b"event")
    outbox.put(data, 1, 2)
    outbox.owe(first)  # type: ignore[arg-type]
    outbox.put(data, 1)
    outbox.owe(second)  # type: ignore[arg-type]
    outbox.put(text_frame(b"pong"), 1)
    for now, size in enumerate((len(data) - 3, 1, len(data) - 1, 1, 6)):
        take(outbox, size)
        outbox.settle(now)
    assert (first, second, outbox.bytes) == ([1], [3], 0)


def test_events_that_are_discarded_are_not_written() -> None:
    outbox, first, second = Outbox(), FakeOwed(), FakeOwed()
    data = text_frame(b"event")
    for owed in (first, second):
        outbox.put(data, 1)
        outbox.owe(owed)  # type: ignore[arg-type]
    take(outbox, 1)
    outbox.discard()
    take(outbox, len(data))
    outbox.settle(1.0)
    assert (first, second) == ([], [])
