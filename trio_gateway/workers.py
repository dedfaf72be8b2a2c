"""Workers: several gateway processes, each of which is started again when it dies.

A worker is a child process that runs ``serve`` on inherited sockets. The death of one does not
affect the others. (When a worker of Hypercorn's own master dies, the master ends all of them and
exits with 0.)
"""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final

import structlog
import trio
from hypercorn.config import Config

from .core.resilience import Backoff
from .telemetry.worker_snapshots import GROUP, WorkerSnapshots, open_group
from .worker_listeners import Listeners

log = structlog.get_logger()

MISUSED: Final = 2  # the exit status of a worker whose settings are invalid
READY: Final = b"1"  # what a worker sends its supervisor once it is ready
_READY_TIMEOUT: Final = 15.0  # seconds to wait for a new worker before the old one is stopped
# Seconds; when a worker that lived longer dies, the back-off begins again.
_STABLE_AFTER: Final = 10.0
_KILL_AFTER: Final = 2.0  # seconds beyond graceful_timeout
_FINAL_READ_TIMEOUT: Final = 0.5  # seconds to read what a worker wrote before it ended
_MAX_REPORT_BYTES: Final = 16_384  # that a worker writes to its supervisor


class _CannotStart(Exception):  # noqa: N818 - an outcome
    """No process can be started at this moment; the text says why."""


