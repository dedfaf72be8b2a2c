"""Churn beside delivery, and a soak at whose end nothing is left."""

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path
from typing import Final

import numpy as np
import pytest

from bench import crowd as crowds
from bench.client import Client, Load
from bench.processes import Server
from bench.publish import paced

from .serving import SERVE, crowded, faults, logged, publishing, serving, wait_for

pytestmark = pytest.mark.chaos

SOAK_MINUTES: Final = float(os.environ.get("CHAOS_SOAK_MINUTES", "5"))  # both soaks together


class Churn:
    """Clients that come at a rate, stay for a while and go: most of them politely."""

    def __init__(self, load: Load, rate: float, stay: int) -> None:
        self._load = load
        self._every = int(1e9 / rate)
        self._stay = stay  # how many are there at a time
        self._next = time.monotonic_ns()
        self._live: list[Client] = []
        self._chance = random.Random(7)
        self._number = 1_000_000
        self._everything = load.clients[0].expects
        targets = [crowds.staff("waiter", 5000 + n, 1, [1], "WAITER") for n in range(50)]
        self._targets = targets
        self.ended: Counter[str] = Counter()

    def turn(self) -> None:
        """Do what is due."""
        now = time.monotonic_ns()
        while now >= self._next:
            self._next += self._every
            self._come()
            if len(self._live) > self._stay:
                self._go(self._live.pop(self._chance.randrange(len(self._live))))

    def _come(self) -> None:
        # Of three hundred that come one has no token that is one.
        invalid = not self._chance.randrange(300)
        target = "/ws/waiter?token=x.y.z" if invalid else self._chance.choice(self._targets)
        self._number += 1
        client = Client(self._number, target, self._everything)
        if not invalid:
            self._live.append(client)
        self._load.start(client)

    def _go(self, client: Client) -> None:
        if client.socket.fileno() < 0:
            self.ended["closed"] += 1
        elif client.ready and self._chance.random() < 0.8:
            self.ended["left"] += 1
            self._load.close(client)
        else:
            self.ended["vanished"] += 1
            self._load.drop([client])
        # It is not kept: minutes of these would be the load's own leak.
        self._load.clients.remove(client)

    def end(self) -> None:
        while self._live:
            self._go(self._live.pop())


def test_churn_costs_500_stable_clients_no_event(tmp_path: Path) -> None:
    crowd = crowds.one_branch(500)
    with serving(tmp_path, SERVE) as (server, valkey):
        load = crowded(server, crowd)
        stable = list(load.clients)
        publisher = publishing(server, valkey, crowd, load)
        churn = Churn(load, rate=50, stay=100)
        load.progress = churn.turn
        load.drive(publisher, paced(publisher, 100), 60)
        load.settle(lambda: not any(load.missed(client, publisher.sent) for client in stable))
        load.count_missing(stable, publisher.sent)

        print(f"\n{publisher.sent} events, {churn.ended}, late by {publisher.late / 1e6:.0f} ms")
        assert all(client.ready and client.code is None for client in stable)
        assert faults(load) == (0, 0, 0, 0)
        assert publisher.sent >= 5900
        assert churn.ended["left"] + churn.ended["vanished"] >= 2700
        assert logged(server, "dropping events") == []
        churn.end()


# Soak


@pytest.mark.parametrize("workers", [1, 2])
def test_soak_leaves_nothing_behind(tmp_path: Path, workers: int) -> None:
    seconds = SOAK_MINUTES * 60 / 2
    crowd = crowds.one_branch(50)
    with serving(tmp_path, SERVE, workers, LOG_LEVEL="warning") as (server, valkey):
        before_any = settled(server)
        load = crowded(server, crowd)
        publisher = publishing(server, valkey, crowd, load)
        stable = list(load.clients)
        churn = Churn(load, rate=200, stay=300)
        began = time.monotonic()
        looked: list[tuple[float, int]] = []

        def look() -> None:
            churn.turn()
            if (now := time.monotonic() - began) >= len(looked) * 2:
                looked.append((now, server.rss()))

        load.progress = look
        load.drive(publisher, paced(publisher, 20), seconds)
        load.settle(lambda: not any(load.missed(client, publisher.sent) for client in stable))
        load.count_missing(stable, publisher.sent)
        assert faults(load) == (0, 0, 0, 0)
        assert all(client.ready and client.code is None for client in stable)

        churn.end()
        for client in stable:
            load.close(client)
        after = wait_settled(server, before_any, spare=3 * workers)
        found = server.metrics()

        times, sizes = np.array(looked)[len(looked) * 2 // 5 :].T
        slope = float(np.polyfit(times / 60, sizes / 1e6, 1)[0])
        print(
            f"\n{workers} workers, {seconds / 60:.1f} min, {churn.ended}:"
            f" RSS {looked[0][1] / 1e6:.1f} MB, {sizes[0] / 1e6:.1f} when warm,"
            f" {sizes[-1] / 1e6:.1f} at the end, {slope:+.2f} MB/min;"
            f" at rest {before_any} then {after}"
        )
        assert churn.ended.total() > 150 * seconds
        assert found["wsgateway_connections_total"] == 0
        # The growth that a window of this length can distinguish from steps of the allocator.
        assert slope * seconds / 60 < 4 * workers
        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.process.poll() is not None, 7)
        assert server.process.returncode == 0


def settled(server: Server) -> dict[str, float]:
    """What the processes hold: connections, tasks, and descriptors."""
    time.sleep(1.5)  # what was asked before is something that they hold, too, for a moment
    found = server.metrics()
    descriptors = sum(len(os.listdir(f"/proc/{pid}/fd")) for pid in server.pids())
    return {
        "connections": found["wsgateway_connections_total"],
        "tasks": found["wsgateway_tasks"],
        "descriptors": float(descriptors),
    }


def wait_settled(server: Server, before: dict[str, float], spare: int) -> dict[str, float]:
    """Once it is as before any client came: within a few seconds, as closes linger for one.

    ``spare`` tasks and descriptors are what a worker had not needed before: a connection to Redis
    for commands, say.
    """
    for _ in range(8):
        now = settled(server)
        if all(number <= before[name] + spare for name, number in now.items()):
            break
    assert all(number <= before[name] + spare for name, number in now.items()), (before, now)
    return now
