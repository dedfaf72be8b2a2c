import pytest

from trio_gateway.core.histogram import SECONDS, Histogram


@pytest.mark.parametrize(
    ("value", "bucket"), [(0.0, 0), (1.0, 0), (1.5, 1), (2.0, 1), (2.1, 2), (float("inf"), 2)]
)
def test_value_counts_under_the_first_bound_that_it_does_not_exceed(
    value: float, bucket: int
) -> None:
    histogram = Histogram([1.0, 2.0])
    histogram.observe(value)

    assert [i for i, count in enumerate(histogram.counts) if count] == [bucket]


def test_values_are_counted_and_summed() -> None:
    histogram = Histogram([1.0, 2.0])
    histogram.observe(0.5)
    histogram.observe(1.5, times=3)
    histogram.observe(9.0, times=2)

    assert histogram.counts == [1, 3, 2]
    assert histogram.sum == 0.5 + 3 * 1.5 + 2 * 9.0


def test_values_observed_together_count_as_if_observed_one_by_one() -> None:
    one, many = Histogram([1.0, 2.0]), Histogram([1.0, 2.0])
    values = [0.5, 1.5, 9.0, 1.0, 0.5]
    for value in values:
        one.observe(value)
    many.observe_all(values)

    assert (many.counts, many.sum) == (one.counts, one.sum)


def test_default_bounds_are_in_ascending_order() -> None:
    assert sorted(set(SECONDS)) == list(SECONDS)
    assert len(Histogram().counts) == len(SECONDS) + 1
