"""Cluster: which node is the primary of each slot."""

import random
from typing import Any, Final, NamedTuple

from ..core.slots import SlotMap
from ..redis_url import RedisAddress, RedisUrl
from ..runtime.supervision import ConnectionLost
from .asking import ask_servers
from .connection import RedisConnection, no_error
from .topology import Topology

_MOST_ASKED: Final = 6  # nodes; a big Cluster is not asked as a whole


class Told(NamedTuple):
    """What one node says. The highest is to be believed.

    A node that is cut off, or was forgotten, sees no intact Cluster, or has an old epoch.
    """

    is_ok: bool  # it sees most primaries, and each slot has one
    epoch: int  # grows with each failover
    covered: int  # slots
    slots: SlotMap

    @property
    def rank(self) -> tuple[bool, int, int]:
        return self[:3]


def cluster_topology(url: RedisUrl) -> Topology:
    """The topology of a Cluster. It asks nodes of the URL, and those that are known by then.

    A node that has become silent is a sign of a failover.
    """
    silent = set[RedisAddress]()

    async def ask(redis: RedisConnection, node: RedisAddress) -> Told:
        info, slots = await redis.ask_all([("CLUSTER", "INFO"), ("CLUSTER", "SLOTS")])
        silent.discard(node)
        return read_answer(info, no_error(slots, "CLUSTER"), node.host)

    async def look(before: SlotMap) -> SlotMap:
        known = before.primaries | before.replicas
        nodes = dict.fromkeys((*url.seeds, *(url.node(*node) for node in known)))
        some = random.sample(list(nodes), min(len(nodes), _MOST_ASKED))
        known_silent = silent & nodes.keys()
        silent.clear()
        silent.update(known_silent.difference(some), some)
        answers = await ask_servers(some, ask)
        if silent - known_silent:
            topology.suspect_all()
        return max(answers, key=lambda told: told.rank).slots

    topology = Topology(look, lambda node: url.node(*node), is_cluster=True)
    return topology


def read_answer(info: Any, slots: Any, asked: str) -> Told:
    """Read the replies of the node at the host ``asked`` to ``CLUSTER INFO`` and ``SLOTS``.

    Without the right to the first command its answer counts least. Raises :exc:`ConnectionLost`
    if a reply has another shape.
    """
    lines = info.split(b"\r\n") if isinstance(info, bytes) else []
    facts = dict(line.split(b":", 1) for line in lines if b":" in line)
    try:
        found = SlotMap.from_reply(slots, asked)
        epoch = int(facts.get(b"cluster_current_epoch", 0))
    except ValueError:
        raise ConnectionLost("the server is no node of a Cluster") from None
    return Told(facts.get(b"cluster_state") == b"ok", epoch, found.covered, found)
