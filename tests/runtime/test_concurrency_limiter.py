"""The concurrency limiter: a few tasks at a time, the others in turn, none for ever."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.runtime.concurrency_limiter import ConcurrencyLimiter, Overloaded


async def test_tasks_over_the_limit_wait_for_their_turn(autojump_clock: MockClock) -> None:
    limiter: ConcurrencyLimiter[int] = ConcurrencyLimiter(2)
    most = 0
    served: list[int] = []

    async def work(n: int) -> int:
        nonlocal most
        most = max(most, limiter.inside)
        await trio.sleep(1)
        return n

    async def run(n: int) -> None:
        found = await limiter.run(lambda: work(n), timeout=10)
        assert found is not None
        served.append(found)

    async with trio.open_nursery() as nursery:
        for n in range(6):
            nursery.start_soon(run, n)

    assert sorted(served) == list(range(6))
    assert most == 2
    assert trio.current_time() == 3
    assert limiter.inside == 0


async def test_task_that_waits_too_long_is_refused(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    limiter: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)
    nursery.start_soon(limiter.run, trio.sleep_forever, 10)
    await wait_all_tasks_blocked()

    with pytest.raises(Overloaded):
        await limiter.run(trio.sleep_forever, timeout=3)

    assert trio.current_time() == 3
    assert limiter.inside == 1


async def test_give_up_ends_tasks_that_wait_and_tasks_that_work(autojump_clock: MockClock) -> None:
    limiter: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(limiter.run, trio.sleep_forever, 10)
        await wait_all_tasks_blocked()
        limiter.give_up()

    assert trio.current_time() == 0
    assert limiter.inside == 0


async def test_slot_is_free_again_after_a_bug(autojump_clock: MockClock) -> None:
    limiter: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)

    async def bug() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await limiter.run(bug, timeout=1)

    assert limiter.inside == 0


@pytest.mark.parametrize("idle", [False, True])
async def test_idle_task_gives_its_slot_to_one_that_waits(
    autojump_clock: MockClock, nursery: trio.Nursery, idle: bool
) -> None:
    limiter: ConcurrencyLimiter[str] = ConcurrencyLimiter(2)
    ended: list[float] = []

    async def work_slowly() -> None:
        assert await limiter.run(work_forever, 10, 5, lambda: idle) is None
        ended.append(trio.current_time())

    async def work_forever() -> str:
        await trio.sleep_forever()
        return ""

    async def work() -> str:
        await trio.sleep(0.1)
        return "done"

    for _ in range(2):
        nursery.start_soon(work_slowly)
    await trio.sleep(0.2)
    assert not ended  # no other task waits
    if idle:
        assert await limiter.run(work, 10, 5) == "done"
        assert ended == [0.5 + 0.2]  # half a second after the other task began to wait
        assert trio.current_time() == pytest.approx(0.8)
    else:
        with pytest.raises(Overloaded):
            await limiter.run(work, 10, 5)
        assert not ended
