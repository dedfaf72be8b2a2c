"""``python -m bench.all``: measure what the docs publish, and put it into ``bench/results.json``.

Each run is a process of its own with a time limit, and is written as soon as it is over: one that
fails, hangs or is not reached any more leaves what was measured before.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import click

from .processes import descendants
from .published import FILE, RUNS, Run, entry, merge

MINUTES: Final = 12.0  # for all of it
_PATIENCE: Final = 15.0  # seconds for a run to end when it is told to


class Failed(RuntimeError):  # noqa: N818 - an outcome
    """Why a run has no figures."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="See that it works, in two minutes; writes no file.")
@click.option("--minutes", default=MINUTES, show_default=True, help="No run goes on after that.")
@click.option("--repeat", default=1, show_default=True, help="The median of so many is taken.")
@click.option("--results", type=click.Path(path_type=Path), help=f"[default: bench/{FILE.name}]")
def main(
    names: Sequence[str], quick: bool, minutes: float, repeat: int, results: Path | None
) -> None:
    """Measure NAMES, or all, and keep the figures."""
    if unknown := [name for name in names if name not in RUNS]:
        raise click.BadParameter(f"{unknown[0]} is none of: {', '.join(RUNS)}")
    path = results or (None if quick else FILE)
    ends = time.monotonic() + minutes * 60
    problems = []
    for name in names or RUNS:
        run, began = RUNS[name], time.monotonic()
        try:
            found = entry(run, measure(run, ends - began, quick=quick, repeat=repeat))
        except Failed as why:
            problems.append(name)
            click.secho(f"{name}: {why}", fg="red", err=True)
            continue
        if path is not None:
            merge({name: found}, path)
        click.echo(f"{name}: {time.monotonic() - began:.0f} s", err=True)
    if path is not None:
        click.echo(f"{path.name} is written; python -m tools.tables renews the docs", err=True)
    if problems:
        raise click.ClickException(f"not measured: {', '.join(problems)}")


def measure(run: Run, left: float, *, quick: bool, repeat: int) -> dict[str, Any]:
    """The JSON line that the run ends with; :exc:`Failed` if it fails or takes too long."""
    limit = min(run.limit * repeat, left)
    if limit <= 0:
        raise Failed("the time was up before it began")
    module, *rest = run.arguments
    scenario = module == "bench"
    # Of an option that is given twice the last counts; the others have one argument at most.
    rest = [*(rest if scenario or not quick else []), *(run.quick if quick else [])]
    if scenario and repeat > 1:
        rest += ["--repeat", str(repeat)]
    with subprocess.Popen(
        [sys.executable, "-m", module, *rest],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            out, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            raise Failed(f"took longer than {limit:.0f} s") from None
        finally:
            _stop(process)
    if process.returncode:
        raise Failed(f"ended with status {process.returncode}")
    try:
        line: dict[str, Any] = json.loads(out.splitlines()[-1])
    except (IndexError, ValueError):
        raise Failed("said nothing that can be read") from None
    return line


def _stop(process: "subprocess.Popen[str]") -> None:
    """Let it end its servers, which are in sessions of their own; else kill all of them."""
    if process.poll() is not None:
        return
    started = set(descendants(process.pid))
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_PATIENCE)
    for pid in started | set(descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(prog_name="python -m bench.all")
