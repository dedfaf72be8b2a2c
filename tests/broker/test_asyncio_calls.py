"""Calls into an asyncio loop: their results, errors and cancellation."""

import asyncio

import pytest
import trio
import trio.testing

from trio_gateway.broker.asyncio_calls import AsyncioCalls


async def nothing() -> None:
    pass


async def fail() -> None:
    raise ConnectionResetError


async def answer() -> int:
    return 1


async def give_up() -> None:
    raise asyncio.CancelledError


async def test_results_and_errors_are_the_callers() -> None:
    calls = AsyncioCalls()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(calls.run, nothing, 1)
        assert await calls.call(answer) == 1
        with pytest.raises(ConnectionResetError):
            await calls.call(fail)
        with pytest.raises(asyncio.CancelledError):
            await calls.call(give_up)
        assert await calls.call(answer) == 1
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("ends", ["cancelled", "bug"])
async def test_loop_that_ends_cancels_nobody_who_waits_for_it(ends: str) -> None:
    """Trio's Cancelled of another task would end the caller's nursery as if all was done."""
    calls, began = AsyncioCalls(), trio.Event()
    is_waiting = False

    async def never_answer() -> None:
        began.set()
        await asyncio.sleep(60)

    async def run() -> None:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(calls.run, nothing, 1)
                await began.wait()
                await trio.testing.wait_all_tasks_blocked()
                if ends == "bug":
                    raise ZeroDivisionError
                scope.cancel()

    async with trio.open_nursery() as callers:
        callers.start_soon(calls.call, never_answer)
        try:
            await run()
        except* ZeroDivisionError:
            assert ends == "bug"
        await trio.testing.wait_all_tasks_blocked()
        is_waiting = len(callers.child_tasks) == 1
        callers.cancel_scope.cancel()
    assert is_waiting
