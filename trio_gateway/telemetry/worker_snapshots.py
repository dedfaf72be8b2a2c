"""Worker snapshots: files through which the workers of one supervisor share their metrics.

A worker that is asked for the sum wakes the others by their named pipes; each then writes its file.
"""

import hashlib
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec

from .private_folder import PrivateFolder
from .snapshot import Snapshot, fold

# The environment variable that gives workers the folder of their snapshots; empty if there is none.
GROUP: Final = "TRIO_GATEWAY_GROUP"
_PREFIX: Final = "trio-gateway-stats-"
_SUFFIX: Final = ".json"
_PIPE: Final = ".pipe"
_ENDED: Final = "gone.json"
_TRIES: Final = 5
ABANDONED: Final = 3600.0  # seconds without a sign of life of any of its workers


class _Ended(msgspec.Struct):
    """The sum over workers that have ended, and the names of their files that may still exist."""

    snapshot: Snapshot = msgspec.field(name="sample")
    folded: list[str]


class WorkerSnapshots:
    """The snapshots of several workers, shared through files in a private folder.

    Each worker writes its own when another one asks, and before it reports a sum: a number that was
    reported is in a file. The counters of a worker that has ended are kept, so that sums never go
    down: the supervisor folds its file into one file for all ended workers. What a killed worker
    counted after the last request is lost. ``supervised`` says that the supervisor removes the
    folder; the last worker removes it if the supervisor was killed.
    """

    def __init__(self, folder: Path, *, supervised: bool = False) -> None:
        self._folder = PrivateFolder(folder)
        name = f"{os.getpid()}-{secrets.token_hex(4)}"  # process ids are reused
        self._own, self._pipe = name + _SUFFIX, name + _PIPE
        self._supervisor = os.getppid() if supervised else None

    @classmethod
    def of_this_process(cls) -> "WorkerSnapshots | None":
        """The snapshots that this process shares with its siblings; None if it has no siblings or
        no folder to share.

        Raises :exc:`OSError` if there is no folder for temporary files.
        """
        if (group := os.environ.get(GROUP)) is not None:  # a worker of ``serve``
            return cls(Path(group), supervised=True) if group else None
        if multiprocessing.parent_process() is None:
            return None
        # A secret that the workers of one Hypercorn master have in common.
        common = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
        return cls(Path(tempfile.gettempdir()) / f"{_PREFIX}{common}")

    def clean_up(self) -> None:
        """Remove the folders of supervisors that were killed with all their workers."""
        for path in self._folder.path.parent.glob(f"{_PREFIX}*"):
            try:
                if path.lstat().st_mtime < time.time() - ABANDONED:
                    PrivateFolder(path).remove_all(_SUFFIX, _PIPE)
            except OSError:
                pass  # removed by another process, or not a folder of ours

    def listen(self) -> int:
        """Return the descriptor of a pipe that becomes readable when another worker asks for a
        snapshot. Raises :exc:`OSError`.
        """
        return self._folder.make_pipe(self._pipe)

    def touch(self) -> None:
        """Show that this worker lives, so that :meth:`clean_up` keeps the folder. Raises
        :exc:`OSError`.
        """
        self._folder.touch(self._pipe)

    def ask(self) -> Callable[[], bool]:
        """Ask the other workers for their snapshots. What it returns tells whether each of those
        that can be asked has written one since.
        """
        asked: dict[str, int | None] = {}
        with suppress(OSError):
            for name in self._folder.names():
                if name.endswith(_PIPE) and name != self._pipe:
                    file = name.removesuffix(_PIPE) + _SUFFIX
                    before = self._version(file)
                    with suppress(OSError):  # it has ended
                        self._folder.wake(name)
                        asked[file] = before
        return lambda: all(self._version(file) != before for file, before in asked.items())

    def write(self, snapshot: Snapshot) -> None:
        """Write the snapshot of this worker. Raises :exc:`OSError`."""
        self._folder.write(self._own, msgspec.json.encode(snapshot))

    def read(self) -> list[Snapshot]:
        """The last snapshots of the other workers, and the sum over those that have ended."""
        found: list[Snapshot] = []
        for _ in range(_TRIES):
            ended, version = self._read_ended()
            found = list(self._read_others(ended))
            try:
                if version == self._folder.version(_ENDED):
                    break  # else a worker was folded meanwhile
            except OSError:
                break  # no worker has been folded yet
        return found

    def fold(self, pid: int) -> None:
        """Add the counters of a worker that has ended to the sum, and remove its file.

        Only the supervisor does this. Raises :exc:`OSError`.
        """
        ended, _ = self._read_ended()
        names = self._folder.names()
        pipes = [n for n in names if n.endswith(_PIPE) and n.partition("-")[0] == str(pid)]
        files = [n for n in names if n != _ENDED and _pid(n) == pid and n not in ended.folded]
        snapshots = [snapshot for name in files if (snapshot := self._read(name)) is not None]
        if snapshots:
            # The names tell readers that these files are in the sum, until they are removed.
            folded = [name for name in ended.folded if name in names] + files
            ended = _Ended(fold([ended.snapshot, *snapshots]), folded)
            self._folder.write(_ENDED, msgspec.json.encode(ended))
        for name in files + pipes:
            self._folder.remove(name)

    def leave(self, snapshot: Snapshot) -> None:
        """Write this worker's last snapshot. The last worker removes an unsupervised folder."""
        snapshot.ended = True
        try:
            self.write(snapshot)
            self._folder.remove(self._pipe)
            kept = self._supervisor is not None and self._supervisor == os.getppid()
            if not kept and all(other.ended for other in self.read()):
                self.remove()
        except OSError:
            pass  # the folder was removed with the last worker

    def remove(self) -> None:
        """Remove the folder with all snapshots. Raises :exc:`OSError`."""
        self._folder.remove_all(_SUFFIX, _PIPE)

    def _read_others(self, ended: _Ended) -> Iterator[Snapshot]:
        yield ended.snapshot
        try:
            names = self._folder.names()
        except OSError:
            return
        for name in names:
            if name in {self._own, _ENDED, *ended.folded} or (pid := _pid(name)) is None:
                continue
            if (snapshot := self._read(name)) is not None:
                snapshot.ended = snapshot.ended or not _is_alive(pid)
                yield snapshot

    def _version(self, name: str) -> int | None:
        try:
            return self._folder.version(name)
        except OSError:
            return None

    def _read_ended(self) -> tuple[_Ended, int | None]:
        with suppress(OSError, msgspec.DecodeError):
            data, version = self._folder.read(_ENDED)
            return msgspec.json.decode(data, type=_Ended), version
        return _Ended(fold([]), []), None

    def _read(self, name: str) -> Snapshot | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._folder.read(name)[0], type=Snapshot)
        return None


def open_group() -> Path:
    """Make a folder for the snapshots of a supervisor's workers, and write one file to it.

    Raises :exc:`OSError`.
    """
    try:
        return _make_folder(None)
    except OSError:
        # In containers this may be the only place that is not read-only.
        return _make_folder("/dev/shm")  # noqa: S108 - the folder is private


def _make_folder(place: str | None) -> Path:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    folder = PrivateFolder(path)
    try:
        folder.write(_ENDED, msgspec.json.encode(_Ended(fold([]), [])))
    except OSError:
        with suppress(OSError):
            folder.remove_all(_SUFFIX)
        raise
    return path


def _pid(name: str) -> int | None:
    """The process id of the worker whose file this is; None for any other file."""
    pid, dash, _ = name.partition("-")
    return int(pid) if dash and name.endswith(_SUFFIX) and pid.isdecimal() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
