"""``check`` of a Sentinel set: can the primary be found, and can another one take its place?"""

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from .check_report import Report, call

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress, RedisUrl

_FEW: Final = 3  # Sentinels that are needed for a majority without one of them
_RIGHTS: Final = (
    "allow this user of the Sentinels: ACL SETUSER … allchannels +subscribe +ping"
    " +sentinel|get-master-addr-by-name +sentinel|master +sentinel|replicas +sentinel|ckquorum"
)
_AUTH: Final = (
    "set the password of the Sentinels: ?sentinel_password=… (and sentinel_username=…) in REDIS_URL"
)


class Told(NamedTuple):
    """What a Sentinel says."""

    primary: tuple[str, int]
    replicas: list[tuple[str, int]]


async def check_sentinels(
    url: "RedisUrl", report: Report
) -> tuple[list["RedisAddress"], list["RedisAddress"]]:
    """Report on the Sentinels; return the primary and the replicas that they name."""
    from ..broker.connection import open_redis
    from ..runtime.supervision import ConnectionLost

    told: list[Told] = []
    for sentinel in url.seeds:
        part = report.part(f"Sentinel at {sentinel}", quiet=False)
        try:
            async with open_redis(sentinel, any_role=True) as redis:
                found = await _check_sentinel(redis, url, part)
        except ConnectionLost as lost:
            problem = str(lost)
            if any(sign in problem for sign in ("NOAUTH", "WRONGPASS", "AUTH failed")):
                part.fail(problem, _AUTH)
            else:
                part.fail_to_connect(problem)
            continue
        if found is not None:
            told.append(found)
    if not told:
        return [], []
    named = {each.primary for each in told}
    if len(named) > 1:
        names = ", ".join(f"{host}:{port}" for host, port in sorted(named))
        report.fail(
            f"the Sentinels name different primaries: {names}",
            "wait until a failover is over; if they still differ, they watch different sets, or"
            " can't reach each other",
        )
    return [url.node(*told[0].primary)], [url.node(*node) for node in told[0].replicas]


async def _check_sentinel(redis: "RedisConnection", url: "RedisUrl", report: Report) -> Told | None:
    from ..runtime.supervision import ConnectionLost

    name = url.master_name
    try:
        address = await call(redis, "SENTINEL", "GET-MASTER-ADDR-BY-NAME", name)
        if address is None:
            known = await call(redis, "SENTINEL", "MASTERS", unless=("NOPERM",))
            names = ", ".join(_fields(each)["name"] for each in known or [])
            report.fail(
                f"it knows no primary {name}",
                f"write the name that it knows at the end of REDIS_URL: {names}" if names
                else "let it watch the primary: SENTINEL MONITOR",
            )  # fmt: skip
            return None
        about = _fields(await call(redis, "SENTINEL", "MASTER", name))
        listed = await call(redis, "SENTINEL", "REPLICAS", name)
        quorum = await call(redis, "SENTINEL", "CKQUORUM", name, unless=("NOQUORUM", "NOGOOD"))
        await call(redis, "SUBSCRIBE", "+switch-master")
    except ConnectionLost as lost:
        problem = str(lost)
        if "NOPERM" in problem:
            report.fail(problem, _RIGHTS)
        elif "NOAUTH" in problem:
            report.fail(problem, _AUTH)
        elif "ERR" in problem:
            report.fail(
                f"{problem}: the server is no Sentinel",
                "write redis:// for a single Redis, redis+cluster:// for a Cluster",
            )
        else:
            raise
        return None
    report.ok("connected")
    replicas = [_fields(each) for each in listed]
    _check_set(about, replicas, quorum, len(url.seeds), report)
    return Told(
        (address[0].decode(), int(address[1])),
        [(each["ip"], int(each["port"])) for each in replicas if not _is_down(each)],
    )


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


def _fields(reply: Any) -> dict[str, str]:
    words = [word.decode(errors="replace") for word in reply]
    return dict(zip(words[::2], words[1::2], strict=False))
