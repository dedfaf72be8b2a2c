"""``serve`` with several workers: one listener, independent restarts; tests share two workers."""

import operator
import os
import random
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

import h11
import pytest
import redis
import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    accepts,
    closed,
    connect,
    environment,
    free_port,
    http,
    metrics,
    until,
)
from tests.support.supervisors import START, Master, is_python, is_served, replaced, until_ready
from trio_gateway.testing import make_jwt, make_table_token

MAX_TOTAL = 8  # connections of one worker
EVENT = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'


@pytest.fixture(scope="module")
def supervisor(
    redis_server: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Master, Path]]:
    """Two workers that several tests use, and their folder for temporary files.

    Its .env file has the secret of staff tokens, and another secret of table tokens than the
    environment. At the end the workers stop with status 0 and leave neither a temporary file nor
    a listener.
    """
    folder = tmp_path_factory.mktemp("workers")
    write_settings(folder, JWT_SECRET)
    port, operations = free_port(), free_port()
    arguments = ["trio_gateway", "serve", "-w", "2", "-b", f"127.0.0.1:{port}"]
    env = environment(
        redis_server,
        TMPDIR=str(folder),
        WS_MAX_TOTAL_CONNECTIONS=str(MAX_TOTAL),
        WS_OPERATIONS_BIND=f"127.0.0.1:{operations}",
    )
    del env["JWT_SECRET"]  # the environment takes precedence
    log = folder / "log"
    with log.open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", *arguments],
            env=env,
            cwd=folder,
            stdout=output,
            stderr=output,
        )
    try:
        yield Master(started.pid, port, operations), folder
        started.send_signal(signal.SIGTERM)
        status = started.wait(20)
    finally:
        started.kill()
        started.wait()
    errors = log.read_text()
    assert status == 0, errors
    assert "Traceback" not in errors
    assert not list(folder.glob("trio-gateway-stats-*"))
    assert not accepts(port)
    assert not accepts(operations)


def write_settings(folder: Path, secret: str, more: str = "") -> None:
    lines = f"JWT_SECRET={secret}\nTABLE_TOKEN_SECRET={'other' * 8}\n{more}"
    (folder / ".env").write_text(lines)


@pytest.fixture
async def master(supervisor: tuple[Master, Path]) -> Master:
    """The supervisor of two workers that are ready."""
    found, _ = supervisor
    await until_ready(found, 2)
    await until(lambda: ready(found, 2), START)
    await until(lambda: empty(found), START)
    return found


async def ready(master: Master, workers: int) -> bool:
    return (await metrics(master.operations))["ready"] == workers


async def empty(master: Master) -> bool:
    return (await metrics(master.operations))["connections_total"] == 0


async def spread(master: Master, nursery: trio.Nursery, clients: int) -> list[WebSocketConnection]:
    """Admitted clients that stay connected."""
    found: list[WebSocketConnection] = []

    async def stay(user: int, task_status: trio.TaskStatus[WebSocketConnection]) -> None:
        async with connect(master.url(user)) as client:
            await client.send_message("ping")
            assert await client.get_message() == '{"type":"pong"}'
            task_status.started(client)
            await trio.sleep_forever()

    for user in random.sample(range(1, 100_000), clients):
        found.append(await nursery.start(stay, user))
    return found


@pytest.mark.slow
async def test_killed_worker_is_restarted_once_the_env_file_is_valid_and_others_are_not_affected(
    master: Master, supervisor: tuple[Master, Path]
) -> None:
    """While the .env file is invalid, the supervisor reports it and tries again."""
    _, folder = supervisor
    async with trio.open_nursery() as nursery:
        clients = await spread(master, nursery, MAX_TOTAL + 2)  # more than one worker admits
        before = master.workers

        write_settings(folder, master.secret, "WS_PING_INTERVALL=3\n")
        victim, healthy = sorted(before)
        os.kill(victim, signal.SIGKILL)
        with trio.fail_after(START):
            while master.workers != {healthy}:
                await trio.sleep(0.02)
            while not (there := master.workers - before):
                await trio.sleep(0.02)
            while there & master.workers:
                await trio.sleep(0.02)
        reported = "unknown setting: WS_PING_INTERVALL (did you mean WS_PING_INTERVAL?)"
        await until(lambda: reported in (folder / "log").read_text(), START)

        write_settings(folder, master.secret)
        with trio.fail_after(START):
            while len([pid for pid in master.workers if is_python(pid)]) < 2:
                await trio.sleep(0.05)
        assert healthy in master.workers
        alive = [client for client in clients if await is_served(client)]
        assert 0 < len(alive) < len(clients)
        nursery.cancel_scope.cancel()


