"""Where a running demo is: a private file in its temporary folder, which ``tail`` looks for."""

import json
import os
import stat
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

FOLDER: Final = "trio-gateway-demo-"  # what the names of the demos' temporary folders start with
_NAME: Final = "demo.json"
_MOST: Final = 10_000  # bytes


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
    """Write the file, readable by its owner only; it goes when the folder does."""
    path = os.path.join(folder, _NAME)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        json.dump(asdict(demo), file)


def find() -> RunningDemo | None:
    """The demo of this user that started last and still runs."""
    found = [_read(path) for path in Path(tempfile.gettempdir()).glob(f"{FOLDER}*/{_NAME}")]
    alive = [each for each in found if each is not None and each[1].alive]
    return max(alive, key=lambda each: each[0])[1] if alive else None


def _read(path: Path) -> tuple[float, RunningDemo] | None:
    """When it was written, and what it says; None if it is not a private file of this user.

    Everybody can put files into a shared temporary folder, so neither a link nor a pipe nor the
    file of somebody else is read.
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
            return status.st_mtime, RunningDemo(**json.loads(file.read(_MOST)))
        except (TypeError, ValueError):
            return None
