"""``who``: the users and sessions that are connected to any process."""

import time
from typing import TYPE_CHECKING

import click

from .errors import settings_or_exit
from .nodes import duration
from .rendering import print_table
from .service import IDS, ask_service, no_gateway, print_report, tell_missing

if TYPE_CHECKING:
    from ..cluster.observing import Service
    from ..cluster.presence_query import PresenceReport

_COLUMNS = ("endpoint", "user", "session", "table", "sectors", "connections", "for")


@click.command()
@click.option("--tenant", type=IDS, required=True, help="The tenant.")
@click.option("--branch", type=IDS, help="One branch of it.  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def who(tenant: int, branch: int | None, as_json: bool) -> None:
    """List the users and sessions of a tenant that are connected, on all processes.

    The processes need WS_CLUSTER=true. Exit status 1 if one did not answer; the others' are listed.
    """
    from ..cluster.presence_query import who_is_present
    from ..core.audiences import BranchId, TenantId

    async def ask(service: "Service") -> "tuple[PresenceReport, list[str], int]":
        wanted = None if branch is None else BranchId(branch)
        report, unknowing = await who_is_present(service.control, TenantId(tenant), wanted)
        return report, unknowing, len(await service.registry.read())

    settings = settings_or_exit()
    report, unknowing, processes = ask_service(settings, ask)
    if not processes and report.complete:
        no_gateway(settings)

    def show(report: "PresenceReport") -> None:
        _show(report)
        tell_missing([each for each in report.missing if each not in unknowing], processes)
        if unknowing:
            names = ", ".join(unknowing)
            what = f"{len(unknowing)} of {processes} processes do not know their users"
            click.echo(f"{what}, because WS_CLUSTER is off there: {names}", err=True)

    print_report(report, show, as_json)


def _show(report: "PresenceReport") -> None:
    now = time.time()
    rows: list[tuple[str | int, ...]] = [
        (
            user.endpoint,
            user.user_id,
            "-",
            "-",
            ",".join(map(str, user.sector_ids)) or "-",
            user.connections,
            duration(now - user.since),
        )
        for user in report.users
    ]
    rows += [
        ("diner", "-", str(each.session_id), str(each.table_id or "-"), "-", each.connections, "-")
        for each in report.sessions
    ]
    if rows:
        print_table(_COLUMNS, rows)
    elif report.complete:
        click.echo("nobody is connected", err=True)
