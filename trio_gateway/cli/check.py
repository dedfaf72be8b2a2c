"""``check``: verify the settings, and the Redis and the database that they name."""

import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import click

from ..core.printable import printable
from .errors import FAILED, settings_or_exit
from .other_shards import find_other_shards

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress
    from ..settings import Settings

_REPLY_TIMEOUT: Final = 3.0  # seconds for one reply
MIN_REDIS: Final = 7  # the first version that counts the entries added to a stream
_SPARE_FILES: Final = 64  # descriptors besides the clients': Redis, listeners, logs, HTTP

# A part of an error's text, and its remedy; the first match counts.
_REMEDIES: Final = (
    ("Connection refused", "start Redis there, or set REDIS_URL to its address"),
    ("Name or service not known", "set REDIS_URL to a host that can be resolved"),
    ("can't connect", "set REDIS_URL to the address of Redis, and check firewalls"),
    ("no answer", "check that this is Redis, and whether it requires TLS (rediss://)"),
    ("not RESP", "the server there is not Redis: set REDIS_URL"),
    ("NOAUTH", "Redis requires a password: REDIS_URL=redis://:PASSWORD@host:port"),
    ("WRONGPASS", "the user or the password in REDIS_URL is wrong"),
    ("AUTH failed", "Redis has no password: remove it from REDIS_URL"),
    ("SELECT failed: NOPERM", "allow this user: ACL SETUSER … +select"),
    ("SELECT failed", "the database number in REDIS_URL is too high"),
    ("is a replica", "set REDIS_URL to a name that resolves to the primary"),
    ("closed by Redis", "check that this is Redis, and whether it requires TLS (rediss://)"),
)


class _Report:
    """Prints one line for each result, and counts the problems."""

    def __init__(self) -> None:
        self.problems = 0

    def ok(self, text: str) -> None:
        self._say("ok", text, fg="green")

    def warn(self, text: str) -> None:
        self._say("warning", text, fg="yellow")

    def fail(self, text: str, remedy: str) -> None:
        self.problems += 1
        self._say("error", text, fg="red", bold=True)
        self._say("", f"fix: {remedy}")

    def _say(self, label: str, text: str, **style: Any) -> None:
        click.echo(click.style(f"{label:<9}", **style) + printable(text))

    @contextmanager
    def trying(self, text: str, remedy: str, *more: str) -> Iterator[None]:
        """Report whether the block raises :exc:`ConnectionLost`.

        ``remedy`` is for a missing permission, ``more`` for any other problem.
        """
        from ..runtime.supervision import ConnectionLost

        try:
            yield
        except ConnectionLost as lost:
            problem = str(lost)
            if "NOPERM" in problem:
                self.fail(f"{text}: {problem}", remedy)
            else:
                self.fail(f"{text}: {problem}", next(iter(more), "see the log of Redis"))
        else:
            self.ok(text)


