"""``python -m bench.all``: measure the published figures, and write ``bench/results.json``.

Each run is a separate process with a time limit, and its figures are written when it ends. If a run
fails, hangs or does not start in time, the file keeps its older figures.
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

MINUTES: Final = 12.0  # for all runs
_STOP_TIMEOUT: Final = 15.0  # seconds for a run to end after SIGINT


class Failed(RuntimeError):  # noqa: N818 - an outcome
    """The reason why a run has no figures."""


@click.command()
@click.argument("names", nargs=-1)
@click.option("--quick", is_flag=True, help="Test all runs in two minutes; writes no file.")
@click.option("--minutes", default=MINUTES, show_default=True, help="No run continues after that.")
@click.option(
    "--repeat", default=1, show_default=True, help="Number of runs; the median is stored."
)
@click.option("--results", type=click.Path(path_type=Path), help=f"[default: bench/{FILE.name}]")
def main(
    names: Sequence[str], quick: bool, minutes: float, repeat: int, results: Path | None
) -> None:
    """Measure the runs NAMES, or all, and store the figures."""
    if unknown := [name for name in names if name not in RUNS]:
        raise click.BadParameter(f"unknown run: {unknown[0]} (known: {', '.join(RUNS)})")
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
        click.echo(f"wrote {path.name}; python -m tools.tables renews the docs", err=True)
    if problems:
        raise click.ClickException(f"not measured: {', '.join(problems)}")


def measure(run: Run, left: float, *, quick: bool, repeat: int) -> dict[str, Any]:
    """Return the JSON line that the run prints last. Raises :exc:`Failed`."""
    limit = min(run.limit * repeat, left)
    if limit <= 0:
        raise Failed("the time was up before it began")
    module, *rest = run.arguments
    scenario = module == "bench"
    # If an option is given twice, the last one counts. Other modules take at most one argument.
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
        raise Failed("printed no JSON line") from None
    return line


def _stop(process: "subprocess.Popen[str]") -> None:
    """Let the run end its servers, which have their own sessions; kill those that remain."""
    if process.poll() is not None:
        return
    started = set(descendants(process.pid))
    process.send_signal(signal.SIGINT)
    with suppress(subprocess.TimeoutExpired):
        process.wait(_STOP_TIMEOUT)
    for pid in started | set(descendants(process.pid)):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(prog_name="python -m bench.all")
