"""The supervisor: who replaces whom, with workers that start quicker than a gateway does."""

import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import trio
from harness import until
from hypercorn.config import Config

from trio_gateway.workers import Supervisor

WORKER = """
import os, signal, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
open("{folder}/" + str(os.getpid()), "w").close()
{delay}
os.write(int(__import__("sys").argv[-1]), b"1")
while True:
    signal.pause()
"""


class Supervised:
    """A supervisor in this process, its workers, and its status at the end."""

    def __init__(self, folder: Path, delay: str) -> None:
        config = Config()
        config.bind = ["127.0.0.1:0"]
        config.graceful_timeout = 3
        self.folder = folder
        self.supervisor = Supervisor(config, [], 2, dict(os.environ))
        script = WORKER.format(folder=folder, delay=delay)
        self.supervisor.command = [sys.executable, "-I", "-S", "-c", script]
        self.status: int | None = None

    async def run(self) -> None:
        self.status = await self.supervisor.run()

    @property
    def started(self) -> int:
        return len(list(self.folder.iterdir()))

    @property
    def alive(self) -> set[int]:
        return {int(p.name) for p in self.folder.iterdir() if Path("/proc", p.name).exists()}


@asynccontextmanager
async def supervised(folder: Path, delay: str = "") -> AsyncIterator[Supervised]:
    found = Supervised(folder, delay)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(found.run)
        yield found
        os.kill(os.getpid(), signal.SIGTERM)
        with trio.fail_after(5):
            await until(lambda: found.status is not None)
    assert found.status == 0
    assert not found.alive


async def test_a_second_sighup_replaces_the_workers_again_and_leaves_none_over(
    tmp_path: Path,
) -> None:
    async with supervised(tmp_path) as found:
        await until(lambda: found.started == 2)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 3)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 6)
        await until(lambda: len(found.alive) == 2)


async def test_sigterm_amid_a_roll_ends_those_that_come_and_those_that_go(tmp_path: Path) -> None:
    async with supervised(tmp_path, delay="time.sleep(30)") as found:
        await until(lambda: found.started == 2)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 3)
        assert len(found.alive) == 3


async def test_sigterm_while_a_worker_is_being_started_reaches_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = trio.lowlevel.open_process

    async def slowly(*arguments: object, **options: object) -> trio.Process:
        process: trio.Process = await partial(opened, *arguments, **options)()
        await trio.sleep(0.2)
        return process

    monkeypatch.setattr(trio.lowlevel, "open_process", slowly)
    async with supervised(tmp_path) as found:
        await until(lambda: found.started == 2)


async def test_a_worker_that_died_is_not_replaced_twice_by_a_roll(tmp_path: Path) -> None:
    async with supervised(tmp_path) as found:
        await until(lambda: found.started == 2)
        await trio.sleep(0.05)
        os.kill(min(found.alive), signal.SIGKILL)
        await until(lambda: len(found.alive) == 1)
        os.kill(os.getpid(), signal.SIGHUP)  # within the back-off
        await until(lambda: found.started == 4)
        await trio.sleep(0.1)
        assert len(found.alive) == 2