@pytest.mark.slow
async def test_sighup_replaces_workers_one_by_one_with_the_new_env_file_and_clients_get_1001(
    master: Master, supervisor: tuple[Master, Path]
) -> None:
    """The new workers read the changed .env file; the environment takes precedence."""
    _, folder = supervisor
    old, new = master.secret, "new" * 16
    async with trio.open_nursery() as nursery:
        clients = await spread(master, nursery, 10)
        before = master.workers
        assert (await status_of(master, old), await status_of(master, new)) == (200, 401)

        write_settings(folder, new)
        master.secret = new
        os.kill(master.pid, signal.SIGHUP)
        for client in clients:
            code, reason = await closed(client, 30)
            assert code == 1001
            assert reason.startswith("retry in ")
        await replaced(master, before)

        assert (await status_of(master, old), await status_of(master, new)) == (401, 200)
        diner = f"ws://127.0.0.1:{master.port}/ws/diner?table_token="
        for url in (master.url(99), diner + make_table_token(TABLE_SECRET)):
            async with connect(url) as client:  # some worker always listened
                assert await is_served(client)
        nursery.cancel_scope.cancel()


async def status_of(master: Master, secret: str) -> int:
    """The status of a request for a ticket with a token of this secret."""
    bearer = {"Authorization": f"Bearer {make_jwt(secret, roles=['WAITER'])}"}
    return (await http(master.port, "/ws/ticket", method="POST", headers=bearer)).status


async def test_no_client_is_refused_while_another_worker_has_room(master: Master) -> None:
    async with trio.open_nursery() as nursery:
        await spread(master, nursery, 2 * MAX_TOTAL - 1)
        async with connect(master.url()) as last:
            assert await is_served(last)
            async with connect(master.url()) as one_more:
                assert await closed(one_more) == (1013, "too many connections")
        nursery.cancel_scope.cancel()


async def test_workers_share_the_operations_address(master: Master) -> None:
    for _ in range(6):
        for path in ("/ws/metrics", "/ws/health/detailed"):
            assert (await http(master.operations, path)).status == 200
            assert (await http(master.port, path)).status == 404


# How a request ends if its worker is killed.
OF_A_KILLED_ONE = (OSError, trio.BrokenResourceError, trio.TooSlowError, h11.RemoteProtocolError)
COUNTED = ("messages_received_total", "deliveries_total", "connections_closed_total{1006}")


async def test_no_counter_falls_when_a_worker_is_killed_and_its_file_is_removed(
    master: Master, supervisor: tuple[Master, Path], backend: "redis.Redis"
) -> None:
    """While clients connect, send messages, and disconnect without a close frame."""
    _, temporary = supervisor
    seen: list[list[float]] = []

    async def scrape() -> None:
        with suppress(*OF_A_KILLED_ONE):
            found = await metrics(master.operations)
            seen.append([found[name] for name in COUNTED])

    async def watch() -> None:
        while True:
            await scrape()
            await trio.sleep(0.02)

    def files() -> list[str]:
        return sorted(path.name for path in temporary.glob("trio-gateway-stats-*/*.json"))

    await scrape()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(watch)
        for n in range(6):
            async with connect(master.url(100 + n)) as client:
                await client.send_message("ping")
                assert await client.get_message() == '{"type":"pong"}'
                backend.publish("branch:1:waiters", EVENT)
                await client.get_message()
            if n == 3:
                await scrape()  # what is not reported yet dies with the worker
                before = master.workers
                os.kill(min(before), signal.SIGKILL)
                await until(lambda: len(master.workers - before) == 1, START)  # noqa: B023
        await until(lambda: len(files()) == 3, START)
        nursery.cancel_scope.cancel()
    await scrape()

    (folder,) = temporary.glob("trio-gateway-stats-*")
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {path.name.partition("-")[0] for path in folder.iterdir()} == {
        "gone.json", *map(str, master.workers),
    }  # fmt: skip
    for before_, after in pairwise(seen):
        assert all(map(operator.le, before_, after)), (before_, after)
    assert seen[-1][0] - seen[0][0] >= 4  # of 6; a busy sibling may miss a scrape
