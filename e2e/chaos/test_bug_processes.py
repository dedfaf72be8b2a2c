"""Bugs, in processes: each command ends with a true status, or says why it can't."""

import json
import random
import signal
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    admitted,
    closed,
    environment,
    free_port,
    process,
    until,
    wait,
)
from trio_gateway.core.close_codes import Close
from trio_gateway.testing import make_jwt

from . import faults
from .tasks import CHILD, GATEWAY, SERVE, SUPERVISED, SUPERVISOR, WORKER, write_routes

pytestmark = pytest.mark.chaos

SOON: Final = 8.0  # seconds from the bug to the end of the process, its clients' closes included
SERVES: Final = ("trio_gateway", "serve")
HYPERCORN: Final = ("hypercorn", "-k", "trio", "trio_gateway.app:app")


@dataclass
class Buggy:
    """A command that will have a bug."""

    started: "subprocess.Popen[bytes]"
    port: int
    folder: Path
    log: list[dict[str, Any]] = field(default_factory=list)
    errors: str = ""
    seconds: float = 0.0  # from the bug to its end

    @property
    def url(self) -> str:
        token = make_jwt(JWT_SECRET, sub=str(random.randrange(1, 10**6)))
        return f"ws://127.0.0.1:{self.port}/ws/waiter?token={token}"

    def strike(self) -> None:
        """Let the bug come now, in one process that has the task."""
        (self.folder / "now").touch()
        self.seconds = -time.monotonic()

    async def struck(self) -> None:
        await until(lambda: not (self.folder / "now").exists())

    async def status(self) -> int:
        """Its exit status; what it logged is known from now on."""
        status, _, errors = await wait(self.started, SOON)
        if self.seconds:
            self.seconds += time.monotonic()
            print(f"ended {self.seconds:.2f} s after the bug with status {status}")
        self.errors = errors.decode()
        lines = [line for line in errors.splitlines() if line.startswith(b"{")]
        self.log = [json.loads(line) for line in lines]
        return status

    def worker_statuses(self) -> list[int]:
        """The exit statuses of the workers that Hypercorn's master received."""
        return [int(line) for line in (self.folder / "statuses").read_text().split()]

    def assert_loud(self) -> None:
        """The one critical line names the bug."""
        (said,) = [line for line in self.log if line.get("level") == "critical"]
        assert said["event"] == "stopped by a bug"
        assert "Injected: this task has a bug" in said["exception"]


@asynccontextmanager
async def buggy(
    redis_url: str, folder: Path, task: str, *arguments: str, at_once: bool = False
) -> AsyncIterator[Buggy]:
    port = free_port()
    env = environment(
        redis_url,
        CHAOS_TASK=task,
        CHAOS_NOW=str(folder / "now"),
        CHAOS_STATUS=str(folder / "statuses"),
        PYTHONPATH=faults.PYTHONPATH,
        REDIS_DLQ_STREAM="events:dlq",
        REDIS_STREAM_SHARDS="2",
        WS_ROUTES_FILE=str(write_routes(folder)),
        DATABASE_URL=f"sqlite:///{folder}/restaurant.db",
        WS_OPERATIONS_BIND=f"127.0.0.1:{free_port()}",
    )
    if at_once:
        (folder / "now").touch()
    arguments = (*arguments, "-b", f"127.0.0.1:{port}")
    async with process(*arguments, env=env, port=port, cwd=folder) as started:
        yield Buggy(started, port, folder)


async def is_served(client: WebSocketConnection) -> bool:
    if client.closed:
        return False
    await client.send_message("ping")
    with trio.fail_after(5):
        return bool(await client.get_message() == '{"type":"pong"}')


# One process


