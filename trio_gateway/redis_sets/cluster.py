"""A Cluster: primaries that divide the slots, each with replicas that can take its place."""

import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .fronts import Front, no_front, source_of
from .node import Node, start_all, wait_until
from .ports import reserved_ports
from .processes import ServerGroup, server_group
from .redis_set import RedisSet, majority, make_url

SLOTS = 16384
_NODE_TIMEOUT = 2000  # milliseconds without an answer until a node is taken for dead
_COMMAND_TIMEOUT = 5.0  # seconds until a failover must have begun
_MOVED_AT_ONCE = 100  # keys


class Cluster(RedisSet):
    """Primaries and replicas, ``nodes``: first those that were primaries at the start."""

    def __init__(
        self, url: str, nodes: Sequence[Node], ids: Mapping[Node, str], password: str | None
    ) -> None:
        super().__init__(url, nodes)
        self._ids = ids
        self._password = password

    def slot(self, key: str) -> int:
        """The slot of a key."""
        return int(self._any().ask("CLUSTER", "KEYSLOT", key))

    def _any(self) -> Node:
        return next(node for node in self.nodes if node.try_ask("PING"))

    def primary(self, key: str = "key") -> Node:
        """The node that has the slot, as more than half of the nodes say."""
        slot = self.slot(key)
        owners = [_owner(node.try_ask("CLUSTER", "SLOTS") or [], slot) for node in self.nodes]
        named = [port for port in owners if port is not None]
        return self.node_at(majority(named, len(self.nodes)))

    def primaries(self) -> list[Node]:
        """The nodes that say they are primaries, in the order of ``nodes``."""
        return [node for node in self.nodes if node.info("replication").get("role") == "master"]

    def is_healthy(self) -> bool:
        """Whether every node sees all slots covered, and every replica with its data."""
        return all(self._is_in_order(node) for node in self.nodes)

    def _is_in_order(self, node: Node) -> bool:
        state = (node.try_ask("CLUSTER", "INFO") or "").split()
        if not {"cluster_state:ok", f"cluster_known_nodes:{len(self.nodes)}"} <= set(state):
            return False
        told = (node.try_ask("CLUSTER", "NODES") or "").splitlines()
        if any("fail" in line.split()[2] for line in told):
            return False
        # They tell each other of a replica that has its data up to a second later.
        slots = node.try_ask("CLUSTER", "SLOTS") or []
        if not all(replicas for _start, _end, _primary, *replicas in slots):
            return False
        found = node.info("replication")
        if found.get("role") == "slave":
            return found.get("master_link_status") == "up"
        return int(found.get("connected_slaves", 0)) > 0

    def failover(self, key: str = "key") -> None:
        """Begin a planned failover of the key's slot to a replica of its primary."""
        primary = self.primary(key)

        def begins() -> bool:
            for node in self.nodes:
                found = node.info("replication")
                if found.get("role") == "slave" and found.get("master_port") == primary.known_port:
                    return node.try_ask("CLUSTER", "FAILOVER") is not None
            return False

        wait_until(begins, _COMMAND_TIMEOUT, "no replica begins a failover")

    def move_slot(self, key: str, target: Node) -> None:
        """Move the key's slot, with all of its keys, to another primary."""
        slot, source = self.slot(key), self.primary(key)
        here, there = self._ids[source], self._ids[target]
        target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", here)
        source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", there)
        auth = [] if self._password is None else ["AUTH", self._password]
        while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, _MOVED_AT_ONCE):
            source.ask(
                "MIGRATE",
                "127.0.0.1",
                target.known_port,
                "",
                0,
                5000,
                *auth,
                "KEYS",
                *keys,
                timeout=6,
            )
        for node in (target, source, *self.primaries()):
            node.ask("CLUSTER", "SETSLOT", slot, "NODE", there, timeout=6)


def _owner(slots: Sequence[Any], slot: int) -> int | None:
    """The port of the primary that has a slot, by the reply to CLUSTER SLOTS."""
    for start, end, primary, *_ in slots:
        if start <= slot <= end:
            return int(primary[1])
    return None


@contextmanager
def cluster_set(
    *,
    primaries: int = 3,
    replicas: int = 1,
    password: str | None = None,
    front: Front = no_front,
    **config: str,
) -> Iterator[Cluster]:
    """Start a Cluster and wait until it is healthy; at the end nothing of it is left.

    ``replicas`` is their number for each primary, ``config`` and ``front`` as of
    :func:`~trio_gateway.redis_sets.sentinel_set`. It takes 2.3 s, of which a primary refuses
    writes for 2 s (CLUSTER_WRITABLE_DELAY). After a kill of a primary its replica accepts writes
    within 2.5 to 4.5 s.

    Raises :exc:`NotRunning`.
    """
    options = {
        "cluster-enabled": "yes",
        "cluster-node-timeout": str(_NODE_TIMEOUT),
        "repl-diskless-sync": "yes",
        "repl-diskless-sync-delay": "0",
        **{name.replace("_", "-"): value for name, value in config.items()},
    }
    if password is not None:
        options["primaryauth"] = f'"{password}"'
    count = primaries * (1 + replicas)
    # The second half is for the connections between the servers.
    with server_group() as group, reserved_ports(2 * count) as first:
        ports = range(first, first + count)
        nodes, ids = _nodes(group, ports, primaries, password, options, front)
        start_all(nodes)
        found = Cluster(make_url("redis+cluster", password, nodes), nodes, ids, password)
        found.wait_healthy()
        yield found


def _nodes(
    group: ServerGroup,
    ports: range,
    primaries: int,
    password: str | None,
    options: Mapping[str, str],
    front: Front,
) -> tuple[list[Node], dict[Node, str]]:
    """Nodes that know each other from the start, by the file in which they remember it.

    That is a second faster than CLUSTER MEET and ADDSLOTS.
    """
    first, count = ports.start, len(ports)
    ids = {port: secrets.token_hex(20) for port in ports}
    known = {port: front(port) for port in range(first, first + 2 * count)}
    nodes = []
    for port in ports:
        own = {
            **options,
            "cluster-port": str(port + count),
            "cluster-announce-ip": "127.0.0.1",
            "cluster-announce-port": str(known[port]),
            "cluster-announce-bus-port": str(known[port + count]),
        }
        node = Node(
            group, port, password, own, known_port=known[port], bus_port=port + count,
            source=source_of(front, port - first),
        )  # fmt: skip
        lines = []
        for n, each in enumerate(ports):
            flags = "myself," if each == port else ""
            place = f"{ids[each]} 127.0.0.1:{known[each]}@{known[each + count]}"
            if n < primaries:
                start, end = SLOTS * n // primaries, SLOTS * (n + 1) // primaries - 1
                lines.append(f"{place} {flags}master - 0 0 {n + 1} connected {start}-{end}")
            else:
                of = n % primaries
                lines.append(f"{place} {flags}slave {ids[first + of]} 0 0 {of + 1} connected")
        lines.append(f"vars currentEpoch {primaries} lastVoteEpoch 0\n")
        (node.folder / "nodes.conf").write_text("\n".join(lines))
        nodes.append(node)
    return nodes, {node: ids[node.port] for node in nodes}
