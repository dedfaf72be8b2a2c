"""``slo``: how long the events of each tenant take to its clients."""

from typing import TYPE_CHECKING

import click

from .errors import settings_or_exit
from .rendering import print_table
from .service import IDS, ask_service, no_gateway, print_report, tell_missing

if TYPE_CHECKING:
    from ..cluster.delivery_query import OthersReport, SloReport, TenantTimesReport
    from ..cluster.observing import Service
    from ..core.time_counts import Delivered, Written

_COLUMNS = (
    "tenant", "last", "written", "p50", "p95", "p99", "late",
    "delivered", "p50", "p95", "p99", "late", "unconfirmed",
)  # fmt: skip


@click.command()
@click.option("--tenant", type=IDS, help="One tenant.  [default: all]")
@click.option(
    "--limit", type=click.IntRange(1), default=20, show_default=True, help="How many tenants."
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def slo(tenant: int | None, limit: int, as_json: bool) -> None:
    """List the delivery times of tenants, the slowest first.

    Times are from when an event entered Redis until it was written to its clients, and until they
    confirmed it. Known are the processes with WS_CLUSTER=true or WS_API_KEYS_FILE. Exit status 1 if
    one did not answer; the others' figures are listed.
    """
    from ..cluster.delivery_query import delivery_times

    async def ask(service: "Service") -> "tuple[SloReport, int]":
        wanted = None if tenant is None else [tenant]
        report = await delivery_times(service.control, wanted, most=limit)
        return report, len(await service.registry.read())

    settings = settings_or_exit()
    report, processes = ask_service(settings, ask)
    if not processes and report.complete:
        no_gateway(settings)

    def show(report: "SloReport") -> None:
        _show(report)
        tell_missing(report.missing, processes)

    print_report(report, show, as_json)


def _show(report: "SloReport") -> None:
    rows = [row for each in report.tenants for row in _rows(str(each.tenant_id), each)]
    if report.others is not None and report.others.last_hour.written.count:
        rows += _rows("others", report.others)
    if not rows:
        if report.complete:
            click.echo("no event was delivered in the last hour", err=True)
        return
    print_table(_COLUMNS, rows)
    click.echo(f"late: over {report.seconds:g} s", err=True)
    if report.more:
        click.echo(f"{report.more} more tenants: see --limit", err=True)


def _rows(name: str, report: "TenantTimesReport | OthersReport") -> list[tuple[str | int, ...]]:
    windows = (("5 min", report.last_5_minutes), ("hour", report.last_hour))
    return [
        (name, last, *_cells(window.written), *_cells(window.delivered),
         window.delivered.unconfirmed)
        for last, window in windows
    ]  # fmt: skip


def _cells(times: "Written | Delivered") -> tuple[str | int, ...]:
    return (times.count, *map(seconds, (times.p50, times.p95, times.p99)), times.over)


def seconds(value: float | None) -> str:
    """A time with the unit that fits, such as ``4 ms``; ``-`` if there is none."""
    if value is None:
        return "-"
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"
