"""The gateway of the demo, as a process, and its database."""

import os
import socket
import subprocess
import sys
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from . import demo_file
from .credentials import Identity, staff_token, table_token
from .errors import Failure

if TYPE_CHECKING:
    import trio

_READY_TIMEOUT: Final = 15.0  # seconds for the gateway to start
_TERMINATE_TIMEOUT: Final = 2.0  # seconds for the gateway to end after SIGTERM
_LOG_LINES: Final = 15  # of the gateway, that an error shows
TOKEN_LIFE: Final = 3 * 3600  # seconds, of the tokens
_SECTORS: Final = ((5, 21), (6, 22))  # and the waiter of each
_TABLE: Final = """
    CREATE TABLE waiter_sector_assignment (
        id INTEGER PRIMARY KEY, tenant_id BIGINT, branch_id BIGINT, sector_id BIGINT,
        waiter_id BIGINT, assignment_date DATE, shift TEXT, is_active BOOLEAN
    )
"""

# The roles that connect: a title and the holder of the token.
ROLES: Final = {
    "waiter": (
        "waiter of sector 5",
        Identity(user=21, roles=("WAITER",), life=TOKEN_LIFE),
    ),
    "kitchen": ("kitchen", Identity(user=31, roles=("KITCHEN",), life=TOKEN_LIFE)),
    "admin": ("admin", Identity(user=3, roles=("ADMIN",), life=TOKEN_LIFE)),
    "diner": ("diner of session 456", Identity(table=10, session=456, life=TOKEN_LIFE)),
}


@dataclass(frozen=True, slots=True)
class DemoGateway:
    """The addresses, secrets and files of the demo's gateway, and its number of processes."""

    redis_url: str
    database_url: str
    port: int
    staff_secret: str
    table_secret: str
    routes_file: str
    workers: int = 1

    @property
    def url(self) -> str:
        """The gateway's WebSocket URL, without an endpoint."""
        return f"ws://127.0.0.1:{self.port}"

    @property
    def running(self) -> demo_file.RunningDemo:
        """What ``tail`` needs to connect."""
        return demo_file.RunningDemo(
            pid=os.getpid(),
            url=self.url,
            jwt_secret=self.staff_secret,
            table_token_secret=self.table_secret,
        )

    def token(self, role: str) -> str:
        """Mint a token for a role."""
        _, identity = ROLES[role]
        if role == "diner":
            return table_token(self.table_secret, identity)
        return staff_token(self.staff_secret, identity)

    def environment(self) -> dict[str, str]:
        """The environment of the gateway, without the user's own settings of a gateway."""
        from ..settings import NAMES

        others = {
            name: value
            for name, value in os.environ.items()
            if name.upper() not in NAMES and not name.upper().startswith("WS_")
        }
        return others | {
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            "JWT_SECRET": self.staff_secret,
            "TABLE_TOKEN_SECRET": self.table_secret,
            "LOG_LEVEL": "warning",
            "LOG_FORMAT": "console",
            "WS_ROUTES_FILE": self.routes_file,
            "WS_CLUSTER": "true",  # for the console
            "WS_CONSOLE_TOKENS": "true",
            "WS_MAX_CONNECTIONS_PER_USER": "100",  # a person may open many terminals as one user
        }


def make_database(folder: str) -> str:
    """Make the backend's database, in SQLite: for a week, waiter 21 serves sector 5, and waiter 22
    sector 6.

    Returns its URL.
    """
    import sqlite3
    from contextlib import closing
    from datetime import UTC, datetime, timedelta

    path = os.path.join(folder, "backend.db")
    today = datetime.now(UTC).date()
    days = [today + timedelta(days=n) for n in range(-1, 8)]  # a service day begins at five
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(_TABLE)
        connection.executemany(
            "INSERT INTO waiter_sector_assignment VALUES (NULL, 1, 1, ?, ?, ?, NULL, TRUE)",
            [(sector, user, day.isoformat()) for sector, user in _SECTORS for day in days],
        )
    return f"sqlite:///{path}"


def write_routes(folder: str, text: str) -> str:
    """Write the gateway's routes file, and return its path."""
    path = os.path.join(folder, "routes.toml")
    with open(path, "w") as file:
        file.write(text)
    return path


@asynccontextmanager
async def running_gateway(gateway: DemoGateway, folder: str) -> AsyncIterator[None]:
    """Start a gateway process and wait until it is ready.

    Raises :exc:`Failure` with the end of its log if the process ends before the block.
    """
    import trio

    from ..redis_sets.processes import server_group

    command = [sys.executable, "-m", "trio_gateway", "serve", "-b", f"127.0.0.1:{gateway.port}"]
    if gateway.workers > 1:
        command += ["--workers", str(gateway.workers)]
    with server_group() as group:  # it ends with us, also if we are killed, and not by Ctrl-C
        process = await trio.lowlevel.open_process(
            command,
            env=gateway.environment(),
            cwd=folder,  # no .env, no hypercorn.toml
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            process_group=group.id,
        )
        async with _watched(process):
            await _wait_ready(gateway.port)
            yield


@asynccontextmanager
async def _watched(process: "trio.Process") -> AsyncIterator[None]:
    """End the process at the end; raise :exc:`Failure` if it ends before."""
    import trio

    log: deque[str] = deque(maxlen=_LOG_LINES)
    ending = False

    async def read_log() -> None:
        assert process.stderr is not None
        rest = b""
        async for data in process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            log.extend(line.decode(errors="replace") for line in lines)
        status = await process.wait()
        if not ending:
            text = "\n".join(log) or "(nothing)"
            raise Failure(f"the gateway ended with status {status}. The end of its log:\n{text}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read_log)
        try:
            yield
        finally:
            ending = True
            with trio.CancelScope(shield=True):  # bounded
                await _end(process)
        nursery.cancel_scope.cancel()


async def _end(process: "trio.Process") -> None:
    import trio

    if process.poll() is None:
        process.terminate()
        with trio.move_on_after(_TERMINATE_TIMEOUT):
            await process.wait()
    if process.poll() is None:
        process.kill()
        await process.wait()


async def _wait_ready(port: int) -> None:
    import trio

    with trio.move_on_after(_READY_TIMEOUT):
        while True:
            if await is_ready(port):
                return
            await trio.sleep(0.05)
    raise Failure(f"the gateway is not ready after {_READY_TIMEOUT:g} s")


async def is_ready(port: int) -> bool:
    """Whether the gateway on this port says that it is ready."""
    import trio

    request = b"GET /ws/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request)
            return (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200")
    except (OSError, trio.BrokenResourceError):
        return False


def is_free(port: int) -> bool:
    """Whether this process can listen on a port."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True
