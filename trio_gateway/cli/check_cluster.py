"""``check`` of a Cluster: has every slot a primary, and can another node take its place?"""

from typing import TYPE_CHECKING, Any, Final

from .check_report import Report, call
from .check_seeds import Kind, ask_seeds

if TYPE_CHECKING:
    from ..broker.connection import RedisConnection
    from ..core.primaries import NodeAnswer
    from ..core.slots import Node
    from ..redis_url import RedisAddress, RedisUrl

_NODE: Final = Kind(
    "node",
    "node of a Cluster",
    rights="allow this user on all nodes: ACL SETUSER … +cluster|slots +cluster|info +asking",
    other_kind="write redis:// for a single Redis, redis+sentinel:// for a Sentinel set",
)


async def check_cluster(
    url: "RedisUrl", report: Report
) -> tuple[list["RedisAddress"], list["RedisAddress"]]:
    """Report on the Cluster as the nodes of the URL see it; return its primaries and replicas.

    Nodes that were reported as lost are not among them.
    """
    from ..core.primaries import newest_slots
    from ..core.slots import SLOTS

    told, lost = await ask_seeds(url, report, _NODE, _ask_node)
    if not told:
        return [], []
    slots = newest_slots(answer for answer, _ in told.values())
    if not slots.covers_all:
        report.fail(
            f"{SLOTS - slots.covered} of {SLOTS} slots have no primary",
            "redis-cli --cluster check HOST:PORT, and --cluster fix",
        )
    with_replicas = next(found for answer, found in told.values() if answer.slots is slots)
    for primary in sorted(slots.primaries - with_replicas):
        report.fail(
            f"the primary {url.node(*primary)} has no replica",
            "redis-cli --cluster add-node HOST:PORT"
            f" {url.node(*primary)} --cluster-slave, and keep it running",
        )
    primaries, replicas = (
        [each for node in sorted(nodes) if (each := url.node(*node)) not in lost]
        for nodes in (slots.primaries, slots.replicas)
    )
    return primaries, replicas


async def _ask_node(
    redis: "RedisConnection", node: "RedisAddress", report: Report
) -> "tuple[NodeAnswer, set[Node]]":
    """What it says of the slots, and the primaries that have a replica for each of their ranges."""
    from ..core.primaries import NodeAnswer

    info = await call(redis, "CLUSTER", "INFO")
    reply = await call(redis, "CLUSTER", "SLOTS")
    await call(redis, "ASKING")
    answer = NodeAnswer.read(info, reply, node.host)
    if answer.is_ok:
        report.ok("connected")
    else:
        report.fail(
            "it says that the Cluster is down (cluster_state:fail)",
            "start the missing nodes: redis-cli --cluster check HOST:PORT",
        )
    return answer, _with_replicas(reply, node.host)


def _with_replicas(reply: Any, asked: str) -> "set[Node]":
    from ..core.slots import SlotMap

    found: dict[Node, bool] = {}
    for entry in reply:
        part = SlotMap.from_reply([entry], asked)
        for primary in part.primaries:
            found[primary] = found.get(primary, True) and bool(part.replicas)
    return {primary for primary, has in found.items() if has}
