"""Connections that have not sent a byte wait beside each other, and not for long."""

from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.runtime.concurrency_limiter import Overloaded
from trio_gateway.runtime.silent_connections import SilentConnections


async def outcome(silent: SilentConnections, found: list[str], name: str, *more: object) -> None:
    try:
        spoke = await silent.wait(trio.sleep_forever, 5, *more)  # type: ignore[arg-type]
        found.append(f"{name} {'spoke' if spoke else 'silent'}")
    except Overloaded:
        found.append(f"{name} ended")


async def test_who_speaks_goes_on_and_who_does_not_has_its_time(autojump_clock: MockClock) -> None:
    silent = SilentConnections(10)
    assert await silent.wait(partial(trio.sleep, 4), 5)
    assert trio.current_time() == 4
    assert not await silent.wait(trio.sleep_forever, 5)
    assert trio.current_time() == 9
    assert len(silent) == 0


async def test_one_too_many_ends_the_one_that_was_silent_longest(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    silent, found = SilentConnections(2), list[str]()
    for name in ("first", "second", "third", "fourth"):
        nursery.start_soon(outcome, silent, found, name)
        await wait_all_tasks_blocked()

    assert found == ["first ended", "second ended"]
    assert len(silent) == 2
    assert await silent.wait(trio.lowlevel.checkpoint, 5)  # which pushes one more out
    await wait_all_tasks_blocked()
    assert found[2:] == ["third ended"]


async def test_one_too_many_of_an_address_ends_one_of_that_address(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    silent, found = SilentConnections(10), list[str]()
    for name, address in (("a", "here"), ("b", "there"), ("c", "there"), ("d", "there")):
        nursery.start_soon(outcome, silent, found, name, address, 2)
        await wait_all_tasks_blocked()
    assert found == ["b ended"]

    nursery.start_soon(outcome, silent, found, "e", "there", 0)  # its others are all connected
    await wait_all_tasks_blocked()
    assert found == ["b ended", "c ended"]
    silent.give_up()
    await wait_all_tasks_blocked()
    assert sorted(found[2:]) == ["a silent", "d silent", "e silent"]
    assert len(silent) == 0


@pytest.mark.parametrize("address", ["", "here"])
async def test_nothing_is_kept_of_those_that_are_gone(
    autojump_clock: MockClock, address: str
) -> None:
    silent = SilentConnections(3)
    for _ in range(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(silent.wait, trio.sleep_forever, 5, address, 2)
            await wait_all_tasks_blocked()
            nursery.cancel_scope.cancel()
    assert len(silent) == 0
    assert not silent._by_address
