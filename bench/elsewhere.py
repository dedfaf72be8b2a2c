"""Scenarios of a stream whose tenants have few clients here, or none."""

import time
from typing import Final

from .backlog import Backlog, target
from .client import Client, Load
from .runs import Bench, Figures, connect

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