class _Worker:
    """A child process, and a socket pair with it.

    On its end the worker writes a report, once: :data:`READY`, or the problems with its settings.
    It stops when the supervisor's end closes.
    """

    def __init__(
        self,
        process: trio.Process,
        link: trio.SocketStream,
        listeners: Listeners,
        slot: int | None = None,
    ) -> None:
        self.process = process
        self._link = link
        self._listeners = listeners
        self._slot = slot  # for its load
        self._sent_signal: signal.Signals | None = None
        self._reported = trio.Event()
        self.ready = False
        self.problems: list[str] = []  # with its settings

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    async def read_report(self) -> None:
        """Read its report; return when it is ready, or when its end is closed."""
        report = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while len(report) < _MAX_REPORT_BYTES and (data := await self._link.receive_some()):
                report += data
                if report.startswith(READY):
                    self.ready = True
                    break
        if not self.ready:
            self.problems = report.decode(errors="replace").splitlines()
        self._reported.set()

    async def wait_ready(self) -> bool:
        """Wait until it is ready; return False if it ended or took too long."""
        with trio.move_on_after(_READY_TIMEOUT):
            await self._reported.wait()
        return self.ready

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it was the last one sent: a repeated signal stops it at once."""
        if not self.ended and number != self._sent_signal:
            self._sent_signal = number
            self.process.send_signal(number)

    async def wait(self) -> int:
        """Wait until it has ended and free what it had here; returns its exit status."""
        status = await self.process.wait()
        # Its own children may hold the other end open.
        with trio.move_on_after(_FINAL_READ_TIMEOUT):
            await self._reported.wait()
        await trio.aclose_forcefully(self._link)
        self._listeners.free_slot(self._slot)
        self._slot = None
        return status


class Supervisor:
    """Keeps workers alive, one for each item of ``listeners``.

    - SIGTERM and SIGINT drain all workers; a second one kills them.
    - SIGHUP replaces them one by one; each old worker stops when its successor is ready.
    - Invalid settings end the supervisor only at the start. Once a worker has been ready, a worker
      that ends or can't be started is started again with back-off, and the others go on serving.

    Arguments:
        config: gives the time that a worker may take to stop.
        arguments: of the command ``serve``, for every worker.
        listeners: what each worker accepts connections on; the same object if they share it.
        env: the environment of the workers.
    """

    def __init__(
        self,
        config: Config,
        arguments: Sequence[str],
        listeners: Sequence[Listeners],
        env: Mapping[str, str],
    ) -> None:
        self.command = [sys.executable, "-m", "trio_gateway", "serve", *arguments]  # of a worker
        self._listeners = listeners
        self._stop_timeout = config.graceful_timeout + _KILL_AFTER
        self._snapshots: WorkerSnapshots | None = None
        try:
            group = str(open_group())
            self._snapshots = WorkerSnapshots(Path(group))
        except OSError as error:  # a read-only file system: it serves without metrics
            log.warning("snapshots not shared: metrics are one worker's", error=error.strerror)
            group = ""
        self._env = {**env, GROUP: group}
        self._workers: dict[int, _Worker] = {}  # by number
        self._passing: set[_Worker] = set()  # that come or go while workers are replaced
        self._rolling = trio.Lock()
        self._stopping = trio.Event()
        self._proven = False  # a worker has been ready, or has lived long, with our settings
        self._reports: trio.Nursery | None = None  # where the workers' reports are read
        self._sent_signal = signal.SIGTERM  # the last that all were sent, once we are stopping
        self._status = 0

    async def run(self) -> int:
        """Supervise until a signal ends it; returns the exit status: 0 if every worker's was."""
        async with trio.open_nursery() as self._reports:
            async with trio.open_nursery() as nursery:
                self._reports.start_soon(self._handle_signals, nursery)
                for number in range(len(self._listeners)):
                    nursery.start_soon(self._keep_alive, number)
            self._reports.cancel_scope.cancel()
        for each in self._listeners:
            each.close()
        if self._snapshots is not None:
            with suppress(OSError):
                self._snapshots.remove()
        return self._status

    async def _keep_alive(self, number: int) -> None:
        backoff, failures = Backoff(first=0.2, most=5.0), 0
        while not self._stopping.is_set():
            started = trio.current_time()
            try:
                worker = await self._start(number)
            except _CannotStart as error:
                failures += 1
                delay = backoff.after(failures)
                log.error(
                    "worker can't be started",
                    number=number,
                    error=str(error),
                    restart_in=round(delay, 2),
                )
                await self._wait_stopping(delay)
                continue
            self._workers[number] = worker
            log.info("worker started", pid=worker.process.pid, number=number)
            status = await self._ended(worker)
            while (successor := self._workers[number]) is not worker:  # replaced meanwhile
                started, worker = trio.current_time(), successor
                status = await self._ended(worker)
            self._listeners[number].refuse()
            if self._stopping.is_set():
                # SIGTERM ends a worker at once if it comes before the worker handles signals.
                self._status = self._status or int(status not in {0, -signal.SIGTERM})
                return
            settled = trio.current_time() - started > _STABLE_AFTER
            self._proven |= worker.ready or settled
            if status == MISUSED and not self._proven:
                log.critical(
                    "worker can't start",
                    pid=worker.process.pid,
                    status=status,
                    problems=worker.problems,
                )
                self._status = status
                self._stop(signal.SIGTERM)
                return
            failures = 1 if settled else failures + 1
            delay = backoff.after(failures)
            log.error(
                "worker died",
                pid=worker.process.pid,
                status=status,
                restart_in=round(delay, 2),
                **_why(worker),
            )
            await self._wait_stopping(delay)

    async def _ended(self, worker: _Worker) -> int:
        """Wait until it has ended, and keep its counters; returns its exit status."""
        status = await worker.wait()
        if self._snapshots is not None:
            with suppress(OSError):  # then its file stays
                self._snapshots.fold(worker.process.pid)
        return status

    async def _wait_stopping(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._stopping.wait()

    async def _start(self, number: int) -> _Worker:
        """Start a worker; raises :exc:`_CannotStart`."""
        listeners = self._listeners[number]
        slot = listeners.take_slot()
        try:
            process, ours = await self._open_process(listeners, slot)
        # Trio starts it in a thread, and a system without room for one raises RuntimeError.
        except (OSError, RuntimeError, MemoryError) as error:
            listeners.free_slot(slot)
            raise _CannotStart(getattr(error, "strerror", None) or str(error)) from None
        link = trio.SocketStream(trio.socket.from_stdlib_socket(ours))
        worker = _Worker(process, link, listeners, slot)
        assert self._reports is not None
        self._reports.start_soon(self._read_report, worker)
        if self._stopping.is_set():  # meanwhile
            worker.signal(self._sent_signal)
        return worker

    async def _open_process(
        self, listeners: Listeners, slot: int | None
    ) -> tuple[trio.Process, socket.socket]:
        """A worker's process, and our end of the pair."""
        arguments, descriptors = listeners.arguments(slot)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [*self.command, *arguments, "--supervisor", str(theirs.fileno())],
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    pass_fds=[theirs.fileno(), *descriptors],
                    # A Ctrl-C at the terminal is for us to pass on, once.
                    process_group=0,
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    async def _read_report(self, worker: _Worker) -> None:
        await worker.read_report()
        self._proven |= worker.ready

    async def _handle_signals(self, replacing: trio.Nursery) -> None:
        handled = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
        async with trio.open_nursery() as nursery:
            with trio.open_signal_receiver(*handled) as signals:
                async for number in signals:
                    name = signal.Signals(number).name
                    if self._stopping.is_set():
                        log.warning("stopping at once", signal=name)
                        self._stop(signal.SIGKILL)
                    elif number == signal.SIGHUP:
                        log.info("replacing workers", signal=name)
                        replacing.start_soon(self._roll)
                    else:
                        log.info("stopping", signal=name)
                        self._stop(signal.SIGTERM)
                        nursery.start_soon(self._kill_after_timeout)

    def _stop(self, number: signal.Signals) -> None:
        self._stopping.set()
        self._sent_signal = number
        for worker in [*self._workers.values(), *self._passing]:
            worker.signal(number)

    async def _kill_after_timeout(self) -> None:
        await trio.sleep(self._stop_timeout)
        log.error("workers killed", seconds=self._stop_timeout)
        self._stop(signal.SIGKILL)

    async def _roll(self) -> None:
        async with self._rolling:  # a SIGHUP that comes meanwhile replaces them again
            for number, old in sorted(self._workers.items()):
                if self._stopping.is_set() or not self._serves(number, old):
                    continue  # one that has died is being replaced anyway
                if not await self._replace(number, old):
                    return  # the next one would fail, too

    def _serves(self, number: int, worker: _Worker) -> bool:
        return self._workers[number] is worker and not worker.ended

    async def _replace(self, number: int, old: _Worker) -> bool:
        """Replace a worker; return False, and leave the old one, if its successor can't serve."""
        try:
            new = await self._start(number)
        except _CannotStart as error:
            log.error("worker can't be started, the old ones stay", number=number, error=str(error))
            return False
        self._passing.add(new)
        ready = await new.wait_ready()
        if ready and self._serves(number, old) and not self._stopping.is_set():
            self._workers[number] = new
            log.info("worker replaced", old=old.process.pid, new=new.process.pid)
            leaving = old
        else:
            if not ready and not self._stopping.is_set():
                log.error("worker not ready, the old ones stay", pid=new.process.pid, **_why(new))
            leaving = new  # it may have clients
        self._passing = {leaving}
        leaving.signal(signal.SIGTERM)
        with trio.move_on_after(self._stop_timeout):
            await leaving.process.wait()
        leaving.signal(signal.SIGKILL)
        await self._ended(leaving)
        self._passing.clear()
        return ready


def _why(worker: _Worker) -> dict[str, list[str]]:
    return {"problems": worker.problems} if worker.problems else {}


def supervise(
    config: Config,
    arguments: Sequence[str],
    count: int,
    env: Mapping[str, str] | None = None,
    *,
    own_ports: bool = False,
) -> int:
    """Run ``count`` workers that serve with these arguments; returns the exit status.

    With ``own_ports`` the ports of ``config`` are those of the first worker, and each other worker
    has the next ones. Raises :exc:`OSError` if it can't listen, and :exc:`.BadAddress`.
    """
    if own_ports:
        listeners = Listeners.open_own(config, count)
    else:
        listeners = [Listeners.open_shared(config, count)] * count
    environment = dict(os.environ) if env is None else env
    return trio.run(Supervisor(config, arguments, listeners, environment).run)
