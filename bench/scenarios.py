"""The scenarios: what is done to a server, and which figures are measured."""

import math
import random
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Final
from urllib.parse import quote

import msgspec
import numpy as np
from rich.progress import Progress

from trio_gateway.core.messages import GAP

from . import crowd as crowds
from . import many as connections
from .backlog import Backlog, target
from .client import Client, Latencies, Load
from .crowd import Crowd, Template
from .processes import Cores, NotHere, Redis, Server, serve
from .publish import Pace, Publisher, paced, saturating

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


# The scenarios


def fanout(bench: Bench, who: str) -> Figures:
    """N clients in one branch: as many events as possible, or one at a time."""
    options = bench.options
    with gathered(bench, who, crowds.one_branch(options.clients)) as run:
        found = _fan_out(run, unbatched=options.unbatched, seconds=options.seconds)
        return found | run.faults()


def _fan_out(run: Run, *, unbatched: bool, seconds: float, warm_up: float = WARM_UP) -> Figures:
    # Servers that send frame by frame gain nothing from a longer queue, but empty it slowly.
    most = run.bench.options.window if run.who in {"gateway", "bun"} else 64
    window = 1 if unbatched else most
    pace = saturating(run.publisher, run.done, window)
    found, _ = run.measure(pace, seconds, warm_up=warm_up, latencies=unbatched)
    return found


def both(bench: Bench, who: str, seconds: float) -> tuple[Figures, Figures, Figures]:
    """Figures unbatched and saturated, and the errors of both; for the regression guard."""
    with gathered(bench, who, crowds.one_branch(bench.options.clients)) as run:
        slow = _fan_out(run, unbatched=True, seconds=seconds, warm_up=0.3)
        fast = _fan_out(run, unbatched=False, seconds=seconds, warm_up=0.3)
        return slow, fast, run.faults()


def mixed(bench: Bench, who: str) -> Figures:
    """All roles in many branches of one tenant, each staff member in several of them."""
    options = bench.options
    crowd = crowds.mixed(options.clients, options.branches, options.each)
    with gathered(bench, who, crowd) as run:
        pace = saturating(run.publisher, run.done, options.window)
        found, _ = run.measure(pace, options.seconds, latencies=False)
        masks = len(set(map(id, crowd.expects)))
        return found | {"audience": crowd.audience, "different ones": masks} | run.faults()


