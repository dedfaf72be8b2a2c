"""Stream events for many tenants, of which few or none have clients on this gateway."""

import os
import signal
import time
import zlib
from collections.abc import Sequence
from typing import Final

import redis

from .client import Client, Load
from .crowd import JWT_SECRET, token
from .processes import Server

_TENANTS: Final = 100
_AT_ONCE: Final = 500  # entries in one pipeline
STREAM: Final = "events:critical"
_IDLE: Final = 0.1  # seconds with less than _WORK seconds of CPU per look: nothing is to do
_WORK: Final = 0.0005
_SLICE: Final = 0.002  # seconds: at a given rate, this much is published at a time


def target(tenant: int, last_event_id: str = "") -> str:
    """The URL path of an admin of a tenant's only branch."""
    claims = {"tenant_id": tenant, "branch_ids": [tenant], "roles": ["ADMIN"]}
    path = f"/ws/admin?token={token(JWT_SECRET, sub=str(tenant), **claims)}"
    return f"{path}&last_event_id={last_event_id}" if last_event_id else path


def payload(n: int, size: int) -> bytes:
    """The n-th event: tenants 1 to 100 in turn, each with one branch."""
    tenant = 1 + n % _TENANTS
    head = (
        b'{"type":"ROUND_READY","tenant_id":%d,"branch_id":%d,"sector_id":5,"session_id":%d,'
        b'"n":%d,"ts":"2026-05-20T12:00:00.000000+00:00","entity":{"note":"'
    ) % (tenant, tenant, 1 + n % 5000, n)
    return head + b"x" * max(0, size - len(head) - 3) + b'"}}'


class Backlog:
    """Adds events to the stream, and waits until the gateway has received all of them."""

    def __init__(self, backend: "redis.Redis", server: Server, size: int) -> None:
        self._backend = backend
        self._server = server
        self._size = size
        self.added = 0

    def add(self, count: int) -> None:
        """Add events as fast as Redis accepts them."""
        while count > 0:
            some, count = min(count, _AT_ONCE), count - _AT_ONCE
            with self._backend.pipeline(transaction=False) as pipeline:
                for n in range(self.added, self.added + some):
                    pipeline.execute_command(
                        "XADD", STREAM, "MAXLEN", "~", 300_000, "*", "data", payload(n, self._size)
                    )
                pipeline.execute()
            self.added += some

    def add_paced(self, rate: float, seconds: float) -> None:
        """Add events at this rate."""
        began, first = time.monotonic(), self.added
        while (elapsed := time.monotonic() - began) < seconds:
            due = int(elapsed * rate) - (self.added - first)
            if due > 0:
                self.add(due)
            time.sleep(_SLICE)

    def received(self) -> int:
        """The stream entries that the gateway has received."""
        _, text = self._server.get("/ws/metrics")
        name = 'wsgateway_events_received_total{source="stream"} '
        return next(
            (int(float(line[len(name) :])) for line in text.splitlines() if line.startswith(name)),
            0,
        )

    def wait_received(self, load: Load, seconds: float = 60) -> float:
        """Let the clients read until everything that was added is received.

        Returns when the gateway was last seen at work. Its metrics are read only while it is idle:
        that costs it milliseconds, which would count as the cost of the events.
        """
        ends = time.monotonic() + seconds
        while True:
            worked_at = self._wait_idle(load, ends)
            if self.received() >= self.added or time.monotonic() > ends:
                return worked_at

    def _wait_idle(self, load: Load, ends: float) -> float:
        cpu, _ = self._server.scheduled()
        worked_at = now = time.monotonic()
        while now < min(worked_at + _IDLE, ends):
            load.pump(0.01)
            before, (cpu, _), now = cpu, self._server.scheduled(), time.monotonic()
            if cpu - before > _WORK:
                worked_at = now
        return worked_at

    def read_at_once(self, count: int, load: Load) -> tuple[float, float]:
        """Add events while the gateway is stopped, and let it read them.

        Returns its CPU seconds, and the seconds from its first read to its last.
        """
        workers = self._server.pids()
        for pid in workers:
            os.kill(pid, signal.SIGSTOP)
        self.add(count)
        cpu, began = self._server.cpu(), time.monotonic()
        for pid in workers:
            os.kill(pid, signal.SIGCONT)
        ended = self.wait_received(load)
        return self._server.cpu() - cpu, ended - began

    def resume(self, load: Load, tenant: int, missed: int) -> int:
        """Connect a client that missed the last ``missed`` events; return how many it is sent."""
        entries: Sequence[tuple[bytes, object]] = self._backend.xrevrange(STREAM, count=missed + 1)
        tag = f"{zlib.crc32(STREAM.encode()) & 0xFFFF:04x}"
        last_event_id = f"{entries[-1][0].decode()}-{tag}"
        client = Client(9999, target(tenant, last_event_id), None)
        load.open([client])
        load.settle(lambda: False, 0.3)
        return sum(b'"event_id"' in text for text in client.texts)
