"""Workers: several gateway processes on one listener, each restarted when it dies.

When a worker of Hypercorn's own master dies, the master ends all of them and exits with 0. Here a
worker is a child process that runs ``serve`` on inherited sockets, and its death does not affect
the others.
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
from .transports.accepting import WorkerLoads

log = structlog.get_logger()

MISUSED: Final = 2  # the exit status of a worker whose settings are invalid
READY: Final = b"1"  # what a worker sends its supervisor once it is ready
_READY_TIMEOUT: Final = 15.0  # seconds to wait for a new worker before the old one is stopped
_STABLE_AFTER: Final = (
    10.0  # seconds; the death of a worker that lived longer restarts the back-off
)
_KILL_AFTER: Final = 2.0  # seconds beyond graceful_timeout
_FINAL_READ_TIMEOUT: Final = 0.5  # seconds to read what a worker sent before it ended
_MAX_PROBLEM_BYTES: Final = 16_384  # of a worker's problems


class _CannotStart(Exception):  # noqa: N818 - an outcome
    """A process can't be started at this moment; the text says why."""


class _Worker:
    """One child process, and a socket pair with it.

    The worker writes :data:`READY` on its end once, or the problems with its settings. It stops
    when the supervisor's end closes.
    """

    def __init__(
        self, process: trio.Process, link: trio.SocketStream, seat: int | None = None
    ) -> None:
        self.process = process
        self.seat = seat  # at the board
        self._link = link
        self._sent_signal: signal.Signals | None = None
        self._heard = trio.Event()
        self.ready = False
        self.problems: list[str] = []  # with its settings

    @property
    def ended(self) -> bool:
        return self.process.returncode is not None

    async def listen(self) -> None:
        """Read what it sends; return when it is ready, or when its end is closed."""
        said = b""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            while len(said) < _MAX_PROBLEM_BYTES and (data := await self._link.receive_some()):
                said += data
                if said.startswith(READY):
                    self.ready = True
                    break
        if not self.ready:
            self.problems = said.decode(errors="replace").splitlines()
        self._heard.set()

    async def wait_ready(self) -> bool:
        """Wait until it is ready; return False if it ended or took too long."""
        with trio.move_on_after(_READY_TIMEOUT):
            await self._heard.wait()
        return self.ready

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal, unless it was the last one sent: a repeated signal stops it at once."""
        if not self.ended and number != self._sent_signal:
            self._sent_signal = number
            self.process.send_signal(number)

    async def wait(self) -> int:
        status = await self.process.wait()
        with trio.move_on_after(
            _FINAL_READ_TIMEOUT
        ):  # its own children may hold the other end open
            await self._heard.wait()
        await trio.aclose_forcefully(self._link)
        return status


class Supervisor:
    """Keeps ``count`` workers alive on one set of sockets.

    - SIGTERM and SIGINT drain all workers; a second one kills them.
    - SIGHUP replaces them one by one; each old worker stops when its successor is ready.
    - Invalid settings end the supervisor only at the start. Once a worker has been ready, a worker
      that ends or can't start is started again with back-off, and the others go on serving.
    """

    def __init__(
        self, config: Config, arguments: Sequence[str], count: int, env: Mapping[str, str]
    ) -> None:
        self.command = [sys.executable, "-m", "trio_gateway", "serve", *arguments]  # of a worker
        self._count = count
        self._patience = config.graceful_timeout + _KILL_AFTER
        sockets = config.create_sockets()
        secure, insecure = sockets.secure_sockets, sockets.insecure_sockets
        self._sockets = [*secure, *insecure]
        for each in self._sockets:
            each.listen(config.backlog)
            each.set_inheritable(True)
        self._main = secure or insecure
        self._insecure = insecure if secure else []
        self._snapshots: WorkerSnapshots | None = None
        try:
            group = str(open_group())
            self._snapshots = WorkerSnapshots(Path(group))
        except OSError as error:  # a read-only file system: metrics are no reason not to serve
            log.warning("snapshots not shared: metrics are one worker's", error=error.strerror)
            group = ""
        self._env = {**env, GROUP: group}
        self._board: WorkerLoads | None = None
        try:
            self._board = WorkerLoads.create(2 * count)  # while one is replaced there are more
        except OSError as error:
            log.warning("workers accept as it happens", error=error.strerror)
        self._seats = set(range(2 * count))  # at the board, that are free
        self._workers: dict[int, _Worker] = {}  # by place
        self._passing: set[_Worker] = set()  # that come or go while workers are replaced
        self._rolling = trio.Lock()
        self._stopping = trio.Event()
        self._proven = False  # a worker has been ready, or has lived long, with our settings
        self._listeners: trio.Nursery | None = None  # to what workers say
        self._sent_signal = signal.SIGTERM  # the last that all were sent, once we are stopping
        self._status = 0

    async def run(self) -> int:
        """Supervise until told to stop; returns the exit status: 0 if every worker's was."""
        async with trio.open_nursery() as self._listeners:
            async with trio.open_nursery() as places:
                self._listeners.start_soon(self._handle_signals, places)
                for place in range(self._count):
                    places.start_soon(self._keep, place)
            self._listeners.cancel_scope.cancel()
        for each in self._sockets:
            each.close()
        if self._snapshots is not None:
            with suppress(OSError):
                self._snapshots.remove()
        return self._status

    async def _keep(self, place: int) -> None:
        backoff, failures = Backoff(first=0.2, most=5.0), 0
        while not self._stopping.is_set():
            started = trio.current_time()
            try:
                worker = await self._start()
            except _CannotStart as error:
                failures += 1
                delay = backoff.after(failures)
                log.error(
                    "worker can't be started",
                    place=place,
                    error=str(error),
                    restart_in=round(delay, 2),
                )
                await self._wait_stopping(delay)
                continue
            self._workers[place] = worker
            log.info("worker started", pid=worker.process.pid, place=place)
            status = await self._ended(worker)
            while (successor := self._workers[place]) is not worker:  # replaced meanwhile
                started, worker = trio.current_time(), successor
                status = await self._ended(worker)
            if self._stopping.is_set():
                # One that was told to stop before it could heed the signal has served nobody.
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
        """Wait for its end, keep its counters, and free its seat; its status."""
        status = await worker.wait()
        self._leave_board(worker.seat)
        worker.seat = None
        if self._snapshots is not None:
            with suppress(OSError):  # then its file stays
                self._snapshots.fold(worker.process.pid)
        return status

    async def _wait_stopping(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            await self._stopping.wait()

    async def _start(self) -> _Worker:
        """Start a worker; raises :exc:`_CannotStart`."""
        seat = self._seats.pop() if self._seats else None
        try:
            process, ours = await self._open_process(seat)
        # Trio starts it in a thread, and a system without room for one raises RuntimeError.
        except (OSError, RuntimeError, MemoryError) as error:
            self._leave_board(seat)
            raise _CannotStart(getattr(error, "strerror", None) or str(error)) from None
        worker = _Worker(process, trio.SocketStream(trio.socket.from_stdlib_socket(ours)), seat)
        assert self._listeners is not None
        self._listeners.start_soon(self._listen, worker)
        if self._stopping.is_set():  # meanwhile
            worker.signal(self._sent_signal)
        return worker

    def _leave_board(self, seat: int | None) -> None:
        if seat is not None:
            self._seats.add(seat)
            if self._board is not None:
                self._board.clear(seat)

    async def _open_process(self, seat: int | None) -> tuple[trio.Process, socket.socket]:
        """A worker's process, and our end of the pair."""
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                command = list(self.command)
                for each in self._main:
                    command += ["--bind", f"fd://{each.fileno()}"]
                for each in self._insecure:
                    command += ["--insecure-bind", f"fd://{each.fileno()}"]
                shared = [each.fileno() for each in [theirs, *self._sockets]]
                if self._board is not None and seat is not None:
                    command += ["--board", f"{self._board.descriptor}:{seat}"]
                    shared.append(self._board.descriptor)
                command += ["--supervisor", str(theirs.fileno())]
                process = await trio.lowlevel.open_process(
                    command,
                    env=self._env,
                    stdin=subprocess.DEVNULL,
                    pass_fds=shared,
                    # A Ctrl-C at the terminal is for us to pass on, once.
                    process_group=0,
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    async def _listen(self, worker: _Worker) -> None:
        await worker.listen()
        self._proven |= worker.ready

    async def _handle_signals(self, places: trio.Nursery) -> None:
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
                        places.start_soon(self._roll)
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
        await trio.sleep(self._patience)
        log.error("workers killed", seconds=self._patience)
        self._stop(signal.SIGKILL)

    async def _roll(self) -> None:
        async with self._rolling:  # who asks again meanwhile has them replaced again
            for place, old in sorted(self._workers.items()):
                if self._stopping.is_set() or not self._serves(place, old):
                    continue  # one that has died is being replaced anyway
                if not await self._replace(place, old):
                    return  # the next one would not fare better

    def _serves(self, place: int, worker: _Worker) -> bool:
        return self._workers[place] is worker and not worker.ended

    async def _replace(self, place: int, old: _Worker) -> bool:
        """Whether its successor could serve; if not, the old one stays."""
        try:
            new = await self._start()
        except _CannotStart as error:
            log.error("worker can't be started, the old ones stay", place=place, error=str(error))
            return False
        self._passing.add(new)
        ready = await new.wait_ready()
        if ready and self._serves(place, old) and not self._stopping.is_set():
            self._workers[place] = new
            log.info("worker replaced", old=old.process.pid, new=new.process.pid)
            leaving = old
        else:
            if not ready and not self._stopping.is_set():
                log.error("worker not ready, the old ones stay", pid=new.process.pid, **_why(new))
            leaving = new  # it may have clients
        self._passing = {leaving}
        leaving.signal(signal.SIGTERM)
        with trio.move_on_after(self._patience):
            await leaving.process.wait()
        leaving.signal(signal.SIGKILL)
        await self._ended(leaving)
        self._passing.clear()
        return ready


def _why(worker: _Worker) -> dict[str, list[str]]:
    return {"problems": worker.problems} if worker.problems else {}


def supervise(
    config: Config, arguments: Sequence[str], count: int, env: Mapping[str, str] | None = None
) -> int:
    """Run ``count`` workers that serve with these arguments; returns the exit status.

    Raises :exc:`OSError` if the sockets can't be had.
    """
    supervisor = Supervisor(config, arguments, count, dict(os.environ) if env is None else env)
    return trio.run(supervisor.run)
