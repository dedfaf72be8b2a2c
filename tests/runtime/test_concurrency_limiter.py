"""So many at a time, the others in turn, nobody for ever."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.runtime.concurrency_limiter import ConcurrencyLimiter, Overloaded


async def test_a_crowd_is_served_in_turn(autojump_clock: MockClock) -> None:
    turnstile: ConcurrencyLimiter[int] = ConcurrencyLimiter(2)
    most = 0
    served: list[int] = []

    async def work(n: int) -> int:
        nonlocal most
        most = max(most, turnstile.inside)
        await trio.sleep(1)
        return n

    async def come(n: int) -> None:
        found = await turnstile.run(lambda: work(n), timeout=10)
        assert found is not None
        served.append(found)

    async with trio.open_nursery() as nursery:
        for n in range(6):
            nursery.start_soon(come, n)

    assert sorted(served) == list(range(6))
    assert most == 2
    assert trio.current_time() == 3
    assert turnstile.inside == 0


async def test_who_waits_too_long_is_turned_away(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    turnstile: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)
    nursery.start_soon(turnstile.run, trio.sleep_forever, 10)
    await wait_all_tasks_blocked()

    with pytest.raises(Overloaded):
        await turnstile.run(trio.sleep_forever, timeout=3)

    assert trio.current_time() == 3
    assert turnstile.inside == 1


async def test_giving_up_ends_who_waits_and_who_is_at_work(autojump_clock: MockClock) -> None:
    turnstile: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(turnstile.run, trio.sleep_forever, 10)
        await wait_all_tasks_blocked()
        turnstile.give_up()

    assert trio.current_time() == 0
    assert turnstile.inside == 0


async def test_a_place_is_given_back_after_a_bug(autojump_clock: MockClock) -> None:
    turnstile: ConcurrencyLimiter[None] = ConcurrencyLimiter(1)

    async def bug() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await turnstile.run(bug, timeout=1)

    assert turnstile.inside == 0


@pytest.mark.parametrize("dawdles", [False, True])
async def test_one_that_dawdles_makes_room_for_one_that_waits(
    autojump_clock: MockClock, nursery: trio.Nursery, dawdles: bool
) -> None:
    turnstile: ConcurrencyLimiter[str] = ConcurrencyLimiter(2)
    ended: list[float] = []

    async def dawdle() -> None:
        assert await turnstile.run(work_forever, 10, 5, lambda: dawdles) is None
        ended.append(trio.current_time())

    async def work_forever() -> str:
        await trio.sleep_forever()
        return ""

    async def work() -> str:
        await trio.sleep(0.1)
        return "done"

    for _ in range(2):
        nursery.start_soon(dawdle)
    await trio.sleep(0.2)
    assert not ended  # nobody waits for a place
    if dawdles:
        assert await turnstile.run(work, 10, 5) == "done"
        assert ended == [0.5 + 0.2]  # a moment after the other one came
        assert trio.current_time() == pytest.approx(0.8)
    else:
        with pytest.raises(Overloaded):
            await turnstile.run(work, 10, 5)
        assert not ended
