"""Faults put into a gateway process by its environment; nothing in the product knows of them.

``CHAOS_TASK`` names a task as its code does (``Batches.run``; ``Batches.run#2`` is the second
that is started). It raises when the file ``CHAOS_NOW`` is there, in whichever process takes it
away first. ``CHAOS_CLOCK`` is a file with the seconds by which the wall clock is wrong.
``CHAOS_STATUS`` is a file to which Hypercorn's master writes how its workers ended.
"""

import multiprocessing.popen_fork
import os
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import trio

HOOK: Final = Path(__file__).parent / "hook"
_ROOT: Final = HOOK.parents[2]
# What a process needs: its hook, this package, and the gateway that stands beside it.
PYTHONPATH: Final = os.pathsep.join(map(str, [HOOK, _ROOT]))

_start_soon = trio.Nursery.start_soon
_time = time.time


class Injected(Exception):
    """A bug that a test has put there."""


def install() -> None:
    """Do what the environment says."""
    if task := os.environ.get("CHAOS_TASK"):
        inject(task, Path(os.environ["CHAOS_NOW"]))
    if clock := os.environ.get("CHAOS_CLOCK"):
        set_wrong(Path(clock))
    if statuses := os.environ.get("CHAOS_STATUS"):
        write_statuses(Path(statuses))


def inject(task: str, when: Path) -> Callable[[], None]:
    """Let a task raise as soon as the file is there; returns how to undo it."""
    name, _, number = task.partition("#")
    started: Counter[str] = Counter()

    def is_meant(work: object) -> bool:
        if _name(work) != name:
            return False
        started[name] += 1
        return not number or started[name] == int(number)

    def start_soon(
        self: trio.Nursery, async_fn: Callable[..., Awaitable[Any]], *args: Any, name: Any = None
    ) -> None:
        if is_meant(async_fn):
            async_fn = partial(_run_until, when, async_fn)
        else:  # a task that is restarted is an argument of keep_running
            args = tuple(partial(_run_until, when, arg) if is_meant(arg) else arg for arg in args)
        _start_soon(self, async_fn, *args, name=name)

    def undo() -> None:
        vars_of(trio.Nursery, start_soon=_start_soon)

    vars_of(trio.Nursery, start_soon=start_soon)
    return undo


def vars_of(owner: Any, **values: Any) -> None:
    for name, value in values.items():
        setattr(owner, name, value)


def _name(work: object) -> str:
    while isinstance(work, partial):
        work = work.func
    return getattr(work, "__qualname__", "") if callable(work) else ""


async def _run_until(when: Path, work: Callable[..., Awaitable[Any]], *args: Any) -> Any:
    """Do the work as ever until the moment has come, then raise out of it."""
    result, come = None, False

    async with trio.open_nursery() as nursery:

        async def watch() -> None:
            nonlocal come
            while not come:
                with suppress(FileNotFoundError):
                    when.unlink()
                    come = True
                await trio.sleep(0.01)
            nursery.cancel_scope.cancel()

        _start_soon(nursery, watch)
        result = await work(*args)
        nursery.cancel_scope.cancel()
    if come:
        raise Injected("this task has a bug")
    return result


def set_wrong(clock: Path) -> None:
    """Step the wall clock, and that alone, whenever the file says another number."""

    def wrong() -> float:
        try:
            return _time() + float(clock.read_text() or 0)
        except FileNotFoundError:
            return _time()

    vars_of(time, time=wrong)


def write_statuses(statuses: Path) -> None:
    popen: Any = multiprocessing.popen_fork.Popen
    poll = popen.poll

    def writing_poll(self: Any, flag: int = os.WNOHANG) -> Any:
        known = self.returncode
        status = poll(self, flag)
        if known is None and status is not None:
            with statuses.open("a") as file:
                file.write(f"{status}\n")
        return status

    vars_of(popen, poll=writing_poll)
