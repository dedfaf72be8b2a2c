"""Worker snapshots: files through which the workers of one supervisor share their metrics."""

import hashlib
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Iterator
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
_ENDED: Final = "gone.json"
_TRIES: Final = 5
_ABANDONED: Final = 3600.0  # seconds without a write by any of its workers


class _Ended(msgspec.Struct):
    """The sum over workers that have ended, and the names of their files that may still exist."""

    snapshot: Snapshot = msgspec.field(name="sample")
    folded: list[str]


class WorkerSnapshots:
    """The snapshots of several workers, shared through files in a private folder.

    Each worker writes its own four times a second, and before it reports a sum. The counters of a
    worker that has ended are kept, so that sums never go down: the supervisor folds its file into
    one file for all ended workers. ``supervised`` says that the supervisor removes the folder;
    the last worker removes it if the supervisor was killed.
    """

    def __init__(self, folder: Path, *, supervised: bool = False) -> None:
        self._folder = PrivateFolder(folder)
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"  # process ids are reused
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
                if path.lstat().st_mtime < time.time() - _ABANDONED:
                    PrivateFolder(path).remove_all(_SUFFIX)
            except OSError:
                pass  # removed by another process, or not a folder of ours

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
        files = [n for n in names if n != _ENDED and _pid(n) == pid and n not in ended.folded]
        snapshots = [snapshot for name in files if (snapshot := self._read(name)) is not None]
        if snapshots:
            # The names tell readers that these files are in the sum, until they are removed.
            folded = [name for name in ended.folded if name in names] + files
            ended = _Ended(fold([ended.snapshot, *snapshots]), folded)
            self._folder.write(_ENDED, msgspec.json.encode(ended))
        for name in files:
            self._folder.remove(name)

    def leave(self, snapshot: Snapshot) -> None:
        """Write this worker's last snapshot. The last worker removes an unsupervised folder."""
        snapshot.ended = True
        try:
            self.write(snapshot)
            kept = self._supervisor is not None and self._supervisor == os.getppid()
            if not kept and all(other.ended for other in self.read()):
                self.remove()
        except OSError:
            pass  # the folder was removed with the last worker

    def remove(self) -> None:
        """Remove the folder with all snapshots. Raises :exc:`OSError`."""
        self._folder.remove_all(_SUFFIX)

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
