"""Logs without a reader: the gateway continues to serve, and its exit status is right."""

import os
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Final

import pytest
import trio
from websockets.exceptions import ConnectionClosed
from websockets.trio.client import connect

from tests.support.gateways import (
    Reachable,
    environment,
    free_port,
    http,
    metrics,
    process,
    until,
    wait,
)
from tests.support.stopwatch import Stopwatch
from trio_gateway.core.close_codes import Close
from trio_gateway.testing import make_jwt

SERVE: Final = ("trio_gateway", "serve")
STOCK: Final = ("hypercorn", "-k", "trio", "trio_gateway.app:app")
COMMANDS: Final = {
    "serve": SERVE,
    "two workers": (*SERVE, "-w", "2"),
    "stock": (*STOCK, "-w", "0", "--access-logfile", "/dev/stdout"),
    "stock with a worker": (*STOCK, "-w", "1"),
}


@contextmanager
def unread(how: str) -> Iterator[int]:
    """Options of a process whose log is not read."""
    read, write = os.pipe()
    try:
        if how == "full disk":
            full = os.open("/dev/full", os.O_WRONLY)
            os.dup2(full, write)
            os.close(full)
        elif how == "reader gone":
            os.close(read)
        else:
            os.set_blocking(write, False)
            with suppress(BlockingIOError):
                while True:
                    os.write(write, b"x" * 4096)
            os.set_blocking(write, True)
        yield write
    finally:
        for fd in (read, write):
            with suppress(OSError):
                os.close(fd)


@asynccontextmanager
async def served(
    command: tuple[str, ...], redis_url: str, folder: Path, log: int, **settings: str
) -> AsyncIterator[tuple[Reachable, "subprocess.Popen[bytes]"]]:
    port = free_port()
    words = (*command, "-b", f"127.0.0.1:{port}")
    env = environment(redis_url, WS_MAX_CONNECTIONS_PER_USER="100", **settings)
    async with process(*words, env=env, port=port, cwd=folder, stdout=log, stderr=log) as started:
        gateway = Reachable(port)

        async def ready() -> bool:
            try:
                return (await http(port, "/ws/health/ready")).status == 200
            except (OSError, trio.BrokenResourceError, trio.TooSlowError):
                # The stock command and the supervisor listen before they serve.
                return False

        await until(ready, 30)
        yield gateway, started


@pytest.mark.parametrize(
    ("command", "how"),
    [
        pytest.param("serve", "reader gone", marks=pytest.mark.chaos),
        ("two workers", "reader stalls"),
        pytest.param("stock", "reader stalls", marks=pytest.mark.chaos),
        ("stock with a worker", "full disk"),
    ],
)
async def test_unread_log_changes_no_answer_and_no_exit_status(
    redis_url: str, tmp_path: Path, command: str, how: str
) -> None:
    bad = make_jwt("another secret of thirty-two bytes")
    with unread(how) as log:
        async with served(COMMANDS[command], redis_url, tmp_path, log) as (gateway, started):
            async with connect(
                gateway.staff_url("waiter"), proxy=None, compression=None, ping_interval=None
            ) as client:
                for _ in range(3):
                    answer = await http(gateway.port, f"/ws/waiter/events?token={bad}")
                    assert answer.status == 401
                for _ in range(20):  # each writes a line to the log
                    async with connect(gateway.staff_url("kitchen"), proxy=None):
                        pass
                await client.send("ping")
                with trio.fail_after(2):
                    assert await client.recv() == '{"type":"pong"}'
                assert (await http(gateway.port, "/ws/health")).status == 200
                if how != "reader stalls":
                    figures = await metrics(gateway.port)
                    assert figures["log_lines_dropped_total"] > 0
                watch = Stopwatch()
                started.send_signal(signal.SIGTERM)
                with trio.fail_after(5), pytest.raises(ConnectionClosed) as closed:
                    await client.recv()
                assert closed.value.rcvd is not None
                assert closed.value.rcvd.code == Close.GOING_AWAY
            status, _, _ = await wait(started)
            assert status == 0
            assert watch.net < 5


_BROKEN = """
import trio
import trio_gateway.gateway

async def reap(*args, **kwargs):
    await trio.sleep(0.5)
    raise ZeroDivisionError("the reaper has a bug")

trio_gateway.gateway.reap = reap
"""


@pytest.mark.parametrize(
    ("command", "how"),
    [
        ("serve", "reader gone"),
        pytest.param("stock", "reader stalls", marks=pytest.mark.chaos),
    ],
)
async def test_bug_ends_the_process_although_its_log_is_unread(
    redis_url: str, tmp_path: Path, command: str, how: str
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_BROKEN)
    with unread(how) as log:
        async with served(
            COMMANDS[command], redis_url, tmp_path, log, PYTHONPATH=str(tmp_path)
        ) as (_, started):
            status, _, _ = await wait(started)
            assert status == 1


@pytest.mark.parametrize(("command", "how"), [
    pytest.param("serve", "full disk", marks=pytest.mark.chaos),
    ("stock", "reader stalls"),
])  # fmt: skip
async def test_invalid_settings_are_status_2_although_the_message_is_unread(
    redis_url: str, tmp_path: Path, command: str, how: str
) -> None:
    words = (*COMMANDS[command], "-b", f"127.0.0.1:{free_port()}")
    env = environment(redis_url, WS_PING_INTERVAL="often")
    with unread(how) as log:
        async with process(*words, env=env, cwd=tmp_path, stdout=log, stderr=log) as started:
            status, _, _ = await wait(started)
    assert status == 2
