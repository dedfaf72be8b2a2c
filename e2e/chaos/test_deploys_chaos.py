"""Shutdown and deploys with thousands of clients, some of them stuck, and under load."""

import json
import os
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

import pytest
import redis
import trio

from bench import crowd as crowds
from bench.client import Client, Load
from bench.processes import Server
from bench.publish import paced
from tests.support.gateways import until
from tests.support.processes import GatewayProcess
from tests.support.redis_server import RedisServer

from .durable import run
from .serving import GRACE, HYPERCORN, SERVE, crowded, faults, logged, publishing, serving, wait_for

pytestmark = pytest.mark.chaos

_ROOM = {"WS_OUTBOX_BYTES": "100000000"}  # so that a stuck client stays
HOW = pytest.mark.parametrize(
    ("command", "workers"),
    [(SERVE, 1), (SERVE, 2), (HYPERCORN, 1)],
    ids=["serve", "serve -w 2", "hypercorn"],
)


def stick(load: Load, valkey: RedisServer, server: Server, number: int) -> list[Client]:
    """Clients that do not read, with more for them than the kernel takes."""
    target = crowds.staff("waiter", 900_000, 9, [9], "WAITER")
    stuck = [Client(100_000 + n, target, None) for n in range(number)]
    for client in stuck:
        client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    load.open(stuck)
    for client in stuck:
        load.stop_reading(client)
    event = {"type": "ROUND_READY", "tenant_id": 9, "branch_id": 9, "entity": {"x": "x" * 60_000}}
    with redis.Redis(port=valkey.port) as backend:
        for n in range(100):
            backend.publish("channel:branch:9:waiters", json.dumps(event | {"n": n}))
    return stuck


@HOW
def test_sigterm_sends_5000_clients_away_with_spread_hints_and_ends_in_time(
    tmp_path: Path, command: Sequence[str], workers: int
) -> None:
    crowd = crowds.one_branch(5000)
    with serving(tmp_path, command, workers, **_ROOM) as (server, valkey):
        load = crowded(server, crowd)
        clients = list(load.clients)
        stuck = stick(load, valkey, server, 20)
        publisher = publishing(server, valkey, crowd, load)
        load.drive(publisher, paced(publisher, 20), 2)

        publisher.publish(200)
        began = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        # Hypercorn's worker stops accepting first, and would leave us waiting.
        statuses = [503 if command is HYPERCORN else 200]
        while statuses[-1] == 200 and time.monotonic() - began < 1:
            statuses.append(server.get("/ws/health/ready")[0])
        not_ready = time.monotonic() - began
        wait_for(lambda: not any(c.ready and c.code is None for c in clients), GRACE + 2, load)
        closed_after = time.monotonic() - began
        wait_for(lambda: server.process.poll() is not None, GRACE + 2 - closed_after, load)
        ended = time.monotonic() - began

        assert server.process.returncode == 0
        assert statuses[-1] == 503
        assert {client.code for client in clients} == {1001}
        assert faults(load) == (0, 0, 0, 0)
        drains = logged(server, "drained")
        assert len(drains) == workers
        assert [drain["undelivered"] for drain in drains] == [0] * workers
        if workers == 1:  # all received events have reached every client
            assert len({client.place for client in clients}) == 1
        away = assert_even(clients, [drain["clients"] for drain in drains])
        assert all(client.code is None for client in stuck)
        print(
            f"{command[0]}, {workers}: not ready after {not_ready:.2f} s, all closed after"
            f" {closed_after:.2f} s, ended after {ended:.2f} s; hints over {away:.1f} s"
        )


def assert_even(clients: Sequence[Client], of_workers: Sequence[int]) -> float:
    """The hints are as if drawn evenly, from a window of 1 s for each 500 clients of a worker."""
    hints = sorted(float(c.reason[len("retry in ") : -1]) for c in clients)
    windows = [max(2.0, number / 500) for number in of_workers]
    for place, hint in enumerate(hints):
        should = sum(
            number * min(1.0, hint / window)
            for number, window in zip(of_workers, windows, strict=True)
        ) / sum(of_workers)
        # Kolmogorov and Smirnov would allow 0.027 for one in a thousand; a hint has one decimal.
        assert abs((place + 0.5) / len(hints) - should) < 0.02 + 0.05 / min(windows)
    return hints[-1]


@HOW
def test_second_signal_ends_all_connections_at_once(
    tmp_path: Path, command: Sequence[str], workers: int
) -> None:
    with serving(tmp_path, command, workers, **_ROOM) as (server, valkey):
        load = crowded(server, crowds.one_branch(200))
        stick(load, valkey, server, 50)
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        server.process.send_signal(signal.SIGTERM)
        began = time.monotonic()
        # Hypercorn's master ignores it, but ends in time.
        patience = GRACE + 2 if command is HYPERCORN else 1.5
        wait_for(lambda: server.process.poll() is not None, patience)
        print(f"{command[0]}, {workers}: ended {time.monotonic() - began:.2f} s after the second")
        assert server.process.returncode == (0 if workers == 1 else 1)


def test_frozen_worker_is_killed_in_time_and_the_exit_status_shows_it(tmp_path: Path) -> None:
    with serving(tmp_path, SERVE, 2) as (server, _):
        wait_for(lambda: len(logged(server, "subscribed")) == 2, 10)  # both are up
        victim = max(set(server.pids()) - {server.process.pid})
        os.kill(victim, signal.SIGSTOP)
        server.process.send_signal(signal.SIGTERM)
        took = wait_for(lambda: server.process.poll() is not None, GRACE + 4)
        assert took == pytest.approx(GRACE + 2, abs=1)
        assert server.process.returncode == 1


# Under load, with clients that resume

Progress = Callable[[], Awaitable[None]]


async def test_restarting_two_gateways_in_turn_loses_no_durable_event() -> None:
    async def restart(server: RedisServer, first: GatewayProcess, progress: Progress) -> None:
        for _ in range(5):
            for gateway in (first, *first.siblings):
                assert await gateway.stop() == 0
                await progress()  # on the other one
                await gateway.start()
                await progress()

    figures = await run("rolling restarts", restart, (), 2, clients=200, kills=10)
    print(f"\n{figures}")
    figures.assert_nothing_lost()
    assert figures.replayed


async def test_rolling_the_workers_loses_no_durable_event() -> None:
    async def roll(server: RedisServer, gateway: GatewayProcess, progress: Progress) -> None:
        assert gateway.process is not None
        master = Path(f"/proc/{gateway.process.pid}/task")

        def workers() -> set[int]:
            lists = [path.read_text() for path in master.glob("*/children")]
            return {int(pid) for found in lists for pid in found.split()}

        for _ in range(5):
            before = workers()
            gateway.process.send_signal(signal.SIGHUP)
            await until(lambda before=before: len(workers()) == 2 and not workers() & before, 40)  # type: ignore[misc]
            await progress()
        await trio.sleep(0.5)
        assert await gateway.stop() == 0
        await gateway.start()

    figures = await run("SIGHUP", roll, ["--workers", "2"], clients=200, kills=10)
    print(f"\n{figures}")
    figures.assert_nothing_lost()
    assert figures.replayed
