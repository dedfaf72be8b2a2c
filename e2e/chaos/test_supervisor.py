"""The supervisor: how it replaces workers, with workers that start faster than a gateway."""

import errno
import os
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
import structlog
import trio
from hypercorn.config import Config

from tests.support.gateways import until
from trio_gateway.worker_listeners import Listeners
from trio_gateway.workers import Supervisor

WORKER = """
import os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
open("{folder}/" + str(os.getpid()), "w").close()
{delay}
if os.path.exists("{folder}.bad"):
    os.write(int(sys.argv[-1]), b"WS_SOMETHING: bad")
    os._exit(2)
os.write(int(sys.argv[-1]), b"1")
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
        listeners = [Listeners.open_shared(config, 2)] * 2
        self.supervisor = Supervisor(config, [], listeners, dict(os.environ))
        script = WORKER.format(folder=folder, delay=delay)
        self.supervisor.command = [sys.executable, "-I", "-S", "-c", script]
        self.status: int | None = None

    async def run(self) -> None:
        self.status = await self.supervisor.run()

    @property
    def started(self) -> int:
        return len(list(self.folder.iterdir()))

    @property
    def ready(self) -> int:
        return sum(worker.ready for worker in self.supervisor._workers.values())

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


async def test_second_sighup_replaces_the_workers_again_and_leaves_no_old_one(
    tmp_path: Path,
) -> None:
    async with supervised(tmp_path) as found:
        await until(lambda: found.started == 2)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 3)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 6)
        await until(lambda: len(found.alive) == 2)


async def test_sigterm_during_a_roll_ends_old_and_new_workers(tmp_path: Path) -> None:
    async with supervised(tmp_path, delay="time.sleep(30)") as found:
        await until(lambda: found.started == 2)
        os.kill(os.getpid(), signal.SIGHUP)
        await until(lambda: found.started == 3)
        assert len(found.alive) == 3


async def test_sigterm_reaches_a_worker_that_is_being_started(
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


async def test_dead_worker_is_not_replaced_twice_by_a_roll(tmp_path: Path) -> None:
    async with supervised(tmp_path) as found:
        await until(lambda: found.started == 2)
        await trio.sleep(0.05)
        os.kill(min(found.alive), signal.SIGKILL)
        await until(lambda: len(found.alive) == 1)
        os.kill(os.getpid(), signal.SIGHUP)  # within the back-off
        await until(lambda: found.started == 4)
        await trio.sleep(0.1)
        assert len(found.alive) == 2


async def killed(found: Supervised, monkeypatch: pytest.MonkeyPatch) -> int:
    """Kill one of two workers that are ready; the pid of the other."""
    monkeypatch.setattr("trio_gateway.workers.Backoff.after", lambda _self, _failures: 0.02)
    await until(lambda: found.started == 2)
    await until(lambda: found.ready == 2)
    victim, healthy = sorted(found.alive)
    os.kill(victim, signal.SIGKILL)
    return healthy


@pytest.mark.parametrize("error", ["ENOENT", "EACCES", "ENOEXEC"])
async def test_worker_that_cannot_be_started_now_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    program = tmp_path / "python"
    if error != "ENOENT":
        program.write_bytes(b"\x7fELF")
        program.chmod(0o700 if error == "ENOEXEC" else 0o600)
    folder = tmp_path / "workers"
    folder.mkdir()
    with structlog.testing.capture_logs() as logs:
        async with supervised(folder) as found:
            await until(lambda: found.ready == 2)
            good, found.supervisor.command = found.supervisor.command, [str(program)]
            healthy = await killed(found, monkeypatch)
            await until(lambda: len(events(logs, "worker can't be started")) >= 3)

            os.kill(os.getpid(), signal.SIGHUP)  # nor does a roll
            await until(lambda: events(logs, "worker can't be started, the old ones stay"))
            assert found.alive == {healthy}

            found.supervisor.command = good
            await until(lambda: found.started == 3)
            assert healthy in found.alive
    assert all(line["error"] for line in events(logs, "worker can't be started"))


@pytest.mark.parametrize(
    "error",
    [OSError(errno.EAGAIN, "again"), MemoryError(), RuntimeError("can't start new thread")],
    ids=lambda error: type(error).__name__,
)
async def test_worker_for_which_the_system_has_no_memory_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    async def full(*_: object, **__: object) -> trio.Process:
        raise error

    async with supervised(tmp_path) as found:
        await until(lambda: found.ready == 2)
        with monkeypatch.context() as patch, structlog.testing.capture_logs() as logs:
            patch.setattr(trio.lowlevel, "open_process", full)
            healthy = await killed(found, monkeypatch)
            await until(lambda: len(events(logs, "worker can't be started")) >= 2)
        await until(lambda: found.started == 3)
        assert healthy in found.alive


async def test_bad_settings_after_a_ready_worker_are_retried_like_any_other_exit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, bad = tmp_path / "workers", tmp_path / "workers.bad"
    folder.mkdir()
    async with supervised(folder) as found:
        await until(lambda: found.ready == 2)
        bad.touch()
        with structlog.testing.capture_logs() as logs:
            healthy = await killed(found, monkeypatch)
            await until(lambda: len(events(logs, "worker died")) >= 3)
            os.kill(os.getpid(), signal.SIGHUP)
            await until(lambda: events(logs, "worker not ready, the old ones stay"))
            assert healthy in found.alive
        bad.unlink()
        await until(lambda: found.ready == 2)
        assert healthy in found.alive
    _, again, *_ = events(logs, "worker died")
    assert (again["status"], again["problems"]) == (2, ["WS_SOMETHING: bad"])
    (refused,) = events(logs, "worker not ready, the old ones stay")
    assert refused["problems"] == ["WS_SOMETHING: bad"]


async def test_bad_settings_at_the_start_end_the_supervisor_with_status_2(tmp_path: Path) -> None:
    folder = tmp_path / "workers"
    folder.mkdir()
    (tmp_path / "workers.bad").touch()
    with trio.fail_after(5), structlog.testing.capture_logs() as logs:
        found = Supervised(folder, "")
        await found.run()

    assert found.status == 2
    assert events(logs, "worker can't start")[0]["problems"] == ["WS_SOMETHING: bad"]


def events(logs: list[structlog.typing.EventDict], name: str) -> list[structlog.typing.EventDict]:
    return [line for line in logs if line["event"] == name]
