"""``trio-gateway serve`` in a process that a test may kill and start again on the same port."""

import subprocess
import sys
import time
from pathlib import Path

import trio

from .gateways import accepts, environment, free_port


class GatewayProcess:
    """A gateway process; its log goes to a file in the folder.

    ``{port}`` in a setting stands for its own port.
    """

    def __init__(self, redis_url: str, folder: Path, *arguments: str, **settings: str) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"{self.port}.log"
        self.siblings: list[GatewayProcess] = []  # other processes that serve the same clients
        self._arguments = arguments
        own = {name: text.replace("{port}", str(self.port)) for name, text in settings.items()}
        self._env = environment(redis_url, **own)
        self.process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Start it, and wait until it accepts connections."""
        await trio.to_thread.run_sync(self.start_sync)

    def start_sync(self) -> None:
        """Start it, and wait until it accepts connections; for tests without Trio."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable, "-m", "trio_gateway", "serve",
                    "--bind", f"127.0.0.1:{self.port}", *self._arguments,
                ],
                env=self._env,
                stdout=log,
                stderr=log,
            )  # fmt: skip
        deadline = time.monotonic() + 60  # a loaded machine starts slowly
        while not accepts(self.port):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, "it does not accept connections"
            time.sleep(0.01)

    def kill(self) -> None:
        """Kill it, if it was started."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()

    async def stop(self) -> int:
        """Terminate it, as a deploy does; returns its exit status."""
        assert self.process is not None
        self.process.terminate()
        with trio.fail_after(20):
            while (status := self.process.poll()) is None:
                await trio.sleep(0.01)
        return status
