"""So many at a time, the others in turn, nobody for ever."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.runtime.turnstile import TooMany, Turnstile


async def test_a_crowd_is_served_in_turn(autojump_clock: MockClock) -> None:
    turnstile: Turnstile[int] = Turnstile(2)
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
    turnstile: Turnstile[None] = Turnstile(1)
    nursery.start_soon(turnstile.run, trio.sleep_forever, 10)
    await wait_all_tasks_blocked()

    with pytest.raises(TooMany):
        await turnstile.run(trio.sleep_forever, timeout=3)

    assert trio.current_time() == 3
    assert turnstile.inside == 1


async def test_giving_up_ends_who_waits_and_who_is_at_work(autojump_clock: MockClock) -> None:
    turnstile: Turnstile[None] = Turnstile(1)

    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(turnstile.run, trio.sleep_forever, 10)
        await wait_all_tasks_blocked()
        turnstile.give_up()

    assert trio.current_time() == 0
    assert turnstile.inside == 0


async def test_a_place_is_given_back_after_a_bug(autojump_clock: MockClock) -> None:
    turnstile: Turnstile[None] = Turnstile(1)

    async def bug() -> None:
        await trio.lowlevel.checkpoint()
        raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            await turnstile.run(bug, timeout=1)

    assert turnstile.inside == 0
