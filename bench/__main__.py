"""``python -m bench SCENARIO``: run a scenario, show its figures, and store them."""

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from . import scenarios, smoke
from .processes import BASELINES, Cores, NotHere, Redis, open_redis
from .report import Results, plot
from .runs import Bench, Broken, Options
from .scenarios import SCENARIOS

_LIST = "\n".join(f"  {name:8} {scenario.about}" for name, scenario in SCENARIOS.items())


@click.command(
    help="Run one scenario on a real gateway, and on other servers (baselines).\n\n\b\n"
    f"{_LIST}\n  smoke    The regression guard: a short fanout against floor and naive."
)
@click.argument("scenario", type=click.Choice([*SCENARIOS, "smoke"]))
@click.option("--against", default="", help=f"Baselines, comma-separated: {', '.join(BASELINES)}.")
@click.option("--only", is_flag=True, help="Only the baselines in --against, without the gateway.")
@click.option("--repeat", default=1, show_default=True, help="Number of runs; the median is shown.")
@click.option("--clients", type=click.IntRange(1), help="Connections.")
@click.option("--seconds", type=click.FloatRange(0.2), help="Duration of the measurement.")
@click.option("--size", type=click.IntRange(200, 65_000), help="Bytes of an event.  [300]")
@click.option("--rate", type=click.FloatRange(0.1), help="Events a second: steady, slow, soak.")
@click.option("--window", type=click.IntRange(1, 4000), help="Events in flight when saturated.")
@click.option("--unbatched", is_flag=True, default=None, help="fanout: one event at a time.")
@click.option("--branches", type=click.IntRange(1, 8000), help="mixed, many: number of branches.")
@click.option("--processes", type=click.IntRange(1, 64), help="many: gateway processes.")
@click.option("--each", type=click.IntRange(1), help="mixed: branches of each staff member.")
@click.option("--stuck", type=click.IntRange(1), help="slow, burst: clients that never read.")
@click.option("--resume", is_flag=True, default=None, help="storm: all clients resume.")
@click.option("--missed", type=click.IntRange(1), help="storm --resume: missed events.")
@click.option("--minutes", type=click.FloatRange(0.1), help="soak: duration.")
@click.option(
    "--churn", type=click.FloatRange(0.1), help="soak: clients per second that are replaced."
)
@click.option("--set", "settings", multiple=True, help="A setting of the gateway, NAME=VALUE.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Append the line here.")
@click.option("--plot", "plot_file", type=click.Path(path_type=Path), help="Draw a PNG.")
def main(
    scenario: str,
    against: str,
    only: bool,
    repeat: int,
    json_file: Path | None,
    plot_file: Path | None,
    **chosen: Any,
) -> None:
    if odd := [each for each in chosen["settings"] if "=" not in each]:
        raise click.BadParameter(f"{odd[0]} is not NAME=VALUE")
    others = [name.strip() for name in against.split(",") if name.strip()]
    if unknown := [name for name in others if name not in BASELINES]:
        raise click.BadParameter(f"unknown baseline: {unknown[0]} (known: {', '.join(BASELINES)})")
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=140)
    cores = Cores()
    if cores.shared:
        console.print("only one core: the load generator shares it with the server", style="yellow")
    os.sched_setaffinity(0, cores.load)
    with open_redis(cores) as redis:
        if scenario == "smoke":
            sys.exit(0 if _smoke(redis, cores, console) else 1)
        options = scenarios.options_of(scenario, chosen)
        if 2 * options.clients > hard and scenario in {"storm", "idle", "small"}:
            console.print(f"descriptors are limited to {hard}: fewer --clients", style="yellow")
        results = Results(scenario, options)
        for _ in range(repeat):
            results.begin()
            for who in [*([] if only else ["gateway"]), *others]:
                with _progress(console) as progress:
                    bench = Bench(redis, cores, options, progress)
                    try:
                        results.add(who, scenarios.run(bench, scenario, who))
                    except (NotHere, Broken) as why:
                        if who == "gateway":
                            raise click.ClickException(str(why)) from None
                        results.skipped[who] = str(why)
                    results.series |= bench.series
        info: dict[str, Any] = redis.client.info("server")
        name = info.get("server_name", "redis")
        line = results.line(f"{name} {info.get('valkey_version', info['redis_version'])}")
    results.show(console)
    print(line, flush=True)
    if json_file is not None:
        with json_file.open("a", encoding="utf-8") as out:
            out.write(line + "\n")
    if plot_file is not None:
        plot(results, SCENARIOS[scenario].plotted, plot_file)
    if results.faulty:
        raise click.ClickException(f"delivery errors of the gateway: {', '.join(results.faulty)}")


def _smoke(redis: Redis, cores: Cores, console: Console) -> bool:
    with _progress(console) as progress:
        bench = Bench(redis, cores, Options(), progress)
        return smoke.guard(bench, console)


@contextmanager
def _progress(console: Console) -> Iterator[Progress | None]:
    if not console.is_terminal:
        yield None
        return
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        yield progress


if __name__ == "__main__":
    main(prog_name="python -m bench")
