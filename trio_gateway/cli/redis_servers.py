"""The servers of ``REDIS_URL`` for a command: clients of redis-py, and one sentence on failure."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from .errors import Failure

if TYPE_CHECKING:
    import redis

    from ..redis_url import RedisAddress

TIMEOUT: Final = 5.0  # seconds for one reply


class RedisServers:
    """The primaries and replicas as they are now; raises :exc:`Failure` if nobody says who.

    A command is not sent again: an event must not be added twice.
    """

    def __init__(self, redis_url: str) -> None:
        import trio

        from ..broker.topologies import make_topology
        from ..redis_url import RedisUrl
        from ..runtime.supervision import ConnectionLost

        self._topology = make_topology(RedisUrl.from_url(redis_url))
        self._clients: dict[RedisAddress, redis.Redis] = {}
        try:
            self._slots = trio.run(self._topology.current)
        except ConnectionLost as lost:
            raise Failure(f"Redis: {lost}; run trio-gateway check") from None

    @property
    def is_cluster(self) -> bool:
        return self._topology.is_cluster

    def primary(self, key: str) -> "redis.Redis":
        """A client of the server that executes commands for a key."""
        from ..core.slots import slot_of

        node = self._slots.primary_of(slot_of(key))
        if node is None:
            raise Failure(f"Redis: no node has the slot of {key}; run trio-gateway check")
        return self._client(self._topology.address(node))

    def all(self) -> "list[redis.Redis]":
        """Clients of all servers, replicas too."""
        nodes = sorted(self._slots.primaries | self._slots.replicas)
        return [self._client(self._topology.address(node)) for node in nodes]

    def _client(self, address: "RedisAddress") -> "redis.Redis":
        import redis
        from redis.backoff import NoBackoff
        from redis.retry import Retry

        if address not in self._clients:
            pool = redis.ConnectionPool(
                **address.pool_options(redis),
                protocol=2,
                socket_timeout=TIMEOUT,
                socket_connect_timeout=TIMEOUT,
                retry=Retry(NoBackoff(), 0),
            )
            self._clients[address] = redis.Redis(connection_pool=pool)
        return self._clients[address]


@contextmanager
def redis_failures() -> Iterator[None]:
    """A command that fails in the block ends the program with one sentence."""
    import redis

    try:
        yield
    except redis.RedisError as error:
        raise Failure(f"Redis: {type(error).__name__}; run trio-gateway check") from None
