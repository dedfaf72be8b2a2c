"""The offset of another clock."""

from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.clock_offset import ClockOffset


@given(st.lists(st.floats(0, 1), min_size=1))
def test_the_offset_is_that_of_the_quickest_answer(delays: list[float]) -> None:
    clock = ClockOffset()
    found = [clock.note(1000.0 - delay, 2.0 * n) for n, delay in enumerate(delays[:30])]
    assert found == [1000.0 - min(delays[: n + 1]) for n in range(len(found))]


def test_a_clock_that_was_set_is_known_at_once_or_two_minutes_later() -> None:
    clock = ClockOffset()
    for now in range(0, 300, 2):
        clock.note(1000.0, now)
    assert clock.note(1005.0, 300) == 1005.0
    found = [clock.note(990.0, now) for now in range(302, 422, 2)]
    assert set(found) == {1005.0, 990.0}
    assert found[-1] == 990.0
