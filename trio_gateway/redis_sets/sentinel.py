"""A Sentinel set: a primary, its replicas, and the Sentinels that choose another primary."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import redis

from .fronts import Front, no_front, source_of
from .node import Node, start_all, wait_until
from .ports import reserved_ports
from .processes import ServerGroup, server_group
from .redis_set import RedisSet, majority, make_url

NAME = "mymaster"
_DOWN_AFTER = 1000  # milliseconds without an answer until a Sentinel takes a node for dead
_FAILOVER_TIMEOUT = 2000  # milliseconds; half of the time until the next try
_COMMAND_TIMEOUT = 5.0  # seconds until a failover must have begun
_DATA = {"repl-diskless-sync": "yes", "repl-diskless-sync-delay": "0"}


class SentinelSet(RedisSet):
    """A primary with replicas, ``nodes``, and their ``sentinels``."""

    def __init__(self, url: str, nodes: Sequence[Node], sentinels: Sequence[Node]) -> None:
        super().__init__(url, nodes)
        self.sentinels = tuple(sentinels)

    def primary(self, key: str = "") -> Node:
        """The node that more than half of the Sentinels name."""
        replies = [
            sentinel.try_ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", NAME)
            for sentinel in self.sentinels
        ]
        ports = [int(reply[1]) for reply in replies if reply]
        return self.node_at(majority(ports, len(self.sentinels)))

    def is_healthy(self) -> bool:
        """Whether all replicas have the data of the primary, and the Sentinels know all."""
        if not all(each.runs for each in (*self.nodes, *self.sentinels)):
            return False
        primary = self.primary()
        replicas = [node for node in self.nodes if node is not primary]
        return (
            _is_primary_of(primary, len(replicas))
            and all(_follows(node, primary) for node in replicas)
            and all(self._knows_all(each) for each in self.sentinels)
        )

    def _knows_all(self, sentinel: Node) -> bool:
        reply = sentinel.info("sentinel").get("master0")
        return (
            sentinel.try_ask("SENTINEL", "CKQUORUM", NAME) is not None
            and isinstance(reply, dict)
            and reply["status"] == "ok"
            and int(reply["slaves"]) == len(self.nodes) - 1
            and int(reply["sentinels"]) == len(self.sentinels)
        )

    def rejoin(self, node: Node) -> None:
        """Start a killed node as a replica, as the usual start scripts do.

        One that is only started again believes to be the primary, until the Sentinels tell it
        otherwise 10 s later.
        """
        node.restart("--replicaof", "127.0.0.1", str(self.primary().known_port))

    @property
    def all_nodes(self) -> Sequence[Node]:
        """The nodes with data, then the Sentinels."""
        return (*self.nodes, *self.sentinels)

    def failover(self, key: str = "") -> None:
        """Begin a planned failover; it has begun when this returns."""

        def begins() -> bool:
            try:
                self.sentinels[0].ask("SENTINEL", "FAILOVER", NAME)
            except redis.ResponseError as error:
                if str(error).startswith(("INPROG", "NOGOODSLAVE")):  # they do not know enough yet
                    return False
                raise
            return True

        wait_until(begins, _COMMAND_TIMEOUT, "the Sentinels begin no failover")


def _is_primary_of(node: Node, replicas: int) -> bool:
    found = node.info("replication")
    return found.get("role") == "master" and found.get("connected_slaves") == replicas


def _follows(node: Node, primary: Node) -> bool:
    found = node.info("replication")
    return (
        found.get("master_link_status") == "up" and found.get("master_port") == primary.known_port
    )


@contextmanager
def sentinel_set(
    *,
    replicas: int = 2,
    sentinels: int = 3,
    password: str | None = None,
    sentinel_password: str | None = None,
    front: Front = no_front,
    **config: str,
) -> Iterator[SentinelSet]:
    """Start a Sentinel set and wait until it is healthy; at the end nothing of it is left.

    Without ``sentinel_password`` the Sentinels have none. ``config`` are options of the servers
    with data, with ``_`` for ``-``: ``appendonly="yes"``. It takes 1.2 s, most of it for the
    second replica to synchronise. After a kill of the primary another node accepts writes within
    1.5 to 3 s; a killed primary becomes a replica about 10 s after its restart.

    ``front`` puts a relay in front of each server; see ``fronts.py``.

    Raises :exc:`NotRunning`.
    """
    options = _DATA | {name.replace("_", "-"): value for name, value in config.items()}
    if password is not None:
        options["primaryauth"] = f'"{password}"'
    with server_group() as group, reserved_ports(1 + replicas + sentinels) as first:
        data = {port: front(port) for port in range(first, first + 1 + replicas)}
        watching = {
            port: front(port) for port in range(first + len(data), first + len(data) + sentinels)
        }
        nodes = []
        for port, known in data.items():
            own = {
                **options,
                "replica-announce-ip": "127.0.0.1",
                "replica-announce-port": str(known),
            }
            if port != first:
                own["replicaof"] = f"127.0.0.1 {data[first]}"
            source = source_of(front, port - first)
            nodes.append(Node(group, port, password, own, known_port=known, source=source))
        guards = _sentinels(
            group,
            watching,
            list(data.values()),
            password,
            sentinel_password,
            source_of(front, len(data)),
        )
        start_all(nodes[:1])  # first: a replica that finds none tries again only after a second
        start_all([*nodes[1:], *guards])
        extra = {} if sentinel_password is None else {"sentinel_password": sentinel_password}
        url = make_url("redis+sentinel", password, guards, f"/{NAME}", **extra)
        found = SentinelSet(url, nodes, guards)
        found.wait_healthy()
        yield found


def _sentinels(
    group: ServerGroup,
    ports: Mapping[int, int],
    data: Sequence[int],
    password: str | None,
    own_password: str | None,
    source: str | None,
) -> list[Node]:
    """Sentinels that know all others from the start, rather than from hellos of 2 s."""
    ids = {port: secrets.token_hex(20) for port in ports}
    quorum = len(ports) // 2 + 1
    found = []
    for port, known in ports.items():
        lines = [
            f"sentinel myid {ids[port]}",
            "sentinel announce-ip 127.0.0.1",
            f"sentinel announce-port {known}",
            f"sentinel monitor {NAME} 127.0.0.1 {data[0]} {quorum}",
            f"sentinel down-after-milliseconds {NAME} {_DOWN_AFTER}",
            f"sentinel failover-timeout {NAME} {_FAILOVER_TIMEOUT}",
            f"sentinel parallel-syncs {NAME} {len(data)}",
            *(f"sentinel known-replica {NAME} 127.0.0.1 {each}" for each in data[1:]),
            *(
                f"sentinel known-sentinel {NAME} 127.0.0.1 {other} {ids[each]}"
                for each, other in ports.items()
                if each != port
            ),
        ]
        if password is not None:
            lines.append(f'sentinel auth-pass {NAME} "{password}"')
        if own_password is not None:
            lines.append(f'sentinel sentinel-pass "{own_password}"')
        found.append(
            Node(
                group, port, own_password, {}, lines=lines, arguments=["--sentinel"],
                known_port=known, source=source,
            )
        )  # fmt: skip
    return found
