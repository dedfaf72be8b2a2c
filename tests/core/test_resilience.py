import pytest

from trio_gateway.core.resilience import SOON, Backoff, Breaker, State


def opened(at: float = 100.0) -> Breaker:
    breaker = Breaker(5, 30)
    for _ in range(5):
        breaker.failed(at)
    return breaker


def test_the_states_are_the_numbers_of_the_metric() -> None:
    assert {state.name: int(state) for state in State} == {"CLOSED": 0, "OPEN": 1, "HALF_OPEN": 2}


def test_breaker_opens_at_the_fifth_failure_in_a_row() -> None:
    breaker = Breaker(5, 30)
    states = []
    for _ in range(5):
        breaker.failed(100)
        states.append(breaker.state)

    assert states == [State.CLOSED] * 4 + [State.OPEN]
    assert breaker.failures == 5


def test_success_resets_the_count() -> None:
    breaker = Breaker(5, 30)
    for _ in range(4):
        breaker.failed(100)
    breaker.succeeded()
    for _ in range(4):
        breaker.failed(100)

    assert breaker.state is State.CLOSED
    assert breaker.try_now(100)


@pytest.mark.parametrize(("now", "wait"), [(100, 30), (110, 20), (129, 1), (130, 0), (999, 0)])
def test_open_breaker_allows_no_try_before_the_recovery_time(now: float, wait: float) -> None:
    breaker = opened(at=100)

    assert breaker.wait(now) == wait
    assert breaker.try_now(now) is (wait == 0)


def test_closed_breaker_does_not_wait() -> None:
    breaker = Breaker(5, 30)

    assert breaker.wait(0) == 0
    assert [breaker.try_now(0) for _ in range(3)] == [True] * 3


def test_half_open_breaker_allows_a_single_try() -> None:
    breaker = opened(at=100)

    assert [breaker.try_now(130) for _ in range(3)] == [True, False, False]
    assert breaker.state is State.HALF_OPEN


def test_successful_try_closes_the_breaker() -> None:
    breaker = opened(at=100)
    breaker.try_now(130)
    breaker.succeeded()

    assert (breaker.state, breaker.failures) == (State.CLOSED, 0)
    assert breaker.try_now(130)


def test_failed_try_opens_the_breaker_for_the_recovery_time_again() -> None:
    breaker = opened(at=100)
    breaker.try_now(130)
    breaker.failed(131)

    assert breaker.state is State.OPEN
    assert breaker.wait(131) == 30


def test_cancelled_try_allows_another_try_at_once() -> None:
    breaker = opened(at=100)
    breaker.try_now(140)
    breaker.abandoned(141)

    assert breaker.state is State.OPEN
    assert breaker.try_now(141)


def test_cancelled_try_does_not_change_a_closed_breaker() -> None:
    breaker = Breaker(5, 30)
    breaker.abandoned(0)

    assert breaker.state is State.CLOSED


@pytest.mark.parametrize(
    ("failures", "bound"),
    [(0, 0.5), (1, 1.0), (2, 2.0), (3, 4.0), (4, 5.0), (100, 5.0), (10**6, 5.0)],
)
def test_bound_doubles_with_each_failure_up_to_the_maximum(failures: int, bound: float) -> None:
    backoff = Backoff(first=0.5, most=5.0)
    waits = [backoff.after(failures) for _ in range(300)]

    assert 0 <= min(waits) < bound / 4
    assert bound * 3 / 4 < max(waits) <= bound


def test_two_clients_that_fail_together_do_not_retry_together() -> None:
    one, other = Backoff(), Backoff()

    assert [one.after(9) for _ in range(5)] != [other.after(9) for _ in range(5)]


def test_breaker_opened_by_a_quick_refusal_allows_a_try_soon() -> None:
    breaker = Breaker(threshold=1, recovery=30)
    breaker.failed(100.0, soon=True)
    assert breaker.wait(100.0) == SOON
    assert breaker.try_now(100.0 + SOON)
    breaker.failed(101.0)
    assert breaker.wait(101.0) == 30
    quick = Breaker(threshold=1, recovery=0.1)
    quick.failed(100.0, soon=True)
    assert quick.wait(100.0) == pytest.approx(0.1)
