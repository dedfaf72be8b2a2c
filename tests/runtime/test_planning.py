"""The planning of writes; what it plans is tested with dispatch."""

from trio_gateway.runtime.planning import join


def test_join_takes_the_frames_of_a_mask() -> None:
    frames = [b"a", b"bb", b"ccc", b"dddd"]

    assert join(frames, 0b1010) == (frames[1] + frames[3], 2)
    assert join(frames, 0b0100) == (frames[2], 1)
