"""Which server an event is sent to: the one of the URL, or what Sentinels or a Cluster say.

They are asked again every second while events are published, and whenever a server has failed. What
they said last counts while none of them answers.
"""

from typing import Protocol

from ..core.primaries import KnownReplicas
from ..redis_url import RedisAddress, RedisKind, RedisUrl
from .cluster import Cluster
from .sentinels import Sentinels


class Nodes(Protocol):
    """Knows the primaries. Threads may share it."""

    def primary_of(self, key: str) -> RedisAddress:
        """The server that accepts writes to the key. Raises :exc:`NotReached` if it is unknown."""

    def replicas_of(self, primary: RedisAddress) -> KnownReplicas | None:
        """The replicas of this primary; none if nothing is known about that.

        None if it has stopped being the primary.
        """

    def suspect(self, address: RedisAddress) -> None:
        """Look again before the next answer: this server has failed, or is not the primary."""

    def close(self) -> None:
        """Close all connections; a later question connects again."""


def open_nodes(url: RedisUrl, *, counts_replicas: bool = False) -> Nodes:
    """Make what knows the primaries of this URL. It connects when it is asked.

    ``counts_replicas`` makes it ask for the replicas, too.
    """
    if url.kind is RedisKind.SENTINEL:
        return Sentinels(url, counts_replicas)
    if url.kind is RedisKind.CLUSTER:
        return Cluster(url)
    return _Server(url)


class _Server:
    """The one server of a URL; a later connection may lead to another one, by its name."""

    def __init__(self, url: RedisUrl) -> None:
        self._address = url.data

    def primary_of(self, key: str) -> RedisAddress:
        return self._address

    def replicas_of(self, primary: RedisAddress) -> KnownReplicas | None:
        return KnownReplicas()

    def suspect(self, address: RedisAddress) -> None:
        pass

    def close(self) -> None:
        pass
