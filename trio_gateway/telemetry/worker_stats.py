"""Worker stats: the metrics of this process and of its siblings, where they can be shared."""

import os
from collections.abc import Callable
from contextlib import suppress
from typing import Final, NoReturn

import structlog
import trio

from .snapshot import Snapshot
from .worker_snapshots import ABANDONED, GROUP, WorkerSnapshots

log = structlog.get_logger()

PATIENCE: Final = 0.25  # seconds that a sibling has to write its snapshot when it is asked
_RETRY: Final = 5.0  # seconds
_REQUESTS: Final = 4096  # that one snapshot answers
_LOOK: Final = 0.002  # seconds between two looks at whether it has
ALIVE_EVERY: Final = ABANDONED / 3  # seconds


class WorkerStats:
    """Shares this worker's snapshots with its siblings, if it has any.

    ``partial`` says that the siblings' numbers are missing.
    """

    def __init__(self, snapshots: WorkerSnapshots | None, *, partial: bool = False) -> None:
        self._snapshots = snapshots
        self.partial = partial

    @classmethod
    def of_this_process(cls) -> "WorkerStats":
        """The stats of this process; only its own if there is no folder to share snapshots in."""
        try:
            return cls(WorkerSnapshots.of_this_process(), partial=os.environ.get(GROUP) == "")
        except OSError as error:
            log.warning("snapshots not shared", error=error.strerror)
            return cls(None, partial=True)

    async def all(self, own: Callable[[], Snapshot]) -> list[Snapshot]:
        """The snapshots of this process, from ``own``, and of its siblings.

        A sibling that does not answer within :data:`PATIENCE` has the numbers that it had last.
        The siblings are given ours first: a number that was reported once must be part of every
        later sum, whichever worker is asked then, and also if this one is killed.
        """
        if self._snapshots is None:
            await trio.lowlevel.checkpoint()
            return [own()]
        answered = self._snapshots.ask()
        with trio.move_on_after(PATIENCE):
            while not answered():  # noqa: ASYNC110 - other processes
                await trio.sleep(_LOOK)
        # No await from here on, or an older snapshot could replace one that was reported.
        found = own()
        self._write(self._snapshots, found)
        return [found, *self._snapshots.read()]

    async def share(self, own: Callable[[], Snapshot]) -> None:
        """Write what ``own`` returns whenever a sibling asks, until cancelled; return at once if
        there are no siblings.
        """
        if (snapshots := self._snapshots) is None:
            await trio.lowlevel.checkpoint()
            return
        snapshots.clean_up()
        try:
            while True:
                try:
                    pipe = snapshots.listen()
                except OSError as error:
                    self._failed(error)
                    await trio.sleep(_RETRY)
                    continue
                try:
                    await self._answer(snapshots, pipe, own)
                finally:
                    os.close(pipe)
        finally:
            snapshots.leave(own())

    async def _answer(
        self, snapshots: WorkerSnapshots, pipe: int, own: Callable[[], Snapshot]
    ) -> NoReturn:
        while True:
            with trio.move_on_after(ALIVE_EVERY) as quiet:
                await trio.lowlevel.wait_readable(pipe)
                os.read(pipe, _REQUESTS)
            if quiet.cancelled_caught:
                with suppress(OSError):
                    snapshots.touch()
            else:
                self._write(snapshots, own())

    def _write(self, snapshots: WorkerSnapshots, own: Snapshot) -> None:
        try:
            snapshots.write(own)
        except OSError as error:  # a full disk, for example, must not end the process
            self._failed(error)
        else:
            self.partial = False

    def _failed(self, error: OSError) -> None:
        if not self.partial:
            log.error("snapshots not shared", error=error.strerror)
        self.partial = True
