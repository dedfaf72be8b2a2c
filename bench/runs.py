"""Runs: a server with connected clients and a publisher, and what is measured of them."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from rich.progress import Progress

from .client import Client, Latencies, Load
from .crowd import Crowd, Template
from .processes import Cores, Redis, Server, serve
from .publish import Pace, Publisher

Figures = dict[str, float]
_clock = time.monotonic_ns
WARM_UP: Final = 1.0  # seconds


class Broken(RuntimeError):  # noqa: N818 - an outcome
    """The run failed; the text gives the reason."""


@dataclass(frozen=True)
class Options:
    """The options of the command line; each scenario has its own defaults."""

    clients: int = 400
    seconds: float = 5.0
    size: int = 300
    rate: float = 10.0
    window: int = 1000
    unbatched: bool = False
    branches: int = 40
    each: int = 1
    stuck: int = 20
    resume: bool = False
    missed: int = 50
    minutes: float = 2.0
    churn: float = 10.0
    processes: int = 1
    settings: tuple[str, ...] = ()  # of the gateway, NAME=VALUE


@dataclass
class Bench:
    """The surroundings of a run: Redis, cores, options."""

    redis: Redis
    cores: Cores
    options: Options
    progress: Progress | None = None
    series: dict[str, dict[str, list[float]]] = field(default_factory=dict)  # for the plot

    def serve(self, who: str) -> AbstractContextManager[Server]:
        """Start the gateway with the chosen settings, or a baseline."""
        return serve(who, self.redis, self.cores, **self.settings)

    @property
    def settings(self) -> dict[str, str]:
        """The chosen settings of the gateway."""
        return dict(each.split("=", 1) for each in self.options.settings)

    def steps(self, what: str, total: float) -> Callable[[float], None]:
        """Make a progress bar up to ``total``; call the result with the progress."""
        if self.progress is None:
            return lambda done: None
        progress = self.progress
        task = progress.add_task(what, total=total)

        def show(done: float) -> None:
            progress.update(task, completed=min(done, total))
            if done >= total:
                progress.remove_task(task)

        return show


class Run:
    """A server with connected clients, and a publisher."""

    def __init__(
        self, bench: Bench, who: str, server: Server, load: Load, crowd: Crowd, template: Template
    ) -> None:
        self.bench = bench
        self.who = who
        self.server = server
        self.load = load
        self.crowd = crowd
        self.template = template
        self.publisher = Publisher(bench.redis.port, template)
        load.attend(self.publisher)
        self.clients = list(load.clients)  # those that read

    @property
    def delivered(self) -> float:
        """Frames that the reading clients have received."""
        return self.load.received / self.template.frame_size

    def done(self) -> float:
        """Events that the clients have received, on average."""
        return self.delivered / self.crowd.audience

    def measure(
        self, pace: Pace, seconds: float, *, warm_up: float = WARM_UP, latencies: bool = True
    ) -> tuple[Figures, Latencies]:
        """Publish at a pace, first to warm up, then to measure."""
        load, publisher = self.load, self.publisher
        load.logging = latencies
        if warm_up:
            load.drive(publisher, pace, warm_up)
        load.forget()
        show = self.bench.steps(f"{self.who}: measuring", seconds)
        began = _clock()
        shown = began

        def progress() -> None:
            nonlocal shown
            if (now := _clock()) - shown > 200_000_000:
                shown = now
                show((now - began) / 1e9)

        load.progress = progress
        first, delivered = publisher.sent, self.delivered
        server, client, redis = self.server.cpu(), time.process_time(), self.bench.redis.cpu()
        began = _clock()
        load.drive(publisher, pace, seconds)
        elapsed = (_clock() - began) / 1e9
        server = self.server.cpu() - server
        client = time.process_time() - client
        redis = self.bench.redis.cpu() - redis
        count, last = self.delivered - delivered, publisher.sent
        load.progress = lambda: None
        show(seconds)
        load.settle(
            lambda: not any(load.missed(c, publisher.sent) for c in self.clients if c.ready)
        )
        if self.server.process.poll() is not None:
            raise Broken(f"{self.who} ended during the run: {self.server.failed()}")
        found: Figures = {
            "deliveries/s": count / elapsed,
            "events/s": (last - first) / elapsed,
            "CPU µs per delivery": server / count * 1e6 if count else math.nan,
            "deliveries per CPU s": count / server if server else math.nan,
            "CPU of the server": server / elapsed,
            "client CPU µs per delivery": client / count * 1e6 if count else math.nan,
            "CPU of the load client": client / elapsed,
            "CPU of Redis": redis / elapsed,
        }
        late = Latencies()
        if latencies:
            late = load.latencies(publisher, first, last, self.clients)
            found |= spread(late)
        return found, late

    def faults(self) -> Figures:
        """The errors of delivery, which must be zero; call it once, at the end."""
        load = self.load
        load.count_missing([c for c in self.clients if c.code != 1000], self.publisher.sent)
        faults = load.faults
        found = {
            "missing": float(faults.missing),
            "duplicate": float(faults.duplicate),
            "out of order": float(faults.out_of_order),
            "to the wrong client": float(faults.strange),
        }
        return found | loop_stalls(self.server)


def spread(late: Latencies) -> Figures:
    """Percentiles, in milliseconds."""
    found: Figures = {}
    for name, values in (("to each", late.each), ("to last", late.last)):
        for label, q in (("p50", 50.0), ("p99", 99.0), ("p99.9", 99.9)):
            value = float(np.percentile(values, q)) if len(values) else math.nan
            found[f"{name} {label} ms"] = value
    return found


def loop_stalls(server: Server) -> Figures:
    """The gateway's metrics of event-loop lag, if it has any."""
    return {
        name.removeprefix("wsgateway_").replace("_", " "): value
        for name, value in server.metrics().items()
        if ("stall" in name or "lag" in name) and not name.endswith(("_bucket", "_created"))
    }


@contextmanager
def gathered(bench: Bench, who: str, crowd: Crowd, *, stuck: int = 0) -> Iterator[Run]:
    """Start a server and connect a crowd; the last ``stuck`` clients never read."""
    template = Template(crowd.kinds, bench.options.size)
    with bench.serve(who) as server:
        load = Load(server.port, template)
        clients = [
            Client(i, target, expects)
            for i, (target, expects) in enumerate(zip(crowd.targets, crowd.expects, strict=True))
        ]
        for client in clients[len(clients) - stuck :] if stuck else ():
            client.socket.setsockopt(1, 8, 4096)  # SOL_SOCKET, SO_RCVBUF
        try:
            connect(bench, load, clients)
            run = Run(bench, who, server, load, crowd, template)
            if stuck:
                run.clients = clients[:-stuck]
                crowd.audience -= stuck
                for client in clients[-stuck:]:
                    load.stop_reading(client)
            yield run
            run.publisher.close()
        finally:
            load.shut()


def connect(
    bench: Bench, load: Load, clients: list[Client], *, at_once: int = 256, seconds: float = 120
) -> float:
    """Connect all clients; return the seconds it took."""
    before = load.ready
    show = bench.steps("connecting", len(clients))
    load.progress = lambda: show(load.ready - before)
    took = load.open(clients, at_once=at_once, seconds=seconds)
    load.progress = lambda: None
    show(len(clients))
    if load.ready - before < len(clients):
        why = ", ".join(f"{n} x {why}" for why, n in load.failed.most_common(3)) or "no answer"
        raise Broken(f"only {load.ready - before} of {len(clients)} connected: {why}")
    return took
