"""The tables of figures in docs/performance.md and docs/deploy.md, from ``bench/results.json``."""

import math
from collections.abc import Callable, Iterable, Mapping
from itertools import groupby
from typing import Any, Final

from bench.published import LOST, RUNS, Results, read

from .markdown import table

UNKNOWN: Final = "not measured yet"
# The required values, by run and figure.
_BARS: Final = {
    ("unbatched", "CPU µs per delivery"): "≤ 1.5 × `floor`",
    ("saturated", "deliveries/s"): "≥ 4 million, ≥ 100 × `naive`",
    ("mixed", "deliveries/s"): "≥ 1.5 million",
    ("small", "events/s"): "≥ 35,000",
    ("elsewhere", "CPU µs per event"): "≤ 5",
    ("elsewhere", "CPU at 10000 events/s"): "≤ 0.15",
    ("tenth", "events/s"): "≥ 70,000",
    ("steady", "to last p99 ms"): "≤ 10",
    ("steady", "CPU µs per delivery"): "≤ 8",
    ("slow", "p99 to last, ratio"): "≤ 1.2",
    ("burst", "dropped"): "0",
    ("burst", "gaps told"): "0",
    ("burst, one stuck", "gaps told"): "0",
    ("shards", "most, placed by HAProxy"): "≤ 1.3",
    ("accepts", "accepts/s"): "≥ 6,000",
    ("idle", "KB per connection"): "≤ 11",
    ("quiet", "idle CPU ms/s"): "≤ 1.5",
    ("quiet", "wake-ups/s"): "≤ 4",
}
_TRANSPORTS: Final = {
    "direct": "direct: a WebSocket",
    "asgi": "ASGI: a WebSocket after another request on its connection",
    "event stream": "Server-Sent Events",
}


def short(value: float) -> str:
    """Format a value with three significant digits, and millions in words."""
    if value >= 1e6:
        return f"{value / 1e6:.3g} million"
    if value >= 1000:
        return f"{round(value, 2 - math.floor(math.log10(value))):,.0f}"
    return f"{value:.3g}"


def _value(results: Results, run: str, figure: str, of: str = "gateway") -> float | None:
    for row in results.get(run, {}).get("figures", ()):
        if row["figure"] == figure:
            found: float | None = row[of]
            return found
    return None


def measured_on(results: Results) -> str:
    """Where and when the runs took place: a line for each machine and date."""
    lines = []
    for (machine, date), runs in groupby(
        sorted(results.items(), key=lambda run: _where(run[1])), key=lambda run: _where(run[1])
    ):
        names, loads, repeats = [], [], set()
        for name, run in runs:
            names.append(name)
            loads.append(run["load_average"])
            repeats.add(run["repeats"])
        load = (
            "load average not known"
            if None in loads
            else f"load average before a run {short(min(loads))} to {short(max(loads))}"
        )
        times = " or ".join(map(str, sorted(repeats)))
        lines.append(f"- {machine}; {date}; {load}; runs of each: {times}: {', '.join(names)}\n")
    return "".join(lines)


def _where(run: Mapping[str, Any]) -> tuple[str, str]:
    return run["machine"], run["date"]


def figures(results: Results) -> str:
    """A row for each figure, with those of other servers in the same run."""
    rows = []
    for name, run in RUNS.items():
        for figure in run.figures:
            found = results.get(name, {}).get("figures", ())
            row = next((row for row in found if row["figure"] == figure.key), None)
            rows.append(
                (
                    f"`{name}`: {run.title}",
                    figure.key,
                    _BARS.get((name, figure.key), ""),
                    f"**{short(row['gateway'])}**" if row else UNKNOWN,
                    _beside(row) if row else "",
                )
            )
    lost = [_value(results, name, LOST) for name in results]
    total = sum(each for each in lost if each is not None)
    rows.append(("all of these", LOST, "0", short(total) if results else UNKNOWN, ""))
    head = "run", "figure", "bar", "gateway", "other servers in the same run (gateway / it)"
    return table(head, *rows)


def _beside(row: Mapping[str, Any]) -> str:
    beside, ratio = row.get("beside", {}), row.get("ratio", {})
    parts = []
    for who in dict.fromkeys([*beside, *ratio]):
        value = short(beside[who]) if who in beside else ""
        times = f"{short(ratio[who])} ×" if who in ratio else ""
        parts.append(f"{who} {value} ({times})" if value and times else f"{who} {value}{times}")
    return ", ".join(parts)


def _grid(
    results: Results, run: str, rows: Mapping[str, str], columns: Mapping[str, str], corner: str
) -> str:
    """A table of a run's figures named ``row: column``; the mappings have the titles."""
    body: list[Iterable[str]] = []
    for row, title in rows.items():
        values = [_value(results, run, f"{row}: {column}") for column in columns]
        body.append([title, *("" if value is None else short(value) for value in values)])
    return table([corner, *columns.values()], *(body or [[UNKNOWN, *[""] * len(columns)]]))


