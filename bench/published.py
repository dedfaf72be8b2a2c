"""The figures that the docs publish: the runs that measure them, and the file that stores them.

``python -m bench.all`` measures them and writes the file; ``python -m tools.tables`` makes the
tables of the docs from it.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

FILE: Final = Path(__file__).parent / "results.json"
LOST: Final = "missing, duplicate, out of order or to the wrong client"
_LOST: Final = ("missing", "duplicate", "out of order", "to the wrong client")

Results = dict[str, dict[str, Any]]  # by the names of RUNS


class Figure(NamedTuple):
    """``key`` is the name of the figure in the run's JSON."""

    key: str
    unit: str = ""


@dataclass(frozen=True)
class Run:
    """Arguments for ``python -m``, with others for a quick test.

    A run may take ``limit`` seconds. If ``figures`` is empty, all figures of the run are published.
    """

    arguments: Sequence[str]
    quick: Sequence[str]
    limit: float
    figures: Sequence[Figure] = ()
    title: str = ""


_OTHERS: Final = ("--against", "floor,naive,fastapi,websockets,bun")
_CPU: Final = Figure("CPU µs per delivery", "µs")
_RATE: Final = Figure("deliveries/s", "/s")
_EVENTS: Final = Figure("events/s", "/s")
_BACK: Final = Figure("all back after s", "s")
_SHORT: Final = ("--seconds", "0.5")
_FEW: Final = ("--clients", "300")

_MANY: Final = (
    Figure("accepts/s", "/s"), Figure("CPU µs per accept", "µs"),
    Figure("KB per connection", "KB"), Figure("kernel KB per connection", "KB"),
    Figure("RSS MB of an empty process", "MB"), Figure("idle CPU", "cores"),
    Figure("all delivered after s", "s"), Figure("CPU µs per delivery", "µs"),
)  # fmt: skip
_FEW_OF_MANY: Final = (
    "--clients",
    "330",
    "--branches",
    "33",
    "--processes",
    "3",
    "--seconds",
    "0.5",
)

RUNS: Final[Mapping[str, Run]] = {
    "unbatched": Run(
        ("bench", "fanout", "--unbatched", *_OTHERS), _SHORT, 90, (_CPU,),
        "one event at a time, 400 clients of one branch",
    ),
    "saturated": Run(
        ("bench", "fanout", *_OTHERS), _SHORT, 90, (_RATE, _CPU),
        "as many events as possible, 400 clients of one branch",
    ),
    "mixed": Run(
        ("bench", "mixed"), _SHORT, 40, (_RATE, _EVENTS, _CPU),
        "400 clients of all roles, each of the staff in 20 of 40 branches",
    ),
    "mixed, one each": Run(
        ("bench", "mixed", "--each", "1"), _SHORT, 40, (_RATE, _EVENTS, _CPU),
        "the same, each of the staff in one branch",
    ),
    "small": Run(
        ("bench", "small"), (*_SHORT, *_FEW), 60, (_EVENTS,), "5,000 branches of two clients each"
    ),
    "elsewhere": Run(
        ("bench", "elsewhere"), _SHORT, 60,
        (Figure("CPU µs per event", "µs"), _EVENTS, Figure("CPU at 10000 events/s")),
        "stream events of 100 tenants, none of which has a client here",
    ),
    "tenth": Run(
        ("bench", "tenth"), _SHORT, 60, (_EVENTS, Figure("CPU µs per event", "µs")),
        "stream events of 100 tenants, ten of which have a client here",
    ),
    "steady": Run(
        ("bench", "steady", "--seconds", "15", "--against", "floor,bun"), _SHORT, 90,
        (Figure("to last p50 ms", "ms"), Figure("to last p99 ms", "ms"), _CPU),
        "10 events/s, from publish to the last of 400 clients",
    ),
    "slow": Run(
        ("bench", "slow"), _SHORT, 60, (Figure("p99 to last, ratio", "×"),),
        "p99 of the others when 20 of 400 clients do not read",
    ),
    "burst": Run(
        ("bench", "burst"), ("--clients", "10"), 40,
        (Figure("delivered in s", "s"), Figure("dropped"), Figure("gaps told")),
        "50,000 Pub/Sub events at once, 50 clients",
    ),
    "burst, one stuck": Run(
        ("bench", "burst", "--stuck", "1"), ("--clients", "10"), 40,
        (Figure("delivered in s", "s"), Figure("dropped"), Figure("gaps told")),
        "the same beside one client that does not read",
    ),
    "accepts": Run(
        ("bench", "accepts", "--against", "naive,bun"), _FEW, 60,
        (Figure("accepts/s", "/s"), Figure("CPU µs per accept", "µs")), "4,000 clients connect",
    ),
    "accepts, one service": Run(
        ("bench", "accepts", "--set", "WS_CLUSTER=true"), _FEW, 40,
        (Figure("accepts/s", "/s"), Figure("CPU µs per accept", "µs")),
        "the same with `WS_CLUSTER=true`",
    ),
    "idle": Run(
        ("bench", "idle", "--clients", "5000", "--against", "bun,websockets"),
        (*_SHORT, *_FEW), 120,
        (Figure("KB per connection", "KB"), Figure("CPU µs per ping", "µs")), "5,000 idle clients",
    ),
    "quiet": Run(
        ("bench", "quiet", "--seconds", "20"), (*_SHORT, *_FEW), 60,
        (Figure("idle CPU ms/s", "ms/s"), Figure("wake-ups/s", "/s")),
        "a process whose 300 clients only answer pings",
    ),
    "storm": Run(
        ("bench", "storm", "--resume"), _FEW, 40, (_BACK, Figure("CPU µs per return", "µs")),
        "2,000 clients reconnect at once and resume, 50 events each",
    ),
    "big storm": Run(
        ("bench", "storm", "--resume", "--clients", "10000", "--missed", "100"), _FEW, 90,
        (_BACK, Figure("CPU µs per return", "µs")),
        "10,000 clients reconnect at once and resume, 100 events each",
    ),
    "many": Run(
        ("bench", "many", "--clients", "20000", "--branches", "400", "--processes", "2"),
        _FEW_OF_MANY, 90, _MANY,
        "20,000 connections in 400 branches over 2 processes, then an event for each branch",
    ),
    "shards": Run(
        ("bench.shards",), ("4", "16", "64"), 240,
        tuple(Figure(f"most, placed by {what}") for what in ("shard", "tenant", "HAProxy")),
        "events that the busiest of 8 processes reads, 64 shards, 512 tenants; 1 is an eighth of"
        " all",
    ),
    "growth": Run(
        ("bench", "growth", "--seconds", "1"), _SHORT, 200,
        (), "how costs grow",
    ),
    "transports": Run(("bench.transports", "200"), ("20",), 90),
    "compression": Run(("bench.compression", "200"), ("20",), 90),
    "most": Run(
        ("bench", "many", "--processes", "11"), _FEW_OF_MANY, 420, _MANY,
        "200,000 connections in 2,000 branches over 11 processes, then an event for each branch",
    ),
}  # fmt: skip


