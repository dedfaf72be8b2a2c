"""``check``: verify the settings, and the Redis and the database that they name."""

from typing import TYPE_CHECKING, Final

import click

from .check_processes import check_processes
from .check_report import Report
from .errors import FAILED, settings_or_exit

if TYPE_CHECKING:
    from ..redis_url import RedisUrl
    from ..settings import Settings

_SPARE_FILES: Final = 64  # descriptors besides the clients': Redis, listeners, logs, HTTP


@click.command()
def check() -> None:
    """Check the settings, Redis and the database; print each problem and how to fix it.

    Changes nothing in Redis. Exit status 0 without problems, 1 with some, 2 if the settings are
    invalid.
    """
    import trio

    from ..redis_url import RedisUrl

    settings = settings_or_exit()
    report = Report()
    _check_settings(settings, report)
    _check_files(settings, report)
    before = report.problems
    trio.run(_check_redis, settings, RedisUrl.from_url(settings.redis_url), report)
    if settings.has_cluster and report.problems == before:
        check_processes(settings, report)
    if settings.database_url is not None:
        trio.run(_check_database, settings, settings.database_url, report)
    if report.problems:
        click.echo(f"{report.problems} problem{'s' if report.problems > 1 else ''}")
        raise SystemExit(FAILED)
    click.echo("The gateway can start.")


def _check_settings(settings: "Settings", report: Report) -> None:
    report.ok(f"settings ({settings.environment})")
    for warning in settings.warnings:
        report.warn(warning)
    if not settings.staff_keys and settings.jwt_jwks_url is None:
        report.fail(
            "no key for staff tokens",
            "set JWT_PUBLIC_KEY to the key in PEM, or to a file that holds it",
        )
    if settings.ws_routes_file is not None:
        report.ok(f"routes from {settings.ws_routes_file}")


def _check_files(settings: "Settings", report: Report) -> None:
    import resource

    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises the soft one to it
    needed = settings.ws_max_total_connections + _SPARE_FILES
    if limit == resource.RLIM_INFINITY or limit >= needed:
        report.ok(f"open files for {settings.ws_max_total_connections} clients")
        return
    report.fail(
        f"{limit} open files are too few for WS_MAX_TOTAL_CONNECTIONS"
        f" ({settings.ws_max_total_connections})",
        f"raise the limit to {needed} (ulimit -Hn, LimitNOFILE=), or lower the setting",
    )


async def _check_redis(settings: "Settings", url: "RedisUrl", report: Report) -> None:
    from ..redis_url import RedisKind
    from .check_cluster import check_cluster
    from .check_sentinels import check_sentinels
    from .check_server import check_server

    match url.kind:
        case RedisKind.SINGLE:
            await check_server(settings, url.data, report, of_many=False)
            return
        case RedisKind.SENTINEL:
            primaries, replicas = await check_sentinels(url, report)
        case RedisKind.CLUSTER:
            primaries, replicas = await check_cluster(url, report)
    if not primaries:
        return
    await check_server(settings, primaries[0], report, of_many=True)
    before = report.problems
    # Users are created on each server: those that may be the next primary need them, too.
    others = [*primaries[1:], *replicas]
    for server in others:
        part = report.part(f"server at {server}", quiet=True)
        is_primary = server in primaries
        await check_server(settings, server, part, of_many=True, is_primary=is_primary)
    if others and report.problems == before:
        report.ok(f"the same rights on the {len(others)} other servers")


async def _check_database(settings: "Settings", url: str, report: Report) -> None:
    from datetime import date

    from ..access.sector_database import QueryFailed, SectorDatabase, WaiterKey
    from ..core.audiences import BranchId, TenantId, UserId

    try:
        assignments = SectorDatabase(url, settings.sector_table, settings.sector_column_names)
    except ValueError as error:
        report.fail(f"DATABASE_URL {error}", "write a SQLAlchemy URL: dialect://user@host/name")
        return
    try:
        nobody = WaiterKey(TenantId(1), BranchId(1), UserId("0"))
        await assignments.of(nobody, date(2000, 1, 1))
    except QueryFailed as unanswered:
        report.fail(
            f"sectors: {unanswered}",
            f"check that the database is up and that this user may read {settings.sector_table}"
            " (SECTOR_TABLE, SECTOR_COLUMNS)",
        )
    else:
        report.ok(f"sectors from {settings.sector_table}")
    finally:
        assignments.close()
