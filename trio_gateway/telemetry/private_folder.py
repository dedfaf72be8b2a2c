"""A folder that only this user can access, in a folder such as ``/tmp`` that is shared."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

_DRAFT: Final = ".draft"


class PrivateFolder:
    """Reads and writes files in a private folder.

    Symbolic links are not followed, neither to the folder nor inside it. A folder of another user,
    or one that others can access, is refused.

    All methods raise :exc:`OSError`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, data: bytes) -> None:
        """Write a file atomically; create the folder if it does not exist."""
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        with self._opened() as folder:
            draft = name + _DRAFT
            flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
            with open(os.open(draft, flags, 0o600, dir_fd=folder), "wb") as file:
                file.write(data)
            os.replace(draft, name, src_dir_fd=folder, dst_dir_fd=folder)

    def make_pipe(self, name: str) -> int:
        """Make a named pipe, and the folder if it does not exist; return the descriptor to read
        it, which does not block.
        """
        with suppress(FileExistsError):
            self.path.mkdir(mode=0o700)
        with self._opened() as folder:
            with suppress(FileExistsError):
                os.mkfifo(self.path / name, 0o600)
            # For writing, too: so it never comes to its end.
            return os.open(name, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)

    def wake(self, name: str) -> None:
        """Write a byte to a named pipe, unless it is full. Fails if nobody reads it."""
        with self._opened() as folder:
            pipe = os.open(name, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=folder)
            try:
                if not stat.S_ISFIFO(os.fstat(pipe).st_mode):
                    raise OSError(errno.EINVAL, "not a named pipe")
                with suppress(BlockingIOError):
                    os.write(pipe, b".")
            finally:
                os.close(pipe)

    def touch(self, name: str) -> None:
        """Set the times of a file, and of the folder, to now."""
        with self._opened() as folder:
            os.utime(name, dir_fd=folder, follow_symlinks=False)
            os.utime(folder)

    def read(self, name: str) -> tuple[bytes, int]:
        """Return the content of a file, and a number that changes with each :meth:`write` to it."""
        with self._opened() as folder:
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
            with open(os.open(name, flags, dir_fd=folder), "rb") as file:
                return file.read(), _version(os.fstat(file.fileno()))

    def version(self, name: str) -> int:
        """Return the number that :meth:`read` would return."""
        with self._opened() as folder:
            return _version(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def names(self) -> list[str]:
        """Return the names of the files, including those of unfinished writes."""
        with self._opened() as folder:
            return sorted({name.removesuffix(_DRAFT) for name in os.listdir(folder)})

    def remove(self, name: str) -> None:
        """Remove a file, and the draft of an unfinished :meth:`write` of it."""
        with self._opened() as folder:
            for each in (name, name + _DRAFT):
                with suppress(FileNotFoundError):
                    os.unlink(each, dir_fd=folder)

    def remove_all(self, *suffixes: str) -> None:
        """Remove the folder and its files with these suffixes. A folder with others stays."""
        with self._opened() as folder:
            for name in os.listdir(folder):
                if name.endswith((*suffixes, _DRAFT)):
                    with suppress(FileNotFoundError):
                        os.unlink(name, dir_fd=folder)
        self.path.rmdir()

    @contextmanager
    def _opened(self) -> Iterator[int]:
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            status = os.fstat(folder)
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
                raise PermissionError(errno.EPERM, "not a private folder of this user")
            yield folder
        finally:
            os.close(folder)


def _version(status: os.stat_result) -> int:
    return hash((status.st_ino, status.st_mtime_ns, status.st_size))