def read(path: Path = FILE) -> Results:
    """Read the measured figures; none if there is no file yet."""
    try:
        found: Results = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    return found


def entry(run: Run, line: Mapping[str, Any]) -> dict[str, Any]:
    """Make the entry of a run in the file, from the JSON line that the run prints last."""
    by_server = line["figures"]
    ours, ratios = by_server["gateway"], line.get("ratios", {})
    figures = []
    for figure in run.figures or [Figure(key) for key in ours]:
        if ours[figure.key] is None:  # for example because nothing was delivered
            continue
        row: dict[str, Any] = {"figure": figure.key, "unit": figure.unit}
        row["gateway"] = ours[figure.key]
        beside = {who: found.get(figure.key) for who, found in by_server.items()}
        row["beside"] = {w: v for w, v in beside.items() if w != "gateway" and v is not None}
        row["ratio"] = {w: r[figure.key] for w, r in ratios.items() if figure.key in r}
        figures.append({name: value for name, value in row.items() if value not in ("", {})})
    if any(name in ours for name in _LOST):
        lost = sum(ours.get(name, 0) for name in _LOST)
        figures.append({"figure": LOST, "gateway": lost})
    return {
        "command": " ".join(("python -m", *run.arguments)),
        "date": line["at"][:10],
        "machine": machine(line["machine"], line["versions"]),
        "load_average": max(line["load_average"]),
        "repeats": len(line.get("repeats", [None])),
        "figures": figures,
    }


def machine(found: Mapping[str, Any], versions: Mapping[str, str]) -> str:
    """Describe in one line what the figures depend on."""
    cpu = f"{found['cores']} cores of {found['cpu']}, Linux {found['kernel']}"
    python = ".".join(found["python"].split(".")[:2])
    parts = [f"{name} {versions[name]}" for name in ("trio", "hypercorn") if name in versions]
    return ", ".join([cpu, f"Python {python}", *parts])


def merge(changes: Results, path: Path = FILE) -> None:
    """Replace these runs in the file; the others stay.

    The file is replaced atomically: it is the old one or the new one, also if we are stopped.
    """
    found = read(path) | changes
    ordered = {name: found[name] for name in RUNS if name in found}
    text = json.dumps(ordered, ensure_ascii=False, indent=1) + "\n"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".results-") as folder:
        new = Path(folder, path.name)
        new.write_text(text, "utf-8")
        os.replace(new, path)
