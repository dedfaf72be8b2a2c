"""Cluster: which node is the primary of each slot."""

import random
from typing import Final

from ..core.primaries import NodeAnswer, newest_slots
from ..core.slots import SlotMap
from ..redis_url import RedisAddress, RedisUrl
from ..runtime.supervision import ConnectionLost
from .asking import ask_servers
from .connection import RedisConnection, no_error
from .topology import Topology

_MOST_ASKED: Final = 6  # nodes; a big Cluster is not asked as a whole


def cluster_topology(url: RedisUrl) -> Topology:
    """The topology of a Cluster. It asks nodes of the URL, and those that are known by then.

    A node that has become silent is a sign of a failover.
    """
    silent = set[RedisAddress]()

    async def ask(redis: RedisConnection, node: RedisAddress) -> NodeAnswer:
        info, slots = await redis.ask_all([("CLUSTER", "INFO"), ("CLUSTER", "SLOTS")])
        silent.discard(node)
        try:
            return NodeAnswer.read(info, no_error(slots, "CLUSTER"), node.host)
        except ValueError as error:
            raise ConnectionLost(f"a node: {error}") from None

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
        return newest_slots(answers)

    topology = Topology(look, lambda node: url.node(*node), is_cluster=True)
    return topology
