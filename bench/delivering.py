"""Scenarios of events: how fast they are delivered, how late, and to how many."""

import random
import time
from typing import Final

import numpy as np

from trio_gateway.core.messages import GAP

from . import crowd as crowds
from .client import Client, Latencies
from .publish import Pace, paced, saturating
from .runs import WARM_UP, Bench, Figures, Run, gathered

_clock = time.monotonic_ns


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
