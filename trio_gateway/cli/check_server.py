"""``check`` of one Redis server: its version, its data on the disk, and the rights of the user."""

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from .check_receipts import check_receipts
from .check_report import REPLY_TIMEOUT, Asking, Report
from .other_shards import find_other_shards

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress
    from ..settings import Settings

MIN_REDIS: Final = 7  # the first version that counts the entries added to a stream
_SCHEMES: Final = {
    "cluster": ("a node of a Cluster", "redis+cluster://"),
    "sentinel": ("a Sentinel", "redis+sentinel://HOST:PORT/NAME, with the name of the primary"),
}
# By these a server says that another one executes the command; that the user may send it, it has
# checked before.
_ELSEWHERE: Final = (
    "MOVED", "ASK", "CROSSSLOT", "READONLY", "MASTERDOWN", "CLUSTERDOWN", "NOREPLICAS",
)  # fmt: skip


async def check_server(
    settings: "Settings",
    address: "RedisAddress",
    report: Report,
    *,
    of_many: bool,
    is_primary: bool = True,
) -> None:
    """Report whether a server has what the gateway needs.

    ``of_many``: it is one of a Sentinel set or a Cluster, which may be a replica, or have none of
    the keys.
    """
    from ..broker.connection import open_redis
    from ..redis_url import RedisKind, RedisUrl
    from ..runtime.supervision import ConnectionLost

    try:
        async with open_redis(address, any_role=of_many) as redis:
            report.ok(f"Redis at {address}: connected")
            asking = Asking(redis, _ELSEWHERE if of_many else ())
            if not await _check_kind(redis, report, of_many=of_many):
                return
            if of_many:
                await _check_disk(asking, report)
            if is_primary:
                await _check_publishers(settings, redis, report)
            await _check_commands(settings, asking, report)
        async with open_redis(address, any_role=of_many) as redis:
            await _check_subscribing(settings, Asking(redis, ()), report)
        if RedisUrl.from_url(settings.redis_url).kind is RedisKind.CLUSTER:
            async with open_redis(address, any_role=True) as redis:
                await _check_sharded(Asking(redis, ("MOVED", "CLUSTERDOWN")), report)
    except ConnectionLost as lost:
        report.fail_to_connect(str(lost) if of_many else f"Redis: {lost}")


async def _check_kind(redis: "RedisConnection", report: Report, *, of_many: bool) -> bool:
    """Report on the version, and return whether it is a server for this kind of URL."""
    reply = await redis.ask("HELLO")
    words = reply if isinstance(reply, list) else []
    told = {
        name: value.decode(errors="replace")
        for name, value in zip(words[::2], words[1::2], strict=False)
        if isinstance(value, bytes)
    }
    mode, version = told.get(b"mode"), told.get(b"version", "")
    if mode in _SCHEMES and not of_many:
        what, scheme = _SCHEMES[mode]
        report.fail(f"the server is {what}", f"write {scheme} in REDIS_URL")
        return False
    major = version.partition(".")[0]
    if major.isdigit() and int(major) < MIN_REDIS:
        report.warn(
            f"Redis {version} does not count the entries of a stream: clients get a gap message"
            f" whenever a gap is possible. Use Redis {MIN_REDIS} or newer, or Valkey"
        )
    return True


async def _check_disk(asking: Asking, report: Report) -> None:
    info = await asking.call("INFO", "persistence", unless="NOPERM")
    if isinstance(info, bytes) and b"aof_enabled:0" in info:
        report.warn(
            "appendonly is no: a primary that restarts before a failover comes back without events,"
            " and its replicas delete theirs. Set appendonly yes"
        )


async def _check_publishers(settings: "Settings", redis: "RedisConnection", report: Report) -> None:
    if (found := await find_other_shards(settings, redis, timeout=REPLY_TIMEOUT)) is not None:
        report.warn(found)


async def _check_commands(settings: "Settings", asking: Asking, report: Report) -> None:
    from ..core.control_messages import placement_channel
    from ..redis_url import RedisUrl

    with report.trying("liveness (PING)", "allow this user: ACL SETUSER … +ping"):
        await asking.call("PING")
    if settings.sharding.by_tenant:
        name, number = settings.redis_streams[0], len(settings.sharding.names)
        await _check_streams(asking, report, settings.sharding.names, f"{name}, {number} streams")
    else:
        for stream in settings.sharding.names:
            await _check_streams(asking, report, [stream], stream)
    key = f"gateway:ticket:check-{secrets.token_hex(8)}"
    with report.trying(
        "tickets (SET, GET, GETDEL)",
        "allow this user the keys: ACL SETUSER … ~gateway:ticket:* +set +get +getdel",
        "GETDEL needs Redis 6.2, and SET a primary: name a primary in REDIS_URL",
    ):
        await asking.call("SET", key, "", "EX", 5)
        await asking.call("GET", key)
        await asking.call("GETDEL", key)
    with report.trying(
        "revocations (MGET)",
        "allow this user the keys: ACL SETUSER … ~auth:* +mget",
    ):
        await asking.call("MGET", "auth:token:blacklist:-", "auth:user:revoked:-")
    with report.trying(
        "placement (PUBLISH)",
        "allow this user: ACL SETUSER … allchannels +publish",
    ):
        await asking.call(
            "PUBLISH",
            f"{placement_channel(RedisUrl.from_url(settings.redis_url).data.db)}:check",
            "",
        )
    if (dlq := settings.redis_dlq_stream) is not None:
        with report.trying(
            f"dead letters in {dlq} (EVAL)",
            "allow this user the keys:"
            f" ACL SETUSER … ~gateway:dlq:* ~{dlq} +eval +exists +xadd +set",
            f"the key {dlq} is not a stream: name another one in REDIS_DLQ_STREAM",
        ):
            await asking.call("EVAL", "return 0", 0)
            await asking.call("EXISTS", "gateway:dlq:check")
            # XX: the key does not exist, so nothing changes.
            await asking.call("SET", "gateway:dlq:check", "", "XX")
            # No entry can have this id: an error, and nothing is added.
            await asking.call("XADD", dlq, "0-0", "check", "", unless="greater than 0-0")
    if settings.routes.tracked_types:
        await check_receipts(settings, asking, report)
    if settings.has_cluster:
        await _check_cluster_scripts(settings, asking, report)
    if settings.api_keys:
        await _check_publishing(settings.sharding.names, asking, report)


