"""One of four workers is killed: what its siblings, their clients and the metrics say of it."""

import os
import signal
import time
from pathlib import Path
from typing import Final

import pytest

from bench import crowd as crowds
from bench.processes import Server
from bench.publish import paced

from .serving import SERVE, crowded, faults, logged, publishing, serving, wait_for

pytestmark = pytest.mark.chaos

_KILLED: Final = 1006


def test_killed_worker_is_restarted_and_sums_stay_right(tmp_path: Path) -> None:
    crowd = crowds.one_branch(400)
    with serving(tmp_path, SERVE, 4, LOG_LEVEL="warning") as (server, valkey):
        load = crowded(server, crowd)
        clients = list(load.clients)
        publisher = publishing(server, valkey, crowd, load)

        def publish(count: int) -> None:
            load.drive(publisher, paced(publisher, 100), count / 100)
            load.settle(lambda: not any(load.missed(c, publisher.sent) for c in clients if c.ready))

        def sums(**wanted: float) -> None:
            """The figures become these, and were never less."""

            def right() -> bool:
                found = server.metrics()
                return all(found[f"wsgateway_{name}"] == value for name, value in wanted.items())

            wait_for(right, 3, load)

        publish(200)
        first = publisher.sent
        sums(connections_total=400, deliveries_total=400 * first, broadcasts_total=4 * first)
        time.sleep(0.6)  # that each has written its figures down
        workers = set(server.pids()) - {server.process.pid}
        assert len(workers) == 4

        os.kill(victim := min(workers), signal.SIGKILL)

        def restarted() -> bool:
            there = set(server.pids()) - {server.process.pid}
            return len(there) == 4 and victim not in there

        process = wait_for(restarted, 2, load)
        served = process + wait_for(lambda: all_ready(server), 2, load)
        lost = sum(not client.ready or client.socket.fileno() < 0 for client in clients)
        assert load.closed == ({_KILLED: lost} if lost else {})
        assert lost < 400
        left = 400 - lost
        sums(connections_total=left, deliveries_total=400 * first, broadcasts_total=4 * first)
        publish(100)
        sums(connections_total=left, deliveries_total=400 * first + left * (publisher.sent - first))
        assert faults(load) == (0, 0, 0, 0)
        print(f"\nnew process after {process:.2f} s, serves within {served:.2f} s; {lost} clients")

        server.process.send_signal(signal.SIGTERM)
        wait_for(lambda: server.process.poll() is not None, 7, load)
        assert server.process.returncode == 0
        assert load.closed[1001] == left
        (died,) = logged(server, "worker died")
        assert died["status"] == -signal.SIGKILL


def all_ready(server: Server) -> bool:
    return all(server.get("/ws/health/ready")[0] == 200 for _ in range(12))
