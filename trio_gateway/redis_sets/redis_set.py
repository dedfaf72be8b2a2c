"""What all sets have: a URL, the data nodes, and who is the primary."""

from collections import Counter
from collections.abc import Iterable, Sequence
from urllib.parse import quote, urlencode

from .node import Node, NotRunning, wait_until

_TIMEOUT = 20.0  # seconds


class RedisSet:
    """Servers that belong together. ``nodes`` are those with data, ``url`` is for clients."""

    def __init__(self, url: str, nodes: Sequence[Node]) -> None:
        self.url = url
        self.nodes = tuple(nodes)

    def primary(self, key: str = "") -> Node:
        """The primary of a key, as most of those say who know; a Sentinel set has only one.

        Raises :exc:`NotRunning` if they do not agree, as in the middle of a failover.
        """
        raise NotImplementedError

    def is_healthy(self) -> bool:
        """Whether every server runs, has its role, and has the data of its primary."""
        raise NotImplementedError

    def failover(self, key: str = "") -> None:
        """Begin a planned failover of the primary of a key; it has begun when this returns."""
        raise NotImplementedError

    def rejoin(self, node: Node) -> None:
        """Start a killed node again so that it becomes a replica of the present primary."""
        node.restart()

    @property
    def all_nodes(self) -> Sequence[Node]:
        """The nodes, and the servers that watch them."""
        return self.nodes

    def wait_healthy(self, timeout: float = _TIMEOUT) -> None:
        """Wait until the set is healthy; raises :exc:`NotRunning` after this many seconds."""
        wait_until(self.is_healthy, timeout, "the Redis servers are not healthy")

    def wait_writable(
        self, key: str = "", *, other_than: Node | None = None, timeout: float = _TIMEOUT
    ) -> Node:
        """Wait until a node, other than that one, accepts writes to a key; return it."""
        found: list[Node] = []

        def some_does() -> bool:
            running = [node for node in self.nodes if node is not other_than and node.runs]
            found.extend(node for node in running if node.takes_writes(key or "key"))
            return bool(found)

        wait_until(some_does, timeout, "no Redis server accepts writes")
        return found[0]

    def node_at(self, port: int) -> Node:
        """The node with data that the others know by this port."""
        for node in self.nodes:
            if node.known_port == port:
                return node
        raise NotRunning(f"no Redis server of this set has the port {port}")


def majority(answers: Iterable[int], voters: int) -> int:
    """The answer that more than half of the voters give."""
    for answer, votes in Counter(answers).most_common(1):
        if 2 * votes > voters:
            return answer
    raise NotRunning("the Redis servers do not agree who is the primary")


def make_url(
    scheme: str, password: str | None, nodes: Iterable[Node], path: str = "", **options: str
) -> str:
    """The URL of these servers."""
    user = "" if password is None else f":{quote(password, safe='')}@"
    hosts = ",".join(f"127.0.0.1:{node.known_port}" for node in nodes)
    query = f"?{urlencode(options)}" if options else ""
    return f"{scheme}://{user}{hosts}{path}{query}"