async def _check_cluster_scripts(settings: "Settings", asking: Asking, report: Report) -> None:
    from ..cluster.keys import Keys
    from ..cluster.rights import harmless_calls
    from ..redis_url import RedisKind, RedisUrl

    url = RedisUrl.from_url(settings.redis_url)
    is_cluster = url.kind is RedisKind.CLUSTER
    keys = Keys(settings.ws_presence_stream, is_cluster=is_cluster, database=url.data.db)
    calls = list(harmless_calls(keys))
    commands = " ".join(f"+{words[0]}" for words in calls)
    stream = f" ~{settings.ws_presence_stream}" if settings.ws_presence_stream else ""
    with report.trying(
        f"the other processes ({len(calls)} commands on {keys.prefix}*)",
        f"allow this user: ACL SETUSER … ~{keys.prefix}*{stream} allchannels +eval +publish"
        f" {commands}",
    ):
        await asking.call("EVAL", "return 0", 0)
        await asking.call("PUBLISH", keys.replies("check"), "")
        for words in calls:
            await asking.call(*words)
    if settings.ws_presence_stream is not None:
        with report.trying(
            f"presence in {settings.ws_presence_stream} (XADD)",
            f"allow this user the key: ACL SETUSER …{stream} +xadd",
            f"the key {settings.ws_presence_stream} is not a stream:"
            " name another one in WS_PRESENCE_STREAM",
        ):
            # No entry can have this id: an error, and nothing is added.
            await asking.call(
                "XADD", settings.ws_presence_stream, "0-0", "check", "", unless="greater than 0-0"
            )


async def _check_publishing(streams: Sequence[str], asking: Asking, report: Report) -> None:
    """Whether the API for backends can add events, and wait until replicas have them."""
    pattern = streams[0] if len(streams) == 1 else f"{streams[0].partition(':{')[0]}*"
    with report.trying(
        "events of the API for backends (XADD, WAIT)",
        f"allow this user: ACL SETUSER … ~{pattern} allchannels +xadd +publish +wait +info",
    ):
        for stream in streams:
            # No entry can have this id: an error, and nothing is added.
            await asking.call("XADD", stream, "0-0", "check", "", unless="greater than 0-0")
        await asking.call("WAIT", 0, 0, unless="replica instances")
        await asking.call("INFO", "replication")


async def _check_streams(
    asking: Asking, report: Report, streams: Sequence[str], title: str
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
                await asking.call("XREAD", "COUNT", 1, "STREAMS", stream, "$")
                await asking.call("XREVRANGE", stream, "+", "-", "COUNT", 1)
                await asking.call("XINFO", "STREAM", stream, unless="no such key")
            except ConnectionLost as lost:
                if len(streams) == 1:
                    raise
                raise ConnectionLost(f"{stream}: {lost}") from None
        await asking.call("TIME", unless="unknown command")


async def _check_subscribing(settings: "Settings", asking: Asking, report: Report) -> None:
    from ..core.control_messages import REVOKED, own_channel, placement_channel
    from ..redis_url import RedisUrl

    patterns = dict.fromkeys(settings.redis_channel_patterns)
    database = RedisUrl.from_url(settings.redis_url).data.db
    placement = placement_channel(database)
    own = [own_channel("control", database)] if settings.has_cluster else []
    own += [own_channel("presence", database)] if settings.ws_cluster else []
    with report.trying(
        f"subscribing to {len(patterns)} patterns, {REVOKED} and {placement}",
        "allow this user the channels: ACL SETUSER … allchannels +psubscribe +subscribe",
    ):
        for pattern in patterns:
            await asking.call("PSUBSCRIBE", pattern)
        for channel in (REVOKED, placement, *own):
            await asking.call("SUBSCRIBE", channel)


async def _check_sharded(asking: Asking, report: Report) -> None:
    from ..core.control_messages import REVOKED

    with report.trying(
        f"subscribing to {REVOKED} as sharded Pub/Sub",
        "allow this user: ACL SETUSER … +ssubscribe",
    ):
        await asking.call("SSUBSCRIBE", REVOKED, unless="unknown command")  # before Redis 7
