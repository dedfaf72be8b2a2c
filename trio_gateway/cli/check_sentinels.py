"""``check`` of a Sentinel set: can the primary be found, and can another one take its place?"""

from typing import TYPE_CHECKING, Any, Final

from .check_report import Report, call
from .check_seeds import Kind, ask_seeds

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..core.primaries import SentinelAnswer
    from ..core.slots import Node
    from ..redis_url import RedisAddress, RedisUrl

_FEW: Final = 3  # Sentinels that are needed for a majority without one of them
_SENTINEL: Final = Kind(
    "Sentinel",
    "Sentinel",
    rights="allow this user of the Sentinels: ACL SETUSER … allchannels +subscribe +ping"
    " +sentinel|get-master-addr-by-name +sentinel|master +sentinel|replicas +sentinel|ckquorum",
    other_kind="write redis:// for a single Redis, redis+cluster:// for a Cluster",
    auth="set the password of the Sentinels: ?sentinel_password=… (and sentinel_username=…) in"
    " REDIS_URL",
)


async def check_sentinels(
    url: "RedisUrl", report: Report
) -> tuple[list["RedisAddress"], list["RedisAddress"]]:
    """Report on the Sentinels; return the primary and the replicas that they name."""
    from ..core.primaries import newest_primary

    async def ask(
        redis: "RedisConnection", sentinel: "RedisAddress", part: Report
    ) -> "tuple[SentinelAnswer, list[Node]] | None":
        return await _ask_sentinel(redis, url, part)

    told, _ = await ask_seeds(url, report, _SENTINEL, ask)
    if not told:
        return [], []
    if len(named := {answer.primary for answer, _ in told.values()}) > 1:
        names = ", ".join(f"{host}:{port}" for host, port in sorted(named))
        report.fail(
            f"the Sentinels name different primaries: {names}",
            "wait until a failover is over; if they still differ, they watch different sets, or"
            " can't reach each other",
        )
    primary = newest_primary(answer for answer, _ in told.values())
    replicas = next(found for answer, found in told.values() if answer.primary == primary)
    return [url.node(*primary)], [url.node(*node) for node in replicas]


async def _ask_sentinel(
    redis: "RedisConnection", url: "RedisUrl", report: Report
) -> "tuple[SentinelAnswer, list[Node]] | None":
    """What it says of the primary, and the replicas that are not down."""
    from ..core.primaries import SentinelAnswer, read_fields

    name = url.master_name
    address = await call(redis, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
    if address is None:
        known = await call(redis, "SENTINEL", "MASTERS", unless=("NOPERM",))
        names = ", ".join(read_fields(each)["name"] for each in known or [])
        report.fail(
            f"it knows no primary {name}",
            f"write the name that it knows at the end of REDIS_URL: {names}" if names
            else "let it watch the primary: SENTINEL MONITOR",
        )  # fmt: skip
        return None
    details = await call(redis, "SENTINEL", "MASTER", name)
    listed = await call(redis, "SENTINEL", "REPLICAS", name)
    quorum = await call(redis, "SENTINEL", "CKQUORUM", name, unless=("NOQUORUM", "NOGOOD"))
    await call(redis, "SUBSCRIBE", "+switch-master")
    answer = SentinelAnswer.read(address, details, name)
    report.ok("connected")
    replicas = [read_fields(each) for each in listed]
    _check_set(read_fields(details), replicas, quorum, len(url.seeds), report)
    return answer, [(each["ip"], int(each["port"])) for each in replicas if not _is_down(each)]


def _check_set(
    primary: dict[str, str],
    replicas: list[dict[str, str]],
    quorum: Any,
    seeds: int,
    report: Report,
) -> None:
    sentinels = int(primary.get("num-other-sentinels", 0)) + 1
    if _is_down(primary):
        report.fail(
            "it can't reach the primary",
            "start the primary, or wait for the failover; see the log of the Sentinel",
        )
    if quorum is None:
        report.fail(
            f"no quorum: too few of {sentinels} Sentinels can be reached to choose another primary",
            "start the other Sentinels, and let them reach each other (SENTINEL CKQUORUM)",
        )
    elif sentinels < _FEW:
        report.warn(
            f"{sentinels} Sentinel{'s' if sentinels > 1 else ''}: without one of them there is no"
            f" failover. Use {_FEW} or more"
        )
    if seeds == 1 < sentinels:
        report.warn("it is the only one in REDIS_URL: name the other Sentinels, too")
    if not replicas:
        report.fail("the primary has no replica", "add one: REPLICAOF HOST PORT")
    elif all(map(_is_down, replicas)):
        report.fail(
            "it can reach no replica of the primary", "start one, or see the log of the Sentinel"
        )


def _is_down(instance: dict[str, str]) -> bool:
    flags = set(instance.get("flags", "").split(","))
    return not flags.isdisjoint({"s_down", "o_down", "disconnected"})
