"""``check`` of a Cluster: has every slot a primary, and can another node take its place?"""

from typing import TYPE_CHECKING, Any, Final

from .check_report import Report, call

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..redis_url import RedisAddress, RedisUrl

_RIGHTS: Final = "allow this user on all nodes: ACL SETUSER … +cluster|slots +cluster|info +asking"


async def check_cluster(
    url: "RedisUrl", report: Report
) -> tuple[list["RedisAddress"], list["RedisAddress"]]:
    """Report on the Cluster as the nodes of the URL see it; return its primaries and replicas.

    Nodes that were reported as lost are not among them.
    """
    from ..broker.connection import open_redis
    from ..core.slots import SLOTS, SlotMap
    from ..runtime.supervision import ConnectionLost

    best, slots = None, SlotMap()
    lost_nodes = set()
    for node in url.seeds:
        part = report.part(f"node at {node}", quiet=False)
        try:
            async with open_redis(node, any_role=True) as redis:
                reply = await _check_node(redis, part)
            if reply is None:
                continue
            found = SlotMap.from_reply(reply, node.host)
        except ConnectionLost as lost:
            part.fail_to_connect(str(lost))
            lost_nodes.add(node)
            continue
        except ValueError as error:
            part.fail(str(error), "the server is no node of a Cluster: set REDIS_URL")
            continue
        if best is None or found.covered > slots.covered:
            best, slots = (reply, node), found
    if best is None:
        return [], []
    if not slots.covers_all:
        report.fail(
            f"{SLOTS - slots.covered} of {SLOTS} slots have no primary",
            "redis-cli --cluster check HOST:PORT, and --cluster fix",
        )
    reply, node = best
    for primary in sorted(slots.primaries - _with_replicas(reply, node.host)):
        report.fail(
            f"the primary {url.node(*primary)} has no replica",
            "redis-cli --cluster add-node HOST:PORT"
            f" {url.node(*primary)} --cluster-slave, and keep it running",
        )
    primaries, replicas = (
        [each for node in sorted(nodes) if (each := url.node(*node)) not in lost_nodes]
        for nodes in (slots.primaries, slots.replicas)
    )
    return primaries, replicas


async def _check_node(redis: "RedisConnection", report: Report) -> Any:
    """The reply to ``CLUSTER SLOTS``, or None after a problem was reported."""
    from ..runtime.supervision import ConnectionLost

    try:
        info = await call(redis, "CLUSTER", "INFO")
        reply = await call(redis, "CLUSTER", "SLOTS")
        await call(redis, "ASKING")
    except ConnectionLost as lost:
        problem = str(lost)
        if "NOPERM" in problem:
            report.fail(problem, _RIGHTS)
        elif "ERR" in problem:
            report.fail(
                f"{problem}: the server is no node of a Cluster",
                "write redis:// for a single Redis, redis+sentinel:// for a Sentinel set",
            )
        else:
            raise
        return None
    if b"cluster_state:ok" in info:
        report.ok("connected")
    else:
        report.fail(
            "it says that the Cluster is down (cluster_state:fail)",
            "start the missing nodes: redis-cli --cluster check HOST:PORT",
        )
    return reply


def _with_replicas(reply: Any, asked: str) -> set[tuple[str, int]]:
    """The primaries that have a replica for each of their ranges."""
    from ..core.slots import SlotMap

    found: dict[tuple[str, int], bool] = {}
    for entry in reply:
        part = SlotMap.from_reply([entry], asked)
        for primary in part.primaries:
            found[primary] = found.get(primary, True) and bool(part.replicas)
    return {primary for primary, has in found.items() if has}
