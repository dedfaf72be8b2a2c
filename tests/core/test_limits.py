from collections.abc import Iterable
from itertools import accumulate

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.limits import Allowance, DropAlarm, RateLimit, TenantRate


def test_21st_message_in_a_second_exceeds_the_limit() -> None:
    limit = RateLimit(20, 1.0)

    assert [limit.exceeded(100 + i / 32) for i in range(21)] == [False] * 20 + [True]


def test_the_window_slides() -> None:
    limit = RateLimit(2, 1.0)
    times = [0.75, 0.875, 1.5, 1.875, 2.5]

    assert [limit.exceeded(t) for t in times] == [False, False, True, False, False]


def test_steady_client_at_the_limit_never_exceeds_it() -> None:
    limit = RateLimit(4, 1.0)

    assert not any(limit.exceeded(i / 4) for i in range(1000))


gaps = st.lists(st.sampled_from([0.0, 0.125, 0.25, 0.5, 1.0]), max_size=60)


@given(gaps, st.integers(1, 5))
def test_message_exceeds_the_limit_if_the_second_before_it_holds_more_than_the_limit(
    gaps: list[float], most: int
) -> None:
    limit, now, sent = RateLimit(most, 1.0), 0.0, list[float]()
    for gap in gaps:
        now += gap
        sent.append(now)
        assert limit.exceeded(now) == (sum(t > now - 1.0 for t in sent) > most)


def alarm() -> DropAlarm:
    return DropAlarm(window=60, threshold=0.05, cooldown=300)


def note(alarm: DropAlarm, now: float, *, received: int, dropped: int) -> int:
    """How often the alarm was raised by events of which the last ones were dropped."""
    delivered = received - dropped
    return sum(alarm.note(now, dropped=i >= delivered) for i in range(received))


def test_more_than_5_percent_of_drops_raise_an_alarm() -> None:
    assert note(alarm(), 0, received=20, dropped=1) == 0
    assert note(alarm(), 0, received=21, dropped=2) == 1


def test_event_that_was_not_dropped_raises_no_alarm() -> None:
    drops = alarm()
    note(drops, 0, received=1, dropped=1)

    assert not drops.note(400, dropped=False)


def test_drops_older_than_the_window_are_forgotten() -> None:
    drops = alarm()
    assert note(drops, 0, received=100, dropped=5) == 0
    assert note(drops, 60, received=1, dropped=1) == 1  # six of 101
    assert note(drops, 500, received=100, dropped=5) == 0

    assert (drops.heard, drops.dropped) == (100, 5)


def test_events_within_the_window_are_added_up() -> None:
    drops = alarm()
    for second in range(60):
        assert note(drops, second, received=10, dropped=0) == 0

    assert note(drops, 60, received=30, dropped=30) == 0  # 30 of 630
    assert note(drops, 60.5, received=2, dropped=2) == 1  # 32 of 632


@pytest.mark.parametrize(("later", "raised"), [(0, 0), (299, 0), (300, 1), (1000, 1)])
def test_alarms_are_at_least_a_cooldown_apart(later: float, raised: int) -> None:
    drops = alarm()

    assert note(drops, 0, received=10, dropped=10) == 1
    assert note(drops, later, received=10, dropped=10) == raised


def test_memory_is_bounded_by_the_window() -> None:
    drops = alarm()
    for i in range(10_000):
        drops.note(i / 4, dropped=False)

    assert drops.heard <= 4 * 62


def test_allowance_is_used_and_grows_back() -> None:
    allowance = Allowance(most=2, rate=0.1)
    allowance.use("a", 1.5, now=100)
    assert allowance.left("a", 100) == pytest.approx(0.5)
    assert allowance.left("a", 105) == pytest.approx(1)
    assert allowance.left("a", 1000) == allowance.left("b", 100) == 2
    allowance.use("a", 3, now=105)  # more than is left
    assert allowance.left("a", 105) == pytest.approx(-2)
    assert allowance.left("a", 135) == pytest.approx(1)


def test_allowance_remembers_whom_it_must() -> None:
    allowance = Allowance(most=1, rate=1)
    for who in range(10_000):
        allowance.use(who, 1, now=who / 100)

    assert len(allowance._whole_at) <= 1001
    assert allowance.left(9999, now=99.99) == 0


def allowed(rate: TenantRate, times: Iterable[float], tenant: int = 1) -> list[float]:
    return [t for t in times if not rate.exceeded(tenant, t)]


def test_tenant_may_publish_a_burst_of_one_second_and_then_at_its_rate() -> None:
    rate = TenantRate(4)

    assert len(allowed(rate, [100.0] * 9)) == 4
    assert allowed(rate, [100.125, 100.25, 100.375, 100.5, 100.5, 101.0]) == [100.25, 100.5, 101.0]
    assert len(allowed(rate, [200.0] * 9)) == 4


def test_rate_below_one_allows_one_event_in_several_seconds() -> None:
    assert allowed(TenantRate(0.25), map(float, range(10))) == [0, 4, 8]


def test_tenant_at_its_rate_never_exceeds_it() -> None:
    rate = TenantRate(3)

    assert len(allowed(rate, (i / 3 for i in range(10_000)))) == 10_000


def test_refused_events_do_not_count() -> None:
    rate = TenantRate(2)

    assert allowed(rate, (i / 100 for i in range(300))) == [0, 0.01, 0.5, 1.0, 1.5, 2.0, 2.5]


@given(gaps, st.sampled_from([0.5, 1, 2, 3, 10]))
def test_tenant_is_bounded_by_a_burst_and_its_rate(gaps: list[float], most: float) -> None:
    rate, times = TenantRate(most), list(accumulate(gaps, initial=0.0))
    passed = allowed(rate, times)
    for i, first in enumerate(passed):
        for n, last in enumerate(passed[i:], 1):
            assert n <= max(1, most) + (last - first) * most + 1e-6


def test_each_tenant_has_a_rate_of_its_own() -> None:
    rate = TenantRate(1)

    assert not rate.exceeded(1, 5.0)
    assert rate.exceeded(1, 5.5)
    assert not rate.exceeded(2, 5.5)


def test_only_tenants_with_recent_events_are_remembered() -> None:
    rate = TenantRate(10)
    for tenant in range(100_000):
        rate.exceeded(tenant, tenant / 1000)  # each once, a thousand a second

    assert len(rate) <= 1001
    rate.exceeded(99_999, 99.999)
    for _ in range(20):
        rate.exceeded(99_999, 99.999)
    assert rate.exceeded(99_999, 99.999)  # a tenant over its rate is


def test_alarms_are_a_second_apart_even_without_a_cooldown() -> None:
    drops = DropAlarm(window=60, threshold=0, cooldown=0.001)

    assert sum(drops.note(i / 100, dropped=True) for i in range(301)) == 4
