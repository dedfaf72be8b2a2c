"""The file of measured figures: each run changes its own, and only with figures that hold."""

import copy
import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.all import Failed, measure
from bench.published import FILE, LOST, RUNS, Run, entry, merge, read
from tools import performance

LINE: dict[str, Any] = {
    "at": "2026-01-02T03:04:05Z",
    "machine": {"cpu": "A CPU", "cores": 2, "kernel": "6.1", "python": "3.11.7"},
    "versions": {"trio": "1.2", "redis": "valkey 9"},
    "load_average": [0.5, 0.7],
    "repeats": [{}, {}],
    "figures": {
        "gateway": {"accepts/s": 3000.0, "CPU µs per accept": 300.0, "missing": 1, "duplicate": 2},
        "bun": {"accepts/s": 12_000.0, "CPU µs per accept": 80.0},
        "naive": {"accepts/s": None},
    },
    "ratios": {"bun": {"accepts/s": 0.25}},
}


def test_entry_records_time_machine_and_parallel_load() -> None:
    found = entry(RUNS["accepts"], LINE)
    assert (found["date"], found["load_average"], found["repeats"]) == ("2026-01-02", 0.7, 2)
    assert found["machine"] == "2 cores of A CPU, Linux 6.1, Python 3.11, trio 1.2"
    rate, cpu, lost = found["figures"]
    assert rate == {
        "figure": "accepts/s", "unit": "/s", "gateway": 3000.0, "beside": {"bun": 12_000.0},
        "ratio": {"bun": 0.25},
    }  # fmt: skip
    assert cpu["beside"] == {"bun": 80.0}
    assert lost == {"figure": LOST, "gateway": 3}


def test_run_changes_only_its_own_figures(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge({"steady": {"figures": [1]}, "accepts": {"figures": [2]}}, path)
    merge({"accepts": {"figures": [3]}}, path)
    assert read(path) == {"steady": {"figures": [1]}, "accepts": {"figures": [3]}}
    assert list(tmp_path.iterdir()) == [path]


def test_file_that_cannot_be_written_completely_is_unchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "results.json"
    merge({"steady": {"figures": [1]}}, path)
    before = path.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        merge({"steady": {"figures": [2]}}, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def measured(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "bench.all", *arguments],
        cwd=FILE.parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_run_that_is_skipped_for_time_keeps_the_old_figures(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    merge({"storm": {"figures": [1]}}, path)
    done = measured("--minutes", "0.0001", "--results", str(path), "storm", "small")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "Error: not measured: storm, small"
    assert read(path) == {"storm": {"figures": [1]}}


def test_hung_run_is_killed_with_its_children() -> None:
    code = "import subprocess, sys; subprocess.run(['sleep', '7654'], start_new_session=True)"
    with pytest.raises(Failed, match="longer than 1 s"):
        measure(Run(("timeit", "-n1", code), (), 1.0), 60, quick=False, repeat=1)
    ends = time.monotonic() + 5
    while is_running(b"sleep\x007654\x00"):  # a killed process ends a moment later
        assert time.monotonic() < ends
        time.sleep(0.01)


def is_running(command: bytes) -> bool:
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has ended meanwhile
            if path.read_bytes() == command:
                return True
    return False


@pytest.mark.parametrize(
    ("run", "why"),
    [
        (Run(("timeit", "-n1", "raise SystemExit(3)"), (), 9), "ended with status"),
        (Run(("timeit", "-n1", "pass"), (), 9), "printed no JSON line"),
        (Run(("compileall", "-h"), (), 0), "the time was up"),
    ],
    ids=["status", "no JSON", "no time"],
)
def test_failed_run_has_no_figures(run: Run, why: str) -> None:
    with pytest.raises(Failed, match=why):
        measure(run, 60, quick=False, repeat=1)


def test_results_in_the_repository_belong_to_existing_runs() -> None:
    found = json.loads(FILE.read_text("utf-8"))
    assert list(found) == [name for name in RUNS if name in found]
    for name, run in found.items():
        assert {"date", "machine", "load_average", "repeats", "figures"} <= run.keys()
        known = {figure.key for figure in RUNS[name].figures} | {LOST}
        assert not RUNS[name].figures or {row["figure"] for row in run["figures"]} <= known


@pytest.mark.parametrize("name", performance.TABLES)
def test_tables_can_be_made_without_results_and_with_all(name: str) -> None:
    assert performance.TABLES[name]({}) is not None
    every: dict[str, Any] = {}
    for run, spec in RUNS.items():
        keys = [figure.key for figure in spec.figures] or ["direct: KB", "audience 1: CPU µs"]
        line = copy.deepcopy(LINE) | {"figures": {"gateway": dict.fromkeys(keys, 12.3)}}
        every[run] = entry(Run(spec.arguments, (), 1, spec.figures), line)
    assert "not measured" not in performance.TABLES[name](every) or name == "sizing"
