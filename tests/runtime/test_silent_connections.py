"""Silent connections: those without a first byte wait beside each other, and not for long."""

from functools import partial

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.runtime.concurrency_limiter import Overloaded
from trio_gateway.runtime.silent_connections import SilentConnections


async def outcome(silent: SilentConnections, found: list[str], name: str, *more: object) -> None:
    try:
        sent = await silent.wait(trio.sleep_forever, 5, *more)  # type: ignore[arg-type]
        found.append(f"{name} {'sent' if sent else 'silent'}")
    except Overloaded:
        found.append(f"{name} ended")


async def test_connection_that_sends_goes_on_and_a_silent_one_has_its_time(
    autojump_clock: MockClock,
) -> None:
    silent = SilentConnections(10)
    assert await silent.wait(partial(trio.sleep, 4), 5)
    assert trio.current_time() == 4
    assert not await silent.wait(trio.sleep_forever, 5)
    assert trio.current_time() == 9
    assert len(silent) == 0


async def test_connection_over_the_limit_ends_the_longest_silent_one(
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


async def test_connection_over_the_limit_of_its_address_ends_one_of_that_address(
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
async def test_ended_connections_leave_nothing_behind(
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