def small(bench: Bench, who: str) -> Figures:
    """Many branches with two clients each: the common case."""
    with gathered(bench, who, crowds.small_branches(bench.options.clients // 2)) as run:
        pace = saturating(run.publisher, run.done, bench.options.window)
        found, _ = run.measure(pace, bench.options.seconds, latencies=False)
        return found | run.faults()


def steady(bench: Bench, who: str) -> Figures:
    """Latency at a fixed rate of events."""
    options = bench.options
    with gathered(bench, who, crowds.one_branch(options.clients)) as run:
        found, late = run.measure(paced(run.publisher, options.rate), options.seconds)
        found["published late ms"] = run.publisher.late / 1e6
        _keep_spread(bench, who, late)
        return found | run.faults()


def _keep_spread(bench: Bench, who: str, late: Latencies) -> None:
    if len(late.last):
        shares = [*range(100), 99.5, 99.9]
        bench.series[f"{who}: publish to last client"] = {
            "percentile": [float(q) for q in shares],
            "ms": [float(v) for v in np.percentile(late.last, shares)],
        }


def slow(bench: Bench, who: str) -> Figures:
    """Some clients never read: how much slower are the others?"""
    options = bench.options
    others = options.clients - options.stuck
    with gathered(bench, who, crowds.one_branch(others)) as run:
        without, _ = run.measure(paced(run.publisher, options.rate), options.seconds)
        faults = run.faults()
    crowd = crowds.one_branch(options.clients)
    with gathered(bench, who, crowd, stuck=options.stuck) as run:
        rss = run.server.rss()
        beside, _ = run.measure(paced(run.publisher, options.rate), options.seconds)
        grown = (run.server.rss() - rss) / 1e6
        for name, number in run.faults().items():
            faults[name] = faults.get(name, 0) + number
    names = ("to each p99 ms", "to last p50 ms", "to last p99 ms", "to last p99.9 ms")
    found = {f"{name}, all reading": without[name] for name in names}
    found |= {f"{name}, {options.stuck} stuck": beside[name] for name in names}
    found["p99 to last, ratio"] = beside["to last p99 ms"] / without["to last p99 ms"]
    found["memory grown MB"] = grown
    found["CPU of the load client"] = beside["CPU of the load client"]
    return found | faults


def accepts(bench: Bench, who: str) -> Figures:
    """How fast clients connect: a connection counts from its first pong."""
    crowd = crowds.one_branch(bench.options.clients + 200)
    with bench.serve(who) as server:
        load = Load(server.port)
        clients = [Client(i, target, None) for i, target in enumerate(crowd.targets)]
        try:
            connect(bench, load, clients[:200])
            before, client = server.cpu(), time.process_time()
            took = connect(bench, load, clients[200:])
            client = time.process_time() - client
            waited = [(c.ready_at - c.began_at) / 1e6 for c in clients[200:]]
            return {
                "accepts/s": bench.options.clients / took,
                "CPU µs per accept": (server.cpu() - before) / bench.options.clients * 1e6,
                "client CPU µs per accept": client / bench.options.clients * 1e6,
                "CPU of the load client": client / took,
                "to first pong p50 ms": float(np.percentile(waited, 50)),
                "to first pong p99 ms": float(np.percentile(waited, 99)),
            }
        finally:
            load.shut()


def idle(bench: Bench, who: str) -> Figures:
    """The cost of an idle connection, and of a ping."""
    options = bench.options
    crowd = crowds.one_branch(options.clients)
    with bench.serve(who) as server:
        load = Load(server.port)
        clients = [Client(i, target, None) for i, target in enumerate(crowd.targets)]
        try:
            connect(bench, load, clients[:100])
            time.sleep(0.5)
            before = server.rss()
            connect(bench, load, clients[100:])
            load.settle(lambda: False, 1.0)
            rss = server.rss()
            cpu, began = server.cpu(), _clock()
            load.settle(lambda: False, options.seconds)
            idling = (server.cpu() - cpu) / ((_clock() - began) / 1e9)
            pings, asked = 4, load.pongs
            cpu = server.cpu()
            for _ in range(pings):
                for i, client in enumerate(clients):
                    load.ping(client)
                    if i % 200 == 199:
                        load.pump(0.01)
                until = _clock() + 1_100_000_000  # stay within the rate limit
                while _clock() < until:
                    load.pump(0.05)
            load.settle(lambda: load.pongs - asked >= pings * options.clients)
            cpu = server.cpu() - cpu
            answered = load.pongs - asked
            return {
                "KB per connection": (rss - before) / 1024 / (options.clients - 100),
                "RSS MB": rss / 1e6,
                "idle CPU": idling,
                "CPU µs per ping": cpu / max(1, answered) * 1e6,
                "unanswered pings": float(pings * options.clients - answered),
            } | loop_stalls(server)
        finally:
            load.shut()


def quiet(bench: Bench, who: str) -> Figures:
    """What a process costs while its clients say nothing but answer pings."""
    crowd = crowds.one_branch(bench.options.clients)
    with bench.serve(who) as server:
        load = Load(server.port)
        clients = [Client(i, target, None) for i, target in enumerate(crowd.targets)]
        try:
            connect(bench, load, clients)
            load.settle(lambda: False, 1.5)
            (cpu, waits), began = server.scheduled(), _clock()
            until = began + int(bench.options.seconds * 1e9)
            while _clock() < until:
                load.pump(min(0.1, (until - _clock()) / 1e9))
            after, seconds = server.scheduled(), (_clock() - began) / 1e9
            return {
                "idle CPU ms/s": (after[0] - cpu) / seconds * 1e3,
                "wake-ups/s": (after[1] - waits) / seconds,
            }
        finally:
            load.shut()


def storm(bench: Bench, who: str) -> Figures:
    """All clients are disconnected and reconnect at once."""
    options = bench.options
    if options.resume:
        return _resume_storm(bench, who)
    crowd = crowds.one_branch(options.clients)
    with bench.serve(who) as server:
        load = Load(server.port)
        clients = [Client(i, target, None) for i, target in enumerate(crowd.targets)]
        try:
            connect(bench, load, clients)
            before, client = server.cpu(), time.process_time()
            load.drop(clients)
            again = [
                Client(i, target, None) for i, target in enumerate(crowd.targets, options.clients)
            ]
            took = connect(bench, load, again, at_once=options.clients)
            return _returned(again, took) | {
                "CPU µs per return": (server.cpu() - before) / options.clients * 1e6,
                "client CPU µs per return": (time.process_time() - client) / options.clients * 1e6,
            }
        finally:
            load.shut()


def _returned(clients: list[Client], took: float) -> Figures:
    began = min(client.began_at for client in clients)
    waited = [(client.ready_at - began) / 1e9 for client in clients]
    return {
        "all back after s": took,
        "returns/s": len(clients) / took,
        "back p50 s": float(np.percentile(waited, 50)),
        "back p99 s": float(np.percentile(waited, 99)),
    }


def _resume_storm(bench: Bench, who: str) -> Figures:
    if who != "gateway":
        raise Broken("no resume there")
    options, redis = bench.options, bench.redis
    crowd = crowds.one_branch(options.clients)
    template = Template(crowd.kinds, options.size)
    redis.client.delete("events:critical")
    with bench.serve(who) as server:
        load = Load(server.port)
        first = [Client(i, f"{t}&last_event_id=", None) for i, t in enumerate(crowd.targets)]
        try:
            _stream(redis, template, 0, 10)
            connect(bench, load, first)
            load.settle(lambda: all(client.texts for client in first))
            # One more event after the answer, so that every client has an id to resume after.
            _stream(redis, template, 10, 1)
            load.settle(lambda: all(len(client.texts) > 1 for client in first))
            places = [msgspec.json.decode(client.texts[-1])["event_id"] for client in first]
            load.drop(first)
            _stream(redis, template, 11, options.missed)
            time.sleep(0.5)
            again = [
                Client(i + options.clients, f"{t}&last_event_id={quote(place)}", None)
                for i, (t, place) in enumerate(zip(crowd.targets, places, strict=True))
            ]
            commands, before = redis.commands(), server.cpu()
            client = time.process_time()
            began = _clock()
            connect(bench, load, again, at_once=options.clients)
            load.settle(lambda: all(len(c.texts) > options.missed for c in again))
            took = (_clock() - began) / 1e9
            cpu, client = server.cpu() - before, time.process_time() - client
            after = redis.commands()
            asked = {
                name: calls - commands.get(name, 0)
                for name, calls in after.items()
                if name not in {"info", "ping", "xread"} and calls > commands.get(name, 0)
            }
            found = _returned(again, took)
            found["replayed events/s"] = options.clients * options.missed / took
            found["CPU µs per return"] = cpu / options.clients * 1e6
            found["client CPU µs per return"] = client / options.clients * 1e6
            for name, calls in sorted(asked.items()):
                found[f"Redis: {name}"] = float(calls)
            return found | _resumed(again, options.missed)
        finally:
            load.shut()


def _stream(redis: Redis, template: Template, first: int, count: int) -> None:
    with redis.client.pipeline(transaction=False) as pipeline:
        for n in range(first, first + count):
            pipeline.xadd("events:critical", {"data": template.payload(n, _clock())})
        pipeline.execute()


def _resumed(clients: list[Client], missed: int) -> Figures:
    """Count the errors: each client must get its answer, then the missed events in order."""
    expected = list(range(11, 11 + missed))
    found = {"missing": 0.0, "duplicate": 0.0, "out of order": 0.0, "not recovered": 0.0}
    for client in clients:
        said = [msgspec.json.decode(text) for text in client.texts]
        if not said or said[0].get("recovered") is not True:
            found["not recovered"] += 1
        got = [event["n"] for event in said if "n" in event]
        found["missing"] += len(set(expected) - set(got))
        found["duplicate"] += len(got) - len(set(got))
        found["out of order"] += got != sorted(got)
    return found


def soak(bench: Bench, who: str) -> Figures:
    """Clients connect and leave for minutes, while events are published."""
    options = bench.options
    seconds = options.minutes * 60
    with gathered(bench, who, crowds.one_branch(options.clients)) as run:
        load, chance = run.load, random.Random(23)
        live = list(run.clients)
        pace = paced(run.publisher, options.rate)
        began = next_churn = next_look = _clock()
        looked: dict[str, list[float]] = {"seconds": [], "RSS MB": [], "connections": []}
        left = 0

        def churning(now: int) -> tuple[int, float]:
            nonlocal next_churn, next_look, left
            if now >= next_churn:
                next_churn += int(1e9 / options.churn)
                at = chance.randrange(len(live))
                if live[at].ready:
                    old = live[at]
                    load.close(old)
                    new = live[at] = Client(
                        len(load.clients), crowds.one_branch(1).targets[0], old.expects
                    )
                    run.clients.append(new)
                    load.start(new)
                    left += 1
            if now >= next_look:
                next_look += 2_000_000_000
                looked["seconds"].append((now - began) / 1e9)
                looked["RSS MB"].append(run.server.rss() / 1e6)
                looked["connections"].append(float(load.ready))
            count, wait = pace(now)
            return count, min(wait, max(0.0, (next_churn - now) / 1e9))

        found, _ = run.measure(churning, seconds)
        bench.series[f"{who}: memory"] = looked
        third = len(looked["RSS MB"]) // 3
        found["RSS MB after a third"] = looked["RSS MB"][third]
        found["RSS MB at the end"] = looked["RSS MB"][-1]
        found["came and went"] = float(left)
        found["lost connections"] = float(sum(n for code, n in load.closed.items() if code != 1000))
        return found | run.faults()


_AUDIENCES: Final = (1, 3, 10, 30, 100, 300, 1000, 2000)
_BYSTANDERS: Final = (0, 1000, 2000, 4000, 8000)
_RATES: Final = (10, 30, 100, 300, 1000, 3000, 10_000)


def growth(bench: Bench, who: str) -> Figures:
    """How costs grow with the audience, with other connections, and with the rate of events."""
    options = bench.options
    found: Figures = {}
    names = ("CPU µs per delivery", "CPU of the server", "events/s", "to last p99 ms")

    def note(what: str, x: float, figures: Figures) -> None:
        series = bench.series.setdefault(f"{who}: by {what}", {what: []})
        series[what].append(x)
        for name in names:
            series.setdefault(name, []).append(figures[name])
        found[f"{what} {x:g}: CPU µs per delivery"] = figures["CPU µs per delivery"]
        found[f"{what} {x:g}: to last p99 ms"] = figures["to last p99 ms"]

    for audience in _AUDIENCES:
        with gathered(bench, who, crowds.one_branch(audience)) as run:
            pace = saturating(run.publisher, run.done, 1)
            note("audience", audience, run.measure(pace, options.seconds)[0])
    for others in _BYSTANDERS if who == "gateway" else ():
        with gathered(bench, who, crowds.one_branch(100, elsewhere=others)) as run:
            pace = saturating(run.publisher, run.done, 1)
            note("other connections", others, run.measure(pace, options.seconds)[0])
    for rate in _RATES:
        with gathered(bench, who, crowds.one_branch(100)) as run:
            due = _bounded(paced(run.publisher, rate), run, options.window)
            note("events a second", rate, run.measure(due, options.seconds)[0])
    return found


def _bounded(pace: Pace, run: Run, window: int) -> Pace:
    """Publish at that pace, but slower if the server can't follow."""

    def due(now: int) -> tuple[int, float]:
        if run.publisher.sent - run.done() > window:
            return 0, 0.01
        return pace(now)

    return due


def many(bench: Bench, who: str) -> Figures:
    """As many connections as the machine can hold, over several processes; one event a branch."""
    options = bench.options
    size = connections.Size(
        options.clients, options.branches, options.processes, options.size, options.seconds
    )
    return connections.measure(bench.redis, bench.cores, size, bench.settings)


_BACKLOG: Final = 100_000  # events
_MISSED: Final = 20_000


def elsewhere(bench: Bench, who: str) -> Figures:
    """Measure stream events of 100 tenants, none of which has a client here, then a resume."""
    options = bench.options
    with bench.serve(who) as server:
        load = Load(server.port)
        backlog = Backlog(bench.redis.client, server, options.size)
        try:
            backlog.read_at_once(_BACKLOG // 4, load)  # to warm up
            cpu, took = backlog.read_at_once(_BACKLOG, load)
            before, began = server.cpu(), time.monotonic()
            backlog.add_paced(options.rate, options.seconds)
            backlog.wait_received(load)
            paced_cpu = (server.cpu() - before) / (time.monotonic() - began)
            got = backlog.resume(load, 7, _MISSED)
            return {
                "events/s": _BACKLOG / took,
                "CPU µs per event": cpu / _BACKLOG * 1e6,
                f"CPU at {options.rate:g} events/s": paced_cpu,
                "missing": float(abs(_MISSED // 100 - got)),
            }
        finally:
            load.shut()


def tenth(bench: Bench, who: str) -> Figures:
    """Measure stream events of 100 tenants, ten of which have a client here."""
    options = bench.options
    with bench.serve(who) as server:
        load = Load(server.port)
        backlog = Backlog(bench.redis.client, server, options.size)
        clients = [Client(i, target(i + 1), None) for i in range(10)]
        try:
            connect(bench, load, clients)
            backlog.read_at_once(_BACKLOG // 4, load)
            cpu, took = backlog.read_at_once(_BACKLOG, load)
            load.settle(lambda: False, 1.0)
            got = sum(b'"event_id"' in text for client in clients for text in client.texts)
            return {
                "events/s": _BACKLOG / took,
                "CPU µs per event": cpu / _BACKLOG * 1e6,
                "missing": float(abs(backlog.added // 10 - got)),
            }
        finally:
            load.shut()


_BURST: Final = 50_000  # events
_BURST_OVER: Final = 4.0  # seconds without a byte


def burst(bench: Bench, who: str) -> Figures:
    """Many events at once, while all clients read as fast as they can: how many are missing?"""
    options = bench.options
    with gathered(bench, who, crowds.one_branch(options.clients), stuck=options.stuck) as run:
        load, publisher = run.load, run.publisher
        load.logging = False
        cpu, began = run.server.cpu(), time.monotonic()
        while publisher.sent < _BURST:
            publisher.publish(min(256, _BURST - publisher.sent))
            load.pump(0)
        published = time.monotonic() - began
        load.settle(
            lambda: not any(load.missed(c, _BURST) for c in run.clients if c.ready), _BURST_OVER
        )
        took = time.monotonic() - began
        cpu = run.server.cpu() - cpu
        metrics = run.server.metrics()
        found = {
            "published in s": published,
            "delivered in s": took,
            "CPU µs per delivery": cpu / _BURST / len(run.clients) * 1e6,
            "dropped": metrics.get("wsgateway_events_dropped_total", 0.0),
            "lags": metrics.get("wsgateway_lags_total", 0.0),
            "gaps told": float(sum(client.texts.count(GAP) for client in run.clients)),
            "lost connections": float(options.clients - load.ready),
        }
        return found | run.faults()


@dataclass(frozen=True)
class Scenario:
    """A scenario; ``rooms`` says whether the baselines, which have one room, can run it."""

    run: Callable[[Bench, str], Figures]
    defaults: Options
    rooms: bool = True
    plotted: tuple[str, ...] = ("CPU µs per delivery", "deliveries/s")

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


_PLAIN: Final = Options()
SCENARIOS: Final[dict[str, Scenario]] = {
    "fanout": Scenario(fanout, _PLAIN),
    "mixed": Scenario(mixed, replace(_PLAIN, each=20), rooms=False),
    "small": Scenario(small, replace(_PLAIN, clients=10_000, window=2000), rooms=False),
    "steady": Scenario(
        steady, replace(_PLAIN, seconds=30.0), plotted=("to last p50 ms", "to last p99 ms")
    ),
    "storm": Scenario(
        storm, replace(_PLAIN, clients=2000), plotted=("all back after s", "CPU µs per return")
    ),
    "idle": Scenario(
        idle, replace(_PLAIN, clients=10_000), plotted=("KB per connection", "CPU µs per ping")
    ),
    "quiet": Scenario(
        quiet, replace(_PLAIN, clients=300, seconds=30.0), plotted=("idle CPU ms/s",)
    ),
    "slow": Scenario(
        slow, replace(_PLAIN, rate=100.0, seconds=10.0), plotted=("p99 to last, ratio",)
    ),
    "accepts": Scenario(
        accepts, replace(_PLAIN, clients=4000), plotted=("accepts/s", "CPU µs per accept")
    ),
    "soak": Scenario(soak, replace(_PLAIN, rate=50.0)),
    "many": Scenario(
        many,
        replace(_PLAIN, clients=200_000, branches=2000, processes=8),
        rooms=False,
        plotted=("accepts/s", "KB per connection"),
    ),
    "elsewhere": Scenario(elsewhere, replace(_PLAIN, rate=10_000.0), rooms=False),
    "tenth": Scenario(tenth, _PLAIN, rooms=False),
    "burst": Scenario(
        burst, replace(_PLAIN, clients=50, stuck=0), plotted=("delivered in s", "missing")
    ),
    "growth": Scenario(growth, replace(_PLAIN, seconds=2.0)),
}


def run(bench: Bench, name: str, who: str) -> Figures:
    """Run one scenario on one server."""
    scenario = SCENARIOS[name]
    if who != "gateway" and not scenario.rooms:
        raise Broken(f"{name} needs more than one room")
    try:
        return scenario.run(bench, who)
    except (Broken, NotHere):
        raise
    except (OSError, RuntimeError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def options_of(name: str, chosen: dict[str, Any]) -> Options:
    """A scenario's default options, replaced by the chosen ones."""
    return replace(SCENARIOS[name].defaults, **{k: v for k, v in chosen.items() if v is not None})
