"""``check``: is everything here that the gateway needs?"""

import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from ..core.printable import printable
from .errors import FAILED, settings_or_exit

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress
    from ..settings import Settings

_PATIENCE: Final = 3.0  # seconds for one answer
MIN_REDIS: Final = 7  # the first that counts what was added to a stream
_SPARE_FILES: Final = 64  # descriptors beside the clients': Redis, listeners, logs, HTTP

# What Redis or the system says, and how to mend it; the first that fits.
_MENDS: Final = (
    ("Connection refused", "start Redis there, or set REDIS_URL to where it is"),
    ("Name or service not known", "set REDIS_URL to a host that can be resolved"),
    ("can't connect", "set REDIS_URL to where Redis is; is a firewall in between?"),
    ("no answer", "is that a Redis, and does it want TLS (rediss://)?"),
    ("not RESP", "something else than Redis listens there: set REDIS_URL"),
    ("NOAUTH", "Redis wants a password: REDIS_URL=redis://:PASSWORD@host:port"),
    ("WRONGPASS", "the user or the password in REDIS_URL is wrong"),
    ("AUTH failed", "Redis has no password: take it out of REDIS_URL"),
    ("SELECT failed: NOPERM", "allow this user: ACL SETUSER … +select"),
    ("SELECT failed", "the database number in REDIS_URL is too high"),
    ("is a replica", "set REDIS_URL to a name that leads to the primary"),
    ("closed by Redis", "is that a Redis, and does it want TLS (rediss://)?"),
)


class _Report:
    """Says what is right and what is not, a line each."""

    def __init__(self) -> None:
        self.wrong = 0

    def right(self, text: str) -> None:
        self._say("ok", text, fg="green")

    def warn(self, text: str) -> None:
        self._say("warning", text, fg="yellow")

    def fail(self, text: str, mend: str) -> None:
        self.wrong += 1
        self._say("wrong", text, fg="red", bold=True)
        self._say("", f"-> {mend}")

    def _say(self, label: str, text: str, **style: Any) -> None:
        click.echo(click.style(f"{label:<9}", **style) + printable(text))

    @contextmanager
    def trying(self, text: str, mend: str, *more: str) -> Iterator[None]:
        """Report whether what is tried in here raises Lost; ``mend`` is for want of permission."""
        from ..runtime.supervision import ConnectionLost

        try:
            yield
        except ConnectionLost as lost:
            problem = str(lost)
            if "NOPERM" in problem:
                self.fail(f"{text}: {problem}", mend)
            else:
                self.fail(f"{text}: {problem}", next(iter(more), "see the log of Redis"))
        else:
            self.right(text)


@click.command()
def check() -> None:
    """Check the settings and what they name; say what is wrong and how to mend it.

    Leaves Redis as it is. Exit status 0 if all is well, 1 if not, 2 if the settings are no good.
    """
    import trio

    from ..redis_url import RedisAddress

    settings = settings_or_exit()
    report = _Report()
    _check_settings(settings, report)
    _check_files(settings, report)
    trio.run(_check_redis, settings, RedisAddress.from_url(settings.redis_url), report)
    if settings.database_url is not None:
        trio.run(_check_database, settings, settings.database_url, report)
    if report.wrong:
        click.echo(f"{report.wrong} wrong")
        raise SystemExit(FAILED)
    click.echo("The gateway can start.")


def _check_settings(settings: "Settings", report: _Report) -> None:
    report.right(f"settings ({settings.environment})")
    for warning in settings.warnings:
        report.warn(warning)
    if not settings.staff_keys and settings.jwt_jwks_url is None:
        report.fail(
            "no key for staff tokens",
            "set JWT_PUBLIC_KEY to the key in PEM, or to a file that holds it",
        )
    if settings.ws_routes_file is not None:
        report.right(f"routes from {settings.ws_routes_file}")


def _check_files(settings: "Settings", report: _Report) -> None:
    import resource

    _, limit = resource.getrlimit(resource.RLIMIT_NOFILE)  # the gateway raises the soft one to it
    needed = settings.ws_max_total_connections + _SPARE_FILES
    if limit == resource.RLIM_INFINITY or limit >= needed:
        report.right(f"open files for {settings.ws_max_total_connections} clients")
        return
    report.fail(
        f"{limit} open files are too few for WS_MAX_TOTAL_CONNECTIONS"
        f" ({settings.ws_max_total_connections})",
        f"raise the limit to {needed} (ulimit -Hn, LimitNOFILE=), or lower the setting",
    )


async def _check_redis(settings: "Settings", address: "RedisAddress", report: _Report) -> None:
    from ..broker.connection import open_redis
    from ..runtime.supervision import ConnectionLost

    try:
        async with open_redis(address) as redis:
            report.right(f"Redis at {address}: connected")
            await _check_version(redis, report)
            await _check_commands(settings, redis, report)
        async with open_redis(address) as redis:
            await _check_subscribing(settings, redis, report)
    except ConnectionLost as lost:
        problem = str(lost)
        mend = next((mend for sign, mend in _MENDS if sign in problem), "see the log of Redis")
        report.fail(f"Redis: {problem}", mend)


