"""Scenarios of connections: what it costs to admit them, to keep them, and to let them resume."""

import time
from urllib.parse import quote

import msgspec
import numpy as np

from . import crowd as crowds
from . import many as connections
from .client import Client, Load
from .crowd import Template
from .processes import Redis
from .runs import Bench, Broken, Figures, connect, loop_stalls

_clock = time.monotonic_ns


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


def many(bench: Bench, who: str) -> Figures:
    """As many connections as the machine can hold, over several processes; one event a branch."""
    options = bench.options
    size = connections.Size(
        options.clients, options.branches, options.processes, options.size, options.seconds
    )
    return connections.measure(bench.redis, bench.cores, size, bench.settings)
