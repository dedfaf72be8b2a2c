"""A single server, which is its own set: a kill is followed by a restart."""

from collections.abc import Iterator
from contextlib import contextmanager

from .node import Node, start_all
from .ports import reserved_ports
from .processes import server_group
from .redis_set import RedisSet, make_url


class Single(RedisSet):
    """One server. It has no replica to fail over to."""

    def primary(self, key: str = "") -> Node:
        """The server."""
        return self.nodes[0]

    def failover(self, key: str = "") -> None:
        """Restart it, as there is no other one."""
        self.nodes[0].restart()

    def is_healthy(self) -> bool:
        """Whether it accepts writes."""
        return self.nodes[0].takes_writes("key")


@contextmanager
def single_redis(*, password: str | None = None, **config: str) -> Iterator[Single]:
    """Start one server, which takes 0.05 s; ``config`` as of :func:`sentinel_set`."""
    with server_group() as group, reserved_ports(1) as port:
        options = {name.replace("_", "-"): value for name, value in config.items()}
        node = Node(group, port, password, options)
        start_all([node])
        yield Single(make_url("redis", password, [node]), [node])