@click.command()
def check() -> None:
    """Check the settings, Redis and the database; print each problem and how to fix it.

    Changes nothing in Redis. Exit status 0 without problems, 1 with some, 2 if the settings are
    invalid.
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
    if report.problems:
        click.echo(f"{report.problems} problem{'s' if report.problems > 1 else ''}")
        raise SystemExit(FAILED)
    click.echo("The gateway can start.")


def _check_settings(settings: "Settings", report: _Report) -> None:
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


def _check_files(settings: "Settings", report: _Report) -> None:
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


async def _check_redis(settings: "Settings", address: "RedisAddress", report: _Report) -> None:
    from ..broker.connection import open_redis
    from ..runtime.supervision import ConnectionLost

    try:
        async with open_redis(address) as redis:
            report.ok(f"Redis at {address}: connected")
            await _check_version(redis, report)
            await _check_commands(settings, redis, report)
        async with open_redis(address) as redis:
            await _check_subscribing(settings, redis, report)
    except ConnectionLost as lost:
        problem = str(lost)
        remedy = next(
            (remedy for sign, remedy in _REMEDIES if sign in problem), "see the log of Redis"
        )
        report.fail(f"Redis: {problem}", remedy)


async def _check_version(redis: "RedisConnection", report: _Report) -> None:
    reply = await redis.ask("HELLO")
    words = reply if isinstance(reply, list) else []
    value = dict(zip(words[::2], words[1::2], strict=False)).get(b"version", b"")
    version = value.decode(errors="replace") if isinstance(value, bytes) else ""
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_REDIS:
        report.warn(
            f"Redis {version} does not count the entries of a stream: clients get a gap message"
            f" whenever a gap is possible. Use Redis {MIN_REDIS} or newer, or Valkey"
        )


async def _check_commands(settings: "Settings", redis: "RedisConnection", report: _Report) -> None:
    from ..core.control_messages import PLACEMENT

    with report.trying("liveness (PING)", "allow this user: ACL SETUSER … +ping"):
        await _call(redis, "PING")
    if settings.sharding.by_tenant:
        name, number = settings.redis_streams[0], len(settings.sharding.names)
        await _check_streams(redis, report, settings.sharding.names, f"{name}, {number} streams")
    else:
        for stream in settings.sharding.names:
            await _check_streams(redis, report, [stream], stream)
    if (found := await find_other_shards(settings, redis, timeout=_REPLY_TIMEOUT)) is not None:
        report.warn(found)
    key = f"gateway:ticket:check-{secrets.token_hex(8)}"
    with report.trying(
        "tickets (SET, GET, GETDEL)",
        "allow this user the keys: ACL SETUSER … ~gateway:ticket:* +set +get +getdel",
        "GETDEL needs Redis 6.2, and SET a primary: name a primary in REDIS_URL",
    ):
        await _call(redis, "SET", key, "", "EX", 5)
        await _call(redis, "GET", key)
        await _call(redis, "GETDEL", key)
    with report.trying(
        "revocations (MGET)",
        "allow this user the keys: ACL SETUSER … ~auth:* +mget",
    ):
        await _call(redis, "MGET", "auth:token:blacklist:-", "auth:user:revoked:-")
    with report.trying(
        "placement (PUBLISH)",
        "allow this user: ACL SETUSER … allchannels +publish",
    ):
        await _call(redis, "PUBLISH", f"{PLACEMENT}:check", "")
    if (dlq := settings.redis_dlq_stream) is not None:
        with report.trying(
            f"dead letters in {dlq} (EVAL)",
            "allow this user the keys:"
            f" ACL SETUSER … ~gateway:dlq:* ~{dlq} +eval +exists +xadd +set",
            f"the key {dlq} is not a stream: name another one in REDIS_DLQ_STREAM",
        ):
            await _call(redis, "EVAL", "return 0", 0)
            await _call(redis, "EXISTS", "gateway:dlq:check")
            # XX: the key does not exist, so nothing changes.
            await _call(redis, "SET", "gateway:dlq:check", "", "XX")
            # No entry can have this id: an error, and nothing is added.
            await _call(redis, "XADD", dlq, "0-0", "check", "", unless="greater than 0-0")


async def _check_streams(
    redis: "RedisConnection", report: _Report, streams: Sequence[str], title: str
) -> None:
    """Whether these streams can be read; ``title`` says which they are."""
    from ..runtime.supervision import ConnectionLost

    pattern = streams[0] if len(streams) == 1 else f"{streams[0].partition(':{')[0]}*"
    with report.trying(
        f"stream {title}",
        "allow this user to read it:"
        f" ACL SETUSER … ~{pattern} +xread +xrevrange +xinfo|stream +time",
        f"the key {streams[0]} is not a stream: name another one in REDIS_STREAMS"
        if len(streams) == 1
        else f"one of the keys {pattern} is not a stream: name another one in REDIS_STREAMS",
    ):
        for stream in streams:
            try:
                await _call(redis, "XREAD", "COUNT", 1, "STREAMS", stream, "$")
                await _call(redis, "XREVRANGE", stream, "+", "-", "COUNT", 1)
                await _call(redis, "XINFO", "STREAM", stream, unless="no such key")
            except ConnectionLost as lost:
                if len(streams) == 1:
                    raise
                raise ConnectionLost(f"{stream}: {lost}") from None
        await _call(redis, "TIME", unless="unknown command")


async def _check_subscribing(
    settings: "Settings", redis: "RedisConnection", report: _Report
) -> None:
    from ..core.control_messages import PLACEMENT, REVOKED

    patterns = dict.fromkeys(settings.redis_channel_patterns)
    with report.trying(
        f"subscribing to {len(patterns)} patterns, {REVOKED} and {PLACEMENT}",
        "allow this user the channels: ACL SETUSER … allchannels +psubscribe +subscribe",
    ):
        for pattern in patterns:
            await _call(redis, "PSUBSCRIBE", pattern)
        for channel in (REVOKED, PLACEMENT):
            await _call(redis, "SUBSCRIBE", channel)


async def _check_database(settings: "Settings", url: str, report: _Report) -> None:
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


async def _call(redis: "RedisConnection", *words: str | int, unless: str | None = None) -> None:
    import trio

    from ..runtime.supervision import ConnectionLost

    with trio.move_on_after(_REPLY_TIMEOUT) as scope:
        reply = await redis.ask(*words)
        if isinstance(reply, Exception) and (unless is None or unless not in str(reply)):
            raise ConnectionLost(f"{words[0]!s} failed: {str(reply).split(' ', 1)[0]}")
    if scope.cancelled_caught:
        raise ConnectionLost(f"no answer in {_REPLY_TIMEOUT:g} s")