def _rows_of(results: Results, run: str) -> dict[str, str]:
    """The rows of a run: the part before the colon in the names of its figures."""
    names = [row["figure"] for row in results.get(run, {}).get("figures", ())]
    return {name.rpartition(": ")[0]: name.rpartition(": ")[0] for name in names if ": " in name}


def transports(results: Results) -> str:
    columns = {
        "accept µs": "µs of CPU to accept one",
        "KB": "KB of memory",
        "ping µs": "µs of CPU for a ping",
        "delivery µs": "µs of CPU for a delivery",
    }
    known = _rows_of(results, "transports")
    rows = {name: title for name, title in _TRANSPORTS.items() if name in known}
    return _grid(results, "transports", rows, columns, "transport")


def compression(results: Results) -> str:
    columns = {"bytes": "bytes on the wire", "µs": "µs of CPU a delivery"}
    return _grid(results, "compression", _rows_of(results, "compression"), columns, "event")


def growth(results: Results) -> str:
    columns = {"CPU µs per delivery": "µs of CPU a delivery", "to last p99 ms": "p99 to last, ms"}
    return _grid(results, "growth", _rows_of(results, "growth"), columns, "with")


def sizing(results: Results) -> str:
    """The figures for planning a deployment."""

    def get(run: str, figure: str, text: str) -> str:
        value = _value(results, run, figure)
        return UNKNOWN if value is None else text.format(short(value))

    accepts = get("accepts", "CPU µs per accept", "{} µs of CPU")
    if (rate := _value(results, "accepts", "accepts/s")) is not None:
        accepts += f", {short(rate)} a second"
    return table(
        ("what", "costs"),
        (
            "an idle connection",
            get("idle", "KB per connection", "{} KB of memory"),
        ),
        ("accepting a connection", accepts),
        ("a client's ping", get("idle", "CPU µs per ping", "{} µs of CPU")),
        (
            "an event for one client, alone",
            get("growth", "audience 1: CPU µs per delivery", "{} µs of CPU"),
        ),
        (
            "an event for 400 clients, alone, for each client",
            get("unbatched", "CPU µs per delivery", "{} µs of CPU"),
        ),
        (
            "many waiting events for 400 clients",
            get("saturated", "deliveries/s", "{} deliveries a second"),
        ),
    )


# What the model of a deployment assumes.
_PER_PROCESS: Final = 20_000  # connections, so that a process that ends is no large loss
_PER_BRANCH: Final = 10  # connections; half of them receive an event
_EVENTS_PER_BRANCH: Final = 0.1  # a second
_PING_EVERY: Final = 25  # seconds
_SIZES: Final = (1_000, 10_000, 100_000, 1_000_000)  # connections


def capacity(results: Results) -> str:
    """A model: what numbers of connections need, from the measured costs of one."""
    costs = {
        name: _value(results, run, figure)
        for name, (run, figure) in {
            "KB": ("idle", "KB per connection"),
            "kernel KB": ("many", "kernel KB per connection"),
            "process MB": ("many", "RSS MB of an empty process"),
            "accept": ("accepts", "CPU µs per accept"),
            "ping": ("idle", "CPU µs per ping"),
            "delivery": ("unbatched", "CPU µs per delivery"),
            "event": ("small", "events/s"),
        }.items()
    }
    known = {name: value for name, value in costs.items() if value is not None}
    head = (
        "connections", "branches", "events/s", "processes", "memory", "of the kernel",
        "cores in use", "all reconnect in",
    )  # fmt: skip
    if len(known) < len(costs):
        return table(head, [UNKNOWN, *[""] * (len(head) - 1)])
    rows = []
    for connections in _SIZES:
        branches = connections // _PER_BRANCH
        events = branches * _EVENTS_PER_BRANCH
        processes = max(2, math.ceil(connections / _PER_PROCESS))
        memory = processes * known["process MB"] / 1000 + connections * known["KB"] / 1e6
        # An event reaches one process, as with placement and a shard for each process.
        busy = connections / _PING_EVERY * known["ping"] / 1e6 + events / known["event"]
        busy += events * _PER_BRANCH / 2 * known["delivery"] / 1e6
        rows.append(
            (
                f"{connections:,}",
                f"{branches:,}",
                f"{events:,.0f}",
                str(processes),
                f"{short(memory)} GB",
                # Measured with both ends of each connection on one machine.
                f"{short(connections * known['kernel KB'] / 2 / 1e6)} GB",
                short(busy),
                f"{short(connections / processes * known['accept'] / 1e6)} s",
            )
        )
    return table(head, *rows)


TABLES: Final[Mapping[str, Callable[[Results], str]]] = {
    made.__name__: made
    for made in (
        measured_on,
        figures,
        growth,
        transports,
        compression,
        sizing,
        capacity,
    )
}


def tables(results: Results | None = None) -> dict[str, Callable[[], str]]:
    """The tables by name, for :mod:`tools.tables`."""
    found = read() if results is None else results
    return {name: lambda make=make: make(found) for name, make in TABLES.items()}  # type: ignore[misc]