async def _check_version(redis: "RedisConnection", report: _Report) -> None:
    reply = await redis.ask("HELLO")
    words = reply if isinstance(reply, list) else []
    said = dict(zip(words[::2], words[1::2], strict=False)).get(b"version", b"")
    version = said.decode(errors="replace") if isinstance(said, bytes) else ""
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_REDIS:
        report.warn(
            f"Redis {version} does not count the entries of a stream: clients are told of a gap"
            f" whenever none can be ruled out. Redis {MIN_REDIS} or any Valkey knows"
        )


async def _check_commands(settings: "Settings", redis: "RedisConnection", report: _Report) -> None:
    with report.trying("liveness (PING)", "allow this user: ACL SETUSER … +ping"):
        await _call(redis, "PING")
    for stream in dict.fromkeys(settings.redis_streams):
        with report.trying(
            f"stream {stream}",
            "allow this user to read it:"
            f" ACL SETUSER … ~{stream} +xread +xrevrange +xinfo|stream +time",
            f"the key {stream} is something else than a stream: name another in REDIS_STREAMS",
        ):
            await _call(redis, "XREVRANGE", stream, "+", "-", "COUNT", 1)
            await _call(redis, "XREAD", "COUNT", 1, "STREAMS", stream, "$")
            await _call(redis, "XINFO", "STREAM", stream, unless="no such key")
            await _call(redis, "TIME", unless="unknown command")
    key = f"gateway:ticket:check-{secrets.token_hex(8)}"
    with report.trying(
        "tickets (SET, GET, GETDEL)",
        "allow this user the keys: ACL SETUSER … ~gateway:ticket:* +set +get +getdel",
        "GETDEL came with Redis 6.2; a replica takes no SET: name a primary in REDIS_URL",
    ):
        await _call(redis, "SET", key, "", "EX", 5)
        await _call(redis, "GET", key)
        await _call(redis, "GETDEL", key)
    with report.trying(
        "revocations (MGET)",
        "allow this user the keys: ACL SETUSER … ~auth:* +mget",
    ):
        await _call(redis, "MGET", "auth:token:blacklist:-", "auth:user:revoked:-")
    if (dlq := settings.redis_dlq_stream) is not None:
        with report.trying(
            f"dead letters in {dlq} (EVAL)",
            "allow this user the keys:"
            f" ACL SETUSER … ~gateway:dlq:* ~{dlq} +eval +exists +xadd +set",
            f"the key {dlq} is something else than a stream: name another in REDIS_DLQ_STREAM",
        ):
            await _call(redis, "EVAL", "return 0", 0)
            await _call(redis, "EXISTS", "gateway:dlq:check")
            await _call(redis, "SET", "gateway:dlq:check", "", "XX")  # never there: no change
            # No entry can have this id: an error, and nothing added.
            await _call(redis, "XADD", dlq, "0-0", "check", "", unless="greater than 0-0")


async def _check_subscribing(
    settings: "Settings", redis: "RedisConnection", report: _Report
) -> None:
    from ..core.control_messages import REVOKED

    patterns = dict.fromkeys(settings.redis_channel_patterns)
    with report.trying(
        f"subscribing to {len(patterns)} patterns and {REVOKED}",
        "allow this user the channels: ACL SETUSER … allchannels +psubscribe +subscribe",
    ):
        for pattern in patterns:
            await _call(redis, "PSUBSCRIBE", pattern)
        await _call(redis, "SUBSCRIBE", REVOKED)


async def _check_database(settings: "Settings", url: str, report: _Report) -> None:
    from datetime import date

    from ..access.sector_database import QueryFailed, SectorDatabase, WaiterKey
    from ..core.audiences import BranchId, TenantId, UserId

    try:
        assignments = SectorDatabase(url, settings.sector_table, settings.sector_column_names)
    except ValueError as error:
        report.fail(
            f"DATABASE_URL {error}", "write it as SQLAlchemy does: dialect://user@host/name"
        )
        return
    try:
        nobody = WaiterKey(TenantId(1), BranchId(1), UserId("0"))
        await assignments.of(nobody, date(2000, 1, 1))
    except QueryFailed as unanswered:
        report.fail(
            f"sectors: {unanswered}",
            f"is the database up, and may this user read {settings.sector_table}?"
            " (SECTOR_TABLE, SECTOR_COLUMNS)",
        )
    else:
        report.right(f"sectors from {settings.sector_table}")
    finally:
        assignments.close()


async def _call(redis: "RedisConnection", *words: str | int, unless: str | None = None) -> None:
    import trio

    from ..runtime.supervision import ConnectionLost

    with trio.move_on_after(_PATIENCE) as scope:
        reply = await redis.ask(*words)
        if isinstance(reply, Exception) and (unless is None or unless not in str(reply)):
            raise ConnectionLost(f"{words[0]!s} failed: {str(reply).split(' ', 1)[0]}")
    if scope.cancelled_caught:
        raise ConnectionLost(f"no answer in {_PATIENCE:g} s")
