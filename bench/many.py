"""Many connections over many processes, with load processes to match: a limit is per process.

The tenants are placed as a proxy would: all connections of a tenant are on one process.
"""

import multiprocessing
import os
import resource
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import numpy as np

from .client import Client, Load
from .crowd import MAX_PERIOD, Expected, Kind, Template, staff
from .processes import Cores, NotHere, Redis, serve_workers
from .publish import Publisher

_SPARE_FILES: Final = 300  # descriptors of a gateway or a load process besides its clients'
_PER_CONNECTION: Final = 30_000  # bytes that a run may take, both ends and the kernel included
_BRANCHES_OF_A_TENANT: Final = 5
_WARM_UP: Final = 20  # connections of each load process before anything is measured
_AT_ONCE: Final = 64  # connections of a load process that are being opened


@dataclass(frozen=True)
class Size:
    """How much of everything."""

    clients: int
    branches: int
    processes: int
    size: int  # bytes of an event
    seconds: float = 5.0  # for which it is idle

    def verify(self) -> None:
        """Raise :exc:`NotHere` if a limit is in the way."""
        if not self.processes <= self.branches <= min(MAX_PERIOD, self.clients):
            raise NotHere(
                f"--branches is from {self.processes} to {min(MAX_PERIOD, self.clients)} here"
            )
        _, files = resource.getrlimit(resource.RLIMIT_NOFILE)
        each = -(-self.clients // self.branches)  # clients of a branch, at most
        needed = each * max(Counter(map(self.place, range(self.branches))).values()) + _SPARE_FILES
        if files != resource.RLIM_INFINITY and needed > files:
            room = (files - _SPARE_FILES) * self.processes * 9 // 10
            raise NotHere(
                f"{self.clients} clients need {needed} open files in one of {self.processes}"
                f" processes, and {files} are allowed: raise the limit (ulimit -Hn), or take more"
                f" --processes, or up to {room} --clients"
            )
        free = _meminfo()["MemAvailable"]
        if self.clients * _PER_CONNECTION > free:
            raise NotHere(
                f"{self.clients} clients need about {self.clients * _PER_CONNECTION >> 20} MB, and"
                f" {free >> 20} are free: up to {free // _PER_CONNECTION} --clients"
            )

    def tenant(self, branch: int) -> int:
        return branch // _BRANCHES_OF_A_TENANT

    def place(self, branch: int) -> int:
        """The process of a branch: that of its tenant, if there are enough tenants."""
        enough = self.branches // _BRANCHES_OF_A_TENANT >= self.processes
        return (self.tenant(branch) if enough else branch) % self.processes

    def by_process(self) -> list[list[int]]:
        """The clients of each process, by number; the n-th is in branch ``n % branches``."""
        found: list[list[int]] = [[] for _ in range(self.processes)]
        for client in range(self.clients):
            found[self.place(client % self.branches)].append(client)
        return found


def measure(redis: Redis, cores: Cores, size: Size, settings: dict[str, str]) -> dict[str, float]:
    """Open all connections, measure them while idle, and publish an event for each branch."""
    size.verify()
    os.sched_setaffinity(0, cores.server | cores.load)
    kinds = [
        Kind(
            f"channel:branch:{branch + 1}:waiters",
            {"type": "ROUND_READY", "tenant_id": size.tenant(branch) + 1, "branch_id": branch + 1},
        )
        for branch in range(size.branches)
    ]
    template = Template(kinds, size.size)
    with ExitStack() as stack:
        server = stack.enter_context(serve_workers(redis, cores, size.processes, **settings))
        loads = [
            stack.enter_context(_LoadProcess(server.port + n, clients, size, template))
            for n, clients in enumerate(size.by_process())
        ]
        _open(loads, 0, _WARM_UP, 60)
        time.sleep(1)
        empty = server.rss_of_children() / 1e6 / size.processes  # without the supervisor
        before, slab, cpu = server.rss(), _meminfo()["Slab"], server.cpu()
        began = time.monotonic()
        opened = _open(loads, _WARM_UP, size.clients, 60 + size.clients / 250)
        took, cpu = time.monotonic() - began, server.cpu() - cpu
        rest = size.clients - _WARM_UP * size.processes
        found = {
            "connections": float(size.clients),
            "processes": float(size.processes),
            "branches": float(size.branches),
            "accepts/s": rest / took,
            "CPU µs per accept": cpu / rest * 1e6,
            "to first pong p50 ms": float(np.percentile(opened, 50)),
            "to first pong p99 ms": float(np.percentile(opened, 99)),
        }
        time.sleep(min(2, size.seconds))
        found["KB per connection"] = (server.rss() - before) / 1024 / rest
        # A connection has two ends here, and both are in this kernel.
        found["kernel KB per connection"] = (_meminfo()["Slab"] - slab) / 1024 / rest
        found["RSS MB"] = server.rss() / 1e6
        found["RSS MB of an empty process"] = empty
        cpu, began = server.cpu(), time.monotonic()
        time.sleep(size.seconds)
        found["idle CPU"] = (server.cpu() - cpu) / (time.monotonic() - began)
        return found | _broadcast(redis, server.cpu, template, size, loads)


def _open(loads: "Sequence[_LoadProcess]", first: int, last: int, seconds: float) -> list[float]:
    """Open these clients of each load process; returns the milliseconds until each was ready."""
    for load in loads:
        load.tell(first, last, seconds)
    failed: Counter[str] = Counter()
    waited: list[float] = []
    for load in loads:
        why, times = load.answer(seconds + 30)
        failed.update(why)
        waited += times
    if failed:
        reasons = ", ".join(f"{n} x {why}" for why, n in failed.most_common(3))
        raise NotHere(f"{failed.total()} clients did not connect: {reasons}")
    return waited


def _broadcast(
    redis: Redis, cpu: Any, template: Template, size: Size, loads: "Sequence[_LoadProcess]"
) -> dict[str, float]:
    publisher = Publisher(redis.port, template)
    began, used = time.monotonic(), cpu()
    publisher.publish(size.branches)
    while publisher.answered < size.branches:
        publisher.flush()
        publisher.read_replies()
        if time.monotonic() - began > 60:
            raise NotHere("Redis did not accept the events within 60 s")
        time.sleep(0.001)
    publisher.close()
    for load in loads:
        load.tell(list(publisher.sent_at))
    faults: Counter[str] = Counter()
    times, lasts = [], []
    for load in loads:
        counted, each, last = load.answer(180)
        faults.update(counted)
        times.append(each)
        lasts.append(last)
    late = np.concatenate(times)
    found = {
        "all delivered after s": (max(lasts) - publisher.sent_at[0]) / 1e9,
        "to each p50 ms": float(np.percentile(late, 50)) if len(late) else float("nan"),
        "to each p99 ms": float(np.percentile(late, 99)) if len(late) else float("nan"),
        "CPU µs per delivery": (cpu() - used) / max(1, len(late)) * 1e6,
        "delivered": float(len(late)),
    }
    names = ("missing", "duplicate", "out of order", "to the wrong client", "lost connections")
    return found | {name: float(faults[name]) for name in names}


class _LoadProcess:
    """A process that holds clients of one gateway; a context manager that ends it."""

    def __init__(self, port: int, clients: Sequence[int], size: Size, template: Template) -> None:
        context = multiprocessing.get_context("fork")
        self._pipe, theirs = context.Pipe()
        arguments = (theirs, port, clients, size, template)
        self._process = context.Process(target=_hold, args=arguments, daemon=True)
        self._process.start()
        theirs.close()

    def __enter__(self) -> "_LoadProcess":
        return self

    def __exit__(self, *_: object) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.join()

    def tell(self, *order: Any) -> None:
        self._pipe.send(order)

    def answer(self, seconds: float) -> Any:
        """Its answer to the last order."""
        try:
            if not self._pipe.poll(seconds):
                raise NotHere(f"a load process did not answer within {seconds:.0f} s")
            return self._pipe.recv()
        except EOFError:
            raise NotHere("a load process ended: is there enough memory?") from None


def _hold(
    pipe: Connection, port: int, numbers: Sequence[int], size: Size, template: Template
) -> None:
    """Follow the orders, and read from the clients meanwhile, until killed or without a parent."""
    load, parent = Load(port, template), os.getppid()

    def end_with_parent() -> None:
        if os.getppid() != parent:  # it was killed; the pipe does not tell, this end is ours, too
            raise EOFError

    load.progress = end_with_parent
    expects: dict[int, Expected] = {}
    for branch in {number % size.branches for number in numbers}:
        expects[branch] = Expected([branch], size.branches)
    clients: list[Client] = []
    try:
        while True:
            while not pipe.poll():
                end_with_parent()
                load.pump(0.05)
            order = pipe.recv()
            if len(order) == 3:
                first, last, seconds = order
                new = [_client(number, size, expects) for number in numbers[first:last]]
                clients += new
                load.open(new, at_once=_AT_ONCE, seconds=seconds)
                waiting = sum(not client.ready for client in new) - load.failed.total()
                failed = load.failed + Counter({"no answer": waiting})
                pipe.send((failed, [(c.ready_at - c.began_at) / 1e6 for c in new if c.ready]))
            else:
                pipe.send(_look_back(load, clients, order[0], template))
    except EOFError:
        pass


def _client(number: int, size: Size, expects: dict[int, Expected]) -> Client:
    branch = number % size.branches
    target = staff("waiter", number + 1, size.tenant(branch) + 1, [branch + 1], "WAITER")
    return Client(number, target, expects[branch])


def _look_back(
    load: Load, clients: list[Client], sent_at: list[int], template: Template
) -> tuple[Counter[str], Any, int]:
    """Wait for what is under way; the faults, the milliseconds to each client, and the end."""
    published = len(sent_at)
    load.settle(lambda: load.received >= len(clients) * template.frame_size, 5.0)
    load.settle(lambda: not any(load.missed(client, published) for client in clients), 5.0)
    load.count_missing(clients, published)
    faults = Counter({
        "missing": load.faults.missing,
        "duplicate": load.faults.duplicate,
        "out of order": load.faults.out_of_order,
        "to the wrong client": load.faults.strange,
        "lost connections": load.closed.total(),
    })  # fmt: skip
    # Each client receives one event, so each line of the log is one delivery.
    number_of = {client.number: client.expects.indices[0] for client in clients if client.expects}
    log = load.arrivals()
    late = [(now - sent_at[number_of[client]]) / 1e6 for now, client in log]
    return faults, np.array(late), max((now for now, _ in log), default=0)


def _meminfo() -> dict[str, int]:
    """Bytes by the names of /proc/meminfo."""
    found = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        with suppress(ValueError, IndexError):
            found[name] = int(rest.split()[0]) * 1024
    return found
