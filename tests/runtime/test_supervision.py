"""Supervision: a lost source is opened again for ever, and what it reads from is spared."""

from collections.abc import Awaitable, Callable

import pytest
import trio
from structlog.testing import capture_logs
from trio.testing import MockClock

from trio_gateway.core.resilience import Backoff, Breaker, State
from trio_gateway.runtime.supervision import ConnectionLost, Demoted, keep_running


class Steady(Backoff):
    """A back-off without chance: as many seconds as there were failures, up to 5."""

    def after(self, failures: int) -> float:
        return min(float(failures), 5)


class Source:
    """Is lost at once, ``lost`` times; then stays connected. ``tried`` is when it was opened."""

    def __init__(
        self, breaker: Breaker, lost: float, error: type[ConnectionLost] = ConnectionLost
    ) -> None:
        self.breaker = breaker
        self.lost = lost
        self.error = error
        self.tried: list[float] = []
        self.states: list[State] = []

    async def work(self) -> None:
        self.tried.append(trio.current_time())
        self.states.append(self.breaker.state)
        if len(self.tried) <= self.lost:
            raise self.error("connection refused")
        self.breaker.succeeded()
        await trio.sleep_forever()


async def supervise(work: Callable[[], Awaitable[None]], breaker: Breaker, until: float) -> None:
    with trio.move_on_at(until):
        await keep_running("a source", work, breaker, Steady())


async def test_first_try_is_made_at_once(autojump_clock: MockClock) -> None:
    breaker = Breaker(5, 30)
    source = Source(breaker, lost=0)

    await supervise(source.work, breaker, until=100)

    assert source.tried == [0]
    assert breaker.state is State.CLOSED


async def test_lost_source_is_opened_again_after_backing_off(autojump_clock: MockClock) -> None:
    breaker = Breaker(99, 30)
    source = Source(breaker, lost=4)

    await supervise(source.work, breaker, until=100)

    assert source.tried == [0, 1, 1 + 2, 1 + 2 + 3, 1 + 2 + 3 + 4]
    assert breaker.failures == 0


async def test_breaker_opens_and_lets_one_try_through_after_its_recovery(
    autojump_clock: MockClock,
) -> None:
    breaker = Breaker(3, 30)
    source = Source(breaker, lost=4)

    with capture_logs() as logs:
        await supervise(source.work, breaker, until=99)

    assert source.tried == [0, 1, 3, 33, 63]
    assert source.states == [State.CLOSED] * 3 + [State.HALF_OPEN] * 2
    assert breaker.state is State.CLOSED
    assert breaker.failures == 0
    assert [log["breaker"] for log in logs if log["event"] == "source lost"] == (
        ["closed"] * 2 + ["open"] * 2
    )
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["breaker opened"]


async def test_demoted_server_is_replaced_within_a_second(
    autojump_clock: MockClock,
) -> None:
    breaker = Breaker(5, 30)
    source = Source(breaker, lost=10, error=Demoted)

    await supervise(source.work, breaker, until=100)

    assert source.tried == list(range(11))


async def test_source_is_tried_for_ever(autojump_clock: MockClock) -> None:
    breaker = Breaker(5, 30)
    source = Source(breaker, lost=float("inf"))

    await supervise(source.work, breaker, until=30 * 1000)

    assert 1000 <= len(source.tried) < 1010


async def test_back_off_starts_again_after_a_connection(autojump_clock: MockClock) -> None:
    breaker, tried = Breaker(3, 30), []

    async def work() -> None:
        tried.append(trio.current_time())
        breaker.succeeded()
        await trio.sleep(10)
        raise ConnectionLost("connection reset")

    await supervise(work, breaker, until=50)

    assert tried == [0, 11, 22, 33, 44]


async def test_work_that_returns_backs_off_too(autojump_clock: MockClock) -> None:
    breaker, tried = Breaker(99, 30), []

    async def work() -> None:
        tried.append(trio.current_time())
        await trio.lowlevel.checkpoint()

    await supervise(work, breaker, until=7)

    assert tried == [0, 1, 3, 6]


async def test_no_try_is_made_while_another_task_has_the_single_try(
    autojump_clock: MockClock,
) -> None:
    breaker = Breaker(1, 30)
    breaker.failed(-30)
    assert breaker.try_now(0)  # another task, on the same breaker
    source = Source(breaker, lost=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(supervise, source.work, breaker, 99)
        await trio.sleep(20)
        assert source.tried == []
        breaker.succeeded()
        await trio.sleep(5)
        assert len(source.tried) == 1


async def test_default_back_off_is_bounded(autojump_clock: MockClock) -> None:
    breaker = Breaker(10_000, 30)
    source = Source(breaker, lost=200)

    with trio.move_on_at(200 * 5 + 1):
        await keep_running("a source", source.work, breaker)

    assert len(source.tried) == 201


async def test_bug_propagates(autojump_clock: MockClock) -> None:
    async def work() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await keep_running("a source", work, Breaker(5, 30))


async def test_source_lost_by_several_of_its_tasks_is_lost(autojump_clock: MockClock) -> None:
    breaker, tried = Breaker(99, 30), []

    async def lose() -> None:
        await trio.lowlevel.checkpoint()
        raise ConnectionLost("connection reset")

    async def work() -> None:
        tried.append(trio.current_time())
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            nursery.start_soon(lose)

    with capture_logs() as logs:
        await supervise(work, breaker, until=2)

    assert tried == [0, 1]
    assert {log["error"] for log in logs} == {"connection reset"}


async def test_bug_beside_a_loss_propagates(autojump_clock: MockClock) -> None:
    async def lose() -> None:
        raise ConnectionLost("connection reset")

    async def err() -> None:
        raise ZeroDivisionError

    async def work() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lose)
            nursery.start_soon(err)

    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        await keep_running("a source", work, Breaker(5, 30))


async def test_source_that_may_find_another_server_is_tried_within_a_second(
    autojump_clock: MockClock,
) -> None:
    breaker = Breaker(2, 30)
    source = Source(breaker, lost=10)

    with trio.move_on_at(20), capture_logs() as logs:
        await keep_running("a source", source.work, breaker, Steady(), trio.sleep_forever)

    assert source.tried == list(range(11))
    # A failover is told in a few lines, however many tries it takes.
    lost = [log for log in logs if log["event"] == "source lost" and log["log_level"] == "warning"]
    assert [log["failures"] for log in lost] == [1]
    assert [log["event"] for log in logs if log["log_level"] == "error"] == ["breaker opened"]


async def test_source_is_tried_at_once_when_another_server_is_known(
    autojump_clock: MockClock,
) -> None:
    breaker, changed = Breaker(1, 30), trio.Event()
    source = Source(breaker, lost=1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(keep_running, "a source", source.work, breaker, Steady(), changed.wait)
        await trio.sleep(0.25)
        changed.set()
        await trio.sleep(10)
        nursery.cancel_scope.cancel()

    assert source.tried == [0, 0.25]
    assert breaker.state is State.CLOSED
