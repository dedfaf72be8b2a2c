"""The file of a running demo, private, in its temporary folder. ``tail`` finds the demo by it."""

import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = "trio-gateway-demo-"  # the prefix of the demos' temporary folders
_NAME: Final = "demo.json"
_MAX_BYTES: Final = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningDemo:
    """The address of a demo's gateway and the secrets that it signs tokens with."""

    pid: int
    url: str
    jwt_secret: str
    table_token_secret: str

    @property
    def alive(self) -> bool:
        try:
            os.kill(self.pid, 0)
        except OSError:
            return False
        return True


def write(folder: str, demo: RunningDemo) -> None:
    """Write the file, readable only by its owner. It is removed with the folder."""
    path = os.path.join(folder, _NAME)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(demo), file)


def find() -> RunningDemo | None:
    """Return the newest demo of this user that still runs, or None."""
    found = [_read(path) for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{_NAME}")]
    alive = [each for each in found if each is not None and each[1].alive]
    return max(alive, key=lambda each: each[0])[1] if alive else None


def _read(path: Path) -> tuple[float, RunningDemo] | None:
    """Read a file: its time and content, or None if it is not a private file of this user.

    Other users can put files into the temporary folder, so links, pipes and their files are not
    read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError:
        return None
    with open(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        private = stat.S_ISREG(status.st_mode) and not status.st_mode & 0o077
        if not private or status.st_uid != os.getuid():
            return None
        try:
            return status.st_mtime, RunningDemo(**json.loads(file.read(_MAX_BYTES)))
        except (TypeError, ValueError):
            return None
