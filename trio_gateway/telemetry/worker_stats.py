"""Worker stats: the metrics of this process and of its siblings, where they can be shared."""

import os
from collections.abc import Callable
from typing import Final

import structlog
import trio

from .snapshot import Snapshot
from .worker_snapshots import GROUP, WorkerSnapshots

log = structlog.get_logger()

SHARED_EVERY: Final = 0.25  # seconds


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

    def all(self, own: Snapshot) -> list[Snapshot]:
        """The snapshots of this process and of its siblings.

        The siblings are given ours first: a number that was reported once must be part of every
        later sum, whichever worker is asked then, and also if this one is killed.
        """
        if self._snapshots is None:
            return [own]
        self._write(self._snapshots, own)
        return [own, *self._snapshots.read()]

    async def share(self, own: Callable[[], Snapshot]) -> None:
        """Share what ``own`` returns until cancelled; return at once if there are no siblings."""
        if (snapshots := self._snapshots) is None:
            await trio.lowlevel.checkpoint()
            return
        snapshots.clean_up()
        try:
            while True:
                self._write(snapshots, own())
                await trio.sleep(SHARED_EVERY)
        finally:
            snapshots.leave(own())

    def _write(self, snapshots: WorkerSnapshots, own: Snapshot) -> None:
        try:
            snapshots.write(own)
        except OSError as error:  # a full disk, for example, must not end the process
            if not self.partial:
                log.error("snapshots not shared", error=error.strerror)
            self.partial = True
        else:
            self.partial = False
