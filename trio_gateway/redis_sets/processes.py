"""Servers that end with the process that started them, however that ends."""

import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

# All are in one process group, led by a shell that reads a pipe of ours. At its end, also when this
# process was killed, the shell kills the group with itself. (PR_SET_PDEATHSIG would look simpler,
# but it acts when the *thread* ends that started a server.) A group without a parent gets SIGHUP if
# one of it is frozen.
_WATCH: Final = 'trap "" HUP INT TERM; read -r _; rm -rf -- "$1"; kill -KILL 0'


class ServerGroup:
    """The servers of a set, and the private folder with their data."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._started: list[subprocess.Popen[bytes]] = []
        self._watch = subprocess.Popen(  # noqa: S603 - a fixed command
            ["/bin/sh", "-c", _WATCH, "sh", str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            process_group=0,  # so that Ctrl-C in a terminal does not reach them
        )

    @property
    def id(self) -> int:
        """The process group, for what is started in another way: it ends at the latest with us."""
        return self._watch.pid

    def start(self, command: list[str], folder: Path) -> "subprocess.Popen[bytes]":
        """Start a server in ``folder``; its output is added to the file ``log`` there."""
        with (folder / "log").open("ab") as log:
            process = subprocess.Popen(  # noqa: S603 - our own binary and file
                command,
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                process_group=self._watch.pid,
            )
        self._started.append(process)
        return process

    def end(self) -> None:
        """Kill all of them, frozen or not, and wait for their end."""
        assert self._watch.stdin is not None
        self._watch.stdin.close()
        for process in (self._watch, *self._started):
            process.wait()


@contextmanager
def server_group() -> Iterator[ServerGroup]:
    """Make a group with an empty folder; at the end neither is left."""
    folder = Path(tempfile.mkdtemp(prefix="trio-gateway-redis-"))  # readable only by its owner
    try:
        group = ServerGroup(folder)
        try:
            yield group
        finally:
            group.end()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
