"""The topology that a Redis URL leads to."""

from ..redis_url import RedisKind, RedisUrl
from .cluster import cluster_topology
from .sentinel import sentinel_topology
from .topology import Topology, single


def make_topology(url: RedisUrl) -> Topology:
    """The topology of a URL; nobody is asked yet."""
    match url.kind:
        case RedisKind.SINGLE:
            return single(url.data)
        case RedisKind.SENTINEL:
            return sentinel_topology(url)
        case RedisKind.CLUSTER:
            return cluster_topology(url)