@pytest.mark.parametrize("task", [*GATEWAY, *SERVE])
async def test_serve_closes_its_clients_and_ends_with_status_1(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    async with buggy(redis_url, tmp_path, task, *SERVES) as gateway:
        async with admitted(gateway.url) as client:
            gateway.strike()
            assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        assert await gateway.status() == 1
        gateway.assert_loud()
        assert gateway.seconds < SOON


@pytest.mark.parametrize("task", ["Batches.run#1", "PubSub.run", "Streams.run"])
async def test_hypercorn_without_workers_ends_with_status_1(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    async with buggy(redis_url, tmp_path, task, *HYPERCORN, "-w", "0") as gateway:
        async with admitted(gateway.url) as client:
            gateway.strike()
            assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        assert await gateway.status() == 1
        gateway.assert_loud()


# Hypercorn's master


@pytest.mark.parametrize("task", [*GATEWAY, *CHILD, *WORKER])
async def test_hypercorn_ends_when_its_worker_ends_with_status_1(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    async with buggy(redis_url, tmp_path, task, *HYPERCORN) as gateway:
        async with admitted(gateway.url) as client:
            gateway.strike()
            assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        assert await gateway.status() == 0  # it does not use the status of its worker
        assert gateway.worker_statuses() == [1]
        gateway.assert_loud()


@pytest.mark.parametrize("task", ["PubSub.run", *CHILD, *WORKER])
async def test_hypercorn_ends_the_other_worker_too_and_both_close_their_clients(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    arguments = (*HYPERCORN, "-w", "2")
    async with buggy(redis_url, tmp_path, task, *arguments) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(admitted(gateway.url)) for _ in range(16)]
        gateway.strike()
        for client in clients:
            assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        assert await gateway.status() == 0
        assert 1 in gateway.worker_statuses()
        gateway.assert_loud()


# Our supervisor


@pytest.mark.parametrize("task", ["Batches.run#1", "PubSub.run", *WORKER, *SERVE])
async def test_supervisor_restarts_a_worker_with_a_bug_and_the_other_goes_on(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    arguments = (*SERVES, "-w", "2")
    async with buggy(redis_url, tmp_path, task, *arguments) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(admitted(gateway.url)) for _ in range(16)]
        gateway.strike()
        await gateway.struck()
        await trio.sleep(2)  # drained, ended, restarted
        served = [client for client in clients if await is_served(client)]
        for client in clients:
            if client not in served:
                assert (await closed(client))[0] == Close.GOING_AWAY
        for _ in range(8):
            async with admitted(gateway.url):
                pass
        gateway.started.send_signal(signal.SIGTERM)
        assert await gateway.status() == 0
        (died,) = [line for line in gateway.log if line["event"] == "worker died"]
        assert (died["status"], died["level"]) == (1, "error")
        assert sum(line["event"] == "worker started" for line in gateway.log) == 3
        assert len(served) < len(clients)
        gateway.assert_loud()


@pytest.mark.parametrize("task", SUPERVISED)
async def test_supervisor_restarts_a_worker_that_fails_while_it_starts(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    arguments = (*SERVES, "-w", "2")
    async with buggy(redis_url, tmp_path, task, *arguments, at_once=True) as gateway:
        await gateway.struck()
        await trio.sleep(2)
        for _ in range(8):
            async with admitted(gateway.url):
                pass
        gateway.started.send_signal(signal.SIGTERM)
        assert await gateway.status() == 0
        assert [line["status"] for line in gateway.log if line["event"] == "worker died"] == [1]
        gateway.assert_loud()


@pytest.mark.parametrize("task", SUPERVISOR)
async def test_supervisor_with_a_bug_ends_with_status_1_and_its_workers_drain(
    redis_url: str, tmp_path: Path, task: str
) -> None:
    arguments = (*SERVES, "-w", "2")
    async with buggy(redis_url, tmp_path, task, *arguments) as gateway, AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(admitted(gateway.url)) for _ in range(8)]
        gateway.strike()
        match task:
            case "Supervisor._roll" | "Supervisor._read_report":  # of a worker that starts
                gateway.started.send_signal(signal.SIGHUP)
            case "Supervisor._kill_after_timeout":
                gateway.started.send_signal(signal.SIGTERM)
        for client in clients:
            assert (await closed(client, SOON))[0] == Close.GOING_AWAY
        assert await gateway.status() == 1
        assert "Injected: this task has a bug" in gateway.errors
