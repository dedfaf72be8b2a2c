"""A worker of Hypercorn's master learns of its stop without asking again and again."""

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event

import hypercorn.trio.run
import trio
import trio.testing

from trio_gateway.transports import tcp
from trio_gateway.transports.hypercorn_stop import wait_until_set

SPAWN = multiprocessing.get_context("spawn")


async def test_all_that_wait_return_when_the_event_is_set() -> None:
    event = SPAWN.Event()
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(wait_until_set, event)
        await trio.testing.wait_all_tasks_blocked()
        event.set()
    assert event.is_set()

    with trio.fail_after(1):
        await wait_until_set(event)


async def test_it_can_be_cancelled() -> None:
    with trio.move_on_after(0.01) as scope:
        await wait_until_set(SPAWN.Event())
    assert scope.cancelled_caught


def wait(event: Event, waits: Event) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait_until_set, event)
            await trio.sleep(0.05)
            waits.set()

    trio.run(main)


def test_a_worker_that_is_killed_while_it_waits_does_not_hang_the_master() -> None:
    event, waits = SPAWN.Event(), SPAWN.Event()
    killed = SPAWN.Process(target=wait, args=(event, waits))
    killed.start()
    assert waits.wait(20)
    assert killed.pid is not None
    os.kill(killed.pid, signal.SIGKILL)
    killed.join()
    began = time.monotonic()
    event.set()

    assert time.monotonic() - began < 5
    assert event.is_set()


def test_hypercorn_has_the_function_that_is_replaced() -> None:
    original = hypercorn.utils.check_multiprocess_shutdown_event
    assert "check_multiprocess_shutdown_event" in hypercorn.trio.run.trio_worker.__code__.co_names
    tcp.install(10.0)
    assert vars(hypercorn.trio.run)["check_multiprocess_shutdown_event"] is wait_until_set
    assert original.__code__.co_varnames[:2] == ("shutdown_event", "sleep")
