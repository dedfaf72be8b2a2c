"""Bad clients beside good ones: the good ones are not affected, and memory is bounded."""

import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import trio

from bench import crowd as crowds
from bench.client import Client, Load, text_frame
from bench.crowd import Template
from bench.processes import Cores, Redis, Server, _rss, open_redis, serve
from bench.publish import Publisher, paced
from tests.support.gateways import make_settings, running, valkey

from . import faults
from .bad_clients import KINDS, Ends, be_bad

GOOD: Final = 300
RATE: Final = 20.0  # events a second, each to all of the good ones
PHASE: Final = 4.0  # seconds without the bad ones, before and after
LATE: Final = 100.0  # ms
TRIES: Final = 3  # of a run in which the machine was busy with something else
BUSY: Final = 50.0  # ms for which the gateway had no core in it
OUTBOX: Final = 1_048_576
_HERE: Final = text_frame(b"still here")  # which is not answered
_clock = time.monotonic_ns


@dataclass
class Phase:
    """What the good clients measured in one phase, in milliseconds."""

    p50: float
    p99: float
    worst: float
    ping99: float


@dataclass
class Figures:
    """A run."""

    before: Phase
    during: Phase
    after: Phase
    grown: float  # MB at most, while the bad ones were there
    left: float  # MB after they had left
    descriptors: int  # that were left open
    ends: dict[str, Any]
    faults: int
    stalls: int  # turns of the gateway's loop of 10 ms and more, meanwhile
    stalled: float  # ms, all of them
    waited: float  # ms that it was ready and had no core, because of others on this machine

    @property
    def ratio(self) -> float:
        return self.during.p99 / self.before.p99

    @property
    def unnoticed(self) -> bool:
        """Whether the good clients were not slower while the bad ones were there."""
        before, during = self.before, self.during
        return (
            during.p99 <= max(3 * before.p99, LATE)
            and during.ping99 <= max(3 * before.ping99, LATE)
            and self.after.p99 <= max(3 * before.p99, LATE)
        )

    def __str__(self) -> str:
        return (
            f"p99 {self.before.p99:.1f} / {self.during.p99:.1f} / {self.after.p99:.1f} ms, "
            f"ping {self.before.ping99:.1f} / {self.during.ping99:.1f} / {self.after.ping99:.1f}, "
            f"worst {self.during.worst:.0f}, ratio {self.ratio:.2f}; "
            f"grown {self.grown:.1f} MB, left {self.left:.1f}, descriptors {self.descriptors}; "
            f"stalls {self.stalls}, {self.stalled:.0f} ms in all, "
            f"no core for {self.waited:.0f} ms; "
            f"{self.ends}"
        )


@dataclass
class Good:
    """Clients that receive all events of their branch, and one that pings."""

    server: Server
    load: Load
    publisher: Publisher
    clients: list[Client]
    pinger: Client
    worker: int
    most: int = 0
    pings: list[float] = field(default_factory=list)
    _asked: int = 0  # ns; 0 while no ping is under way
    _next: int = 0
    _pongs: int = 0
    _speaks_at: int = 0
    _turn: int = 0

    def measure(self, seconds: float, until: "subprocess.Popen[str] | None" = None) -> Phase:
        """Publish and see what comes, for so long, or until that process has ended."""
        load, publisher = self.load, self.publisher
        load.forget()
        self.pings.clear()
        self._asked = 0
        load.progress = self._ping
        first = publisher.sent
        load.drive(publisher, paced(publisher, RATE), seconds)
        while until is not None and until.poll() is None:
            load.drive(publisher, paced(publisher, RATE), 0.5)
        last = publisher.sent
        load.progress = lambda: None
        load.settle(lambda: not any(load.missed(c, last) for c in self.clients))
        each = load.latencies(publisher, first, last, self.clients).each
        assert len(each) == (last - first) * len(self.clients)
        return Phase(
            float(np.percentile(each, 50)),
            float(np.percentile(each, 99)),
            float(each.max()),
            float(np.percentile(self.pings, 99)),
        )

    def _ping(self) -> None:
        now = _clock()
        if now > self._speaks_at:  # for their heartbeat: all of them in two seconds, in turn
            self._speaks_at = now + 100_000_000
            for client in self.clients[self._turn :: 20]:
                client.socket.send(_HERE)
            self._turn = (self._turn + 1) % 20
        if self._asked and self.load.pongs != self._pongs:
            self.pings.append((now - self._asked) / 1e6)
            self._asked = 0
        elif not self._asked and now > self._next:
            self._asked, self._pongs = now, self.load.pongs
            self._next = now + 70_000_000  # within the rate limit
            self.load.ping(self.pinger)
            self.most = max(self.most, _rss(self.worker))


