"""Gateways in processes of their own, with the bench's clients: thousands of them."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from bench.client import Client, Load
from bench.crowd import Crowd, Template
from bench.processes import Server
from bench.publish import Publisher
from tests.support.gateways import environment, free_port, valkey
from tests.support.redis_server import RedisServer

GRACE: Final = 5  # seconds, graceful_timeout
SERVE: Final = ("trio_gateway", "serve")
HYPERCORN: Final = ("hypercorn", "trio_gateway.app:app")
_LIFTED: Final = {
    "WS_MAX_TOTAL_CONNECTIONS": "100000",
    "WS_MAX_CONNECTIONS_PER_USER": "100000",
    "WS_MAX_CONNECTIONS_PER_SESSION": "100000",
    "WS_MAX_HANDSHAKES": "100000",
    "WS_ACCEPT_TIMEOUT": "30",
    "WS_HEARTBEAT_TIMEOUT": "36000",
    "WS_RECEIVE_TIMEOUT": "36000",
}


class Served(Server):
    """With the clients that it has."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        super().__init__(process, port, log)
        self.loads: list[Load] = []
        self.publishers: list[Publisher] = []


@contextmanager
def serving(
    folder: Path, command: Sequence[str], workers: int = 1, **settings: str
) -> Iterator[tuple[Served, RedisServer]]:
    """A gateway that is ready, and its Redis."""
    _raise_fd_limit()
    port = free_port()
    config = folder / "hypercorn.toml"
    config.write_text(
        f'bind = ["127.0.0.1:{port}"]\nworker_class = "trio"\nworkers = {workers}\n'
        f'backlog = 4096\nalpn_protocols = ["http/1.1"]\ngraceful_timeout = {GRACE}\n'
    )
    with valkey() as redis, (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, "-c", str(config)],
            env=environment(redis.connection_url, **_LIFTED | settings),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
        server = Served(process, port, folder / "log")
        try:
            wait_for(lambda: all(server.get("/ws/health/ready")[0] == 200 for _ in range(10)), 30)
            wait_for(lambda: workers == 1 or len(server.pids()) > workers, 30)
            yield server, redis
        finally:
            for load in server.loads:
                load.shut()
            for publisher in server.publishers:
                publisher.close()
            for pid in server.pids():
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait()


def crowded(server: Served, crowd: Crowd) -> Load:
    """The crowd's clients, connected."""
    load = Load(server.port, Template(crowd.kinds, 256))
    load.logging = False
    server.loads.append(load)
    clients = [
        Client(n, target, expects)
        for n, (target, expects) in enumerate(zip(crowd.targets, crowd.expects, strict=True))
    ]
    load.open(clients)
    assert load.ready == len(clients), load.failed
    return load


def publishing(server: Served, redis: RedisServer, crowd: Crowd, load: Load) -> Publisher:
    """The publisher of the events that the crowd must receive."""
    publisher = Publisher(redis.port, Template(crowd.kinds, 256))
    server.publishers.append(publisher)
    load.attend(publisher)
    return publisher


def faults(load: Load) -> tuple[int, int, int, int]:
    """What must be zero: events missing, doubled, out of order, or of others."""
    found = load.faults
    return found.missing, found.duplicate, found.out_of_order, found.strange


def wait_for(true: Callable[[], object], seconds: float, load: Load | None = None) -> float:
    """Wait until this holds, while the clients read; return the seconds it took."""
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < seconds, "it does not come true"
        if load is None:
            time.sleep(0.02)
        else:
            load.pump(0.02)
    return time.monotonic() - began


def logged(server: Server, event: str) -> list[dict[str, Any]]:
    """The lines of this kind in its log."""
    lines = server.log.read_text(errors="replace").splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return [line for line in found if line["event"] == event]


def _raise_fd_limit() -> None:
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