def run(name: str, count: int, seconds: float, **settings: str) -> Figures:
    """Measure a gateway under the stock command without, with, and again without bad clients."""
    cores = Cores()
    crowd = crowds.one_branch(GOOD, elsewhere=1)
    template = Template(crowd.kinds, 300)
    with open_redis(cores) as redis, serve("gateway", redis, cores, **settings) as server:
        load = Load(server.port, template)
        try:
            clients = [
                Client(i, target, expects)
                for i, (target, expects) in enumerate(
                    zip(crowd.targets, crowd.expects, strict=True)
                )
            ]
            publisher = Publisher(redis.port, template)
            load.attend(publisher)
            load.open(clients)
            good = Good(server, load, publisher, clients[:-1], clients[-1], server.worker)
            good.measure(1.0)  # warm
            before = good.measure(PHASE)
            rss, descriptors = _rss(good.worker), _descriptors(good.worker)
            good.most = rss
            stalls, waited = _stalls(server), _waited(good.worker)
            bad = _start_bad(name, count, server.port, seconds, redis, cores)
            during = good.measure(seconds, bad)
            waited = _waited(good.worker) - waited
            out, errors = bad.communicate()
            assert bad.returncode == 0, errors
            time.sleep(1.5)  # the lingering is over
            stalls = [now - then for now, then in zip(_stalls(server), stalls, strict=True)]
            after = good.measure(PHASE)
            assert load.ready == GOOD + 1
            load.count_missing(good.clients, publisher.sent)
            lost = load.faults
            publisher.close()
            return Figures(
                before,
                during,
                after,
                (good.most - rss) / 1e6,
                (_rss(good.worker) - rss) / 1e6,
                _descriptors(good.worker) - descriptors,
                json.loads(out),
                lost.missing + lost.duplicate + lost.out_of_order + lost.strange,
                int(stalls[0]),
                stalls[1] * 1000,
                waited,
            )
        finally:
            load.shut()


def _start_bad(
    name: str, count: int, port: int, seconds: float, redis: Redis, cores: Cores
) -> "subprocess.Popen[str]":
    arguments = [name, str(count), str(port), str(seconds), str(redis.port)]
    return subprocess.Popen(
        [sys.executable, "-m", "chaos.bad_clients", *arguments],
        env={**os.environ, "PYTHONPATH": faults.PYTHONPATH},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: _beside(cores.load),
    )


def _beside(cores: set[int]) -> None:
    """Not on the gateway's core, and with a lower priority than the measuring process."""
    os.sched_setaffinity(0, cores)
    os.nice(19)


def _stalls(server: Server) -> list[float]:
    """How many, and their seconds."""
    found = server.metrics()
    return [found[f"wsgateway_loop_stall_seconds_{name}"] for name in ("count", "sum")]


def _waited(pid: int) -> float:
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e6


def _descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@dataclass(frozen=True)
class Case:
    """``code`` is what the gateway counts; ``seen`` is what a client sees of it at last."""

    name: str
    count: int
    seconds: float
    code: int
    seen: set[str]
    soon: float  # seconds in which each must have met its end
    settings: dict[str, str] = field(default_factory=dict)


CASES: Final = [
    Case("stop reading", 1, 22, 4009, {"ended", "reset"}, 22),
    Case("stop reading", 50, 22, 4009, {"ended", "reset"}, 22),
    Case("stop reading", GOOD, 22, 4009, {"ended", "reset"}, 22),
    Case("stop reading, each apart", 50, 22, 4009, {"ended", "reset"}, 22),
    Case("one byte a second", 50, 22, 4009, {"ended", "reset"}, 22),
    Case("vanish", 50, 10, 4008, set(), 9, {"WS_HEARTBEAT_TIMEOUT": "6"}),
    Case("half-close", 50, 6, 1006, {"ended"}, 1),
    Case("reset in the handshake", 50, 6, 1006, {"left"}, 1),
    Case("10 MB in one frame", 20, 6, 1009, {"1009"}, 2),
    Case("empty fragments", 20, 6, 1009, {"1009"}, 2),
    Case("dead token", 50, 6, 4001, {"4001"}, 2),
    Case("dead token at once", 20, 6, 4001, {"4001"}, 2),
]


async def test_each_kind_of_bad_client_is_closed_with_its_code() -> None:
    ends: dict[str, Ends] = {}
    kinds = set(KINDS) - {"vanish"}  # which takes long
    slow = 3 * sum(KINDS[name].receives for name in kinds)
    with valkey() as redis:
        settings = make_settings(redis.connection_url, ws_write_timeout=0.15)
        async with running(settings) as gateway, trio.open_nursery() as nursery:

            async def note(name: str) -> None:
                seconds = 20 if KINDS[name].receives else 0.3
                ends[name] = await be_bad(
                    name, 3, gateway.port, seconds, redis.port,
                    lambda found: found["connections_closed_total{4009}"] == slow,
                )  # fmt: skip

            for name in kinds:
                nursery.start_soon(note, name)

    cases = [case for case in CASES if case.name in kinds]
    for case in cases:
        assert ends[case.name].seen
        assert set(ends[case.name].seen) <= case.seen
    assert {case.code for case in cases} == set(gateway.app.parts.hub.closed)
    assert len(gateway.app.parts.hub) == 0


@pytest.mark.chaos
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} x {case.count}")
def test_bad_clients_do_not_affect_good_ones(case: Case) -> None:
    for _ in range(TRIES):
        figures = run(case.name, case.count, case.seconds, **case.settings)
        print(f"\n{case.name} x {case.count}: {figures}")
        if figures.unnoticed or figures.waited < BUSY:
            break
    assert figures.unnoticed
    ends = figures.ends
    assert figures.faults == 0
    kind = KINDS[case.name]
    assert figures.grown < 20 + (case.count * OUTBOX / 1e6 if kind.receives else 0)
    assert figures.descriptors <= 2  # one is the metrics', perhaps
    assert set(ends["seen"]) <= case.seen
    assert ends["slowest"] < case.soon
    assert set(ends["closed"]) == {str(case.code)}
    if kind.pause == math.inf:
        assert ends["closed"] == {str(case.code): case.count}
        assert ends["closed_at"][str(case.code)] < case.soon
    else:
        assert sum(ends["seen"].values()) > case.count
