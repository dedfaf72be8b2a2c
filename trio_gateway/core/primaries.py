"""Who is the primary: what Sentinels and nodes of a Cluster say, and which of them is believed.

Publisher, gateway and command line read the answers and decide here, so that the same answers
never lead them to different servers.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, NamedTuple

from .slots import Node, SlotMap

_CONNECTED: Final = re.compile(rb"^connected_slaves:(\d+)\r?$", re.MULTILINE)
_REPLICA: Final = re.compile(rb"^slave\d+:ip=([^,]+),port=(\d+),", re.MULTILINE)
_SETTLED: Final = 3000  # milliseconds after which most Sentinels know of a new primary


class SentinelAnswer(NamedTuple):
    """What one Sentinel says: the primary, and in which failover it became that."""

    epoch: int
    primary: Node

    @classmethod
    def read(cls, address: Any, details: Any, name: str) -> "SentinelAnswer":
        """Read its replies to ``GET-MASTER-ADDR-BY-NAME`` and ``MASTER``.

        If the second is an error, the user may not send that command; the epoch is 0 then. Raises
        :exc:`ValueError` if it does not know the name, or a reply has another shape.
        """
        if address is None:
            raise ValueError(f"it knows no primary with the name {name}")
        try:
            host, port = address
            known = read_fields(details) if isinstance(details, list) else {}
            return cls(int(known.get("config-epoch", 0)), (host.decode(), int(port)))
        except (AttributeError, TypeError, ValueError):
            raise ValueError("the server is not a Sentinel") from None


def newest_primary(answers: Iterable[SentinelAnswer]) -> Node:
    """The primary since the last failover; if they differ, what most say.

    Sentinels believe the highest epoch. All but the leader have an older one for a moment after a
    failover, and one that is cut off for longer.
    """
    votes = Counter(answers)
    return max(votes, key=lambda answer: (answer.epoch, votes[answer])).primary


class Replica(NamedTuple):
    """A replica, as a Sentinel describes it."""

    node: Node
    lost_for: int | None = None  # milliseconds for which it was down, or said it is a primary

    @classmethod
    def read(cls, reply: Any) -> "Replica":
        """Read one of the replies to ``SENTINEL REPLICAS``. Raises :exc:`ValueError`."""
        try:
            fields = read_fields(reply)
            lost_for = None
            if fields["role-reported"] == "master":
                lost_for = int(fields["role-reported-time"])
            elif "s-down-time" in fields:
                lost_for = int(fields["s-down-time"])
            return cls((fields["ip"], int(fields["port"])), lost_for)
        except (AttributeError, LookupError, TypeError):
            raise ValueError("the server sent an invalid reply") from None

    @property
    def counts(self) -> bool:
        """Whether it must have an event that all replicas have."""
        return self.lost_for is None or self.lost_for < _SETTLED


class ConnectedReplicas(NamedTuple):
    """The replicas that are connected to a primary, as it says itself."""

    number: int
    nodes: frozenset[Node]

    @classmethod
    def read(cls, reply: Any) -> "ConnectedReplicas":
        """Read the reply to ``INFO replication``; raises :exc:`ValueError`."""
        found = _CONNECTED.search(reply) if isinstance(reply, bytes) else None
        if found is None:
            raise ValueError("the server sent an invalid reply")
        nodes = ((host.decode(), int(port)) for host, port in _REPLICA.findall(reply))
        return cls(int(found[1]), frozenset(nodes))


class KnownReplicas(NamedTuple):
    """The replicas of a primary that count, as the Sentinels know them.

    One that has just got lost may have become the primary: the Sentinel that does that closes the
    connections to it. Until most Sentinels know, the primary of before goes on taking events, and
    its other replicas confirm them, but all of that will be lost.
    """

    number: int = 0
    lost: frozenset[Node] = frozenset()  # of them, a moment ago

    def wanted(self, connected: ConnectedReplicas) -> int:
        """How many must have an event that all have, when these are connected.

        A connected one does not stand for one that is lost: it may be a former primary that was
        started again, and that the Sentinels do not know as a replica yet.
        """
        return max(self.number, connected.number + len(self.lost - connected.nodes))


def know_replicas(
    told: Iterable[tuple[SentinelAnswer, Iterable[Replica]]], primary: Node
) -> KnownReplicas:
    """The replicas of the primary, by those Sentinels that know it as the primary."""
    number, lost = 0, set[Node]()
    for answer, replicas in told:
        if answer.primary == primary:
            counting = [each for each in replicas if each.counts]
            number = max(number, len(counting))
            lost |= {each.node for each in counting if each.lost_for is not None}
    return KnownReplicas(number, frozenset(lost))


class NodeAnswer(NamedTuple):
    """What one node of a Cluster says.

    A node that is cut off, or was forgotten, sees no intact Cluster, or has an old epoch.
    """

    is_ok: bool  # it sees most primaries, and each slot has one
    epoch: int  # grows with each failover
    covered: int  # slots
    slots: SlotMap

    @classmethod
    def read(cls, info: Any, slots: Any, asked: str) -> "NodeAnswer":
        """Read its replies to ``CLUSTER INFO`` and ``SLOTS``; it was asked at the host ``asked``.

        If the first is an error, the user may not send that command; the answer counts least then.
        Raises :exc:`ValueError` if a reply has another shape.
        """
        lines = info.split(b"\r\n") if isinstance(info, bytes) else []
        facts = dict(line.split(b":", 1) for line in lines if b":" in line)
        try:
            found = SlotMap.from_reply(slots, asked)
            epoch = int(facts.get(b"cluster_current_epoch", 0))
        except ValueError:
            raise ValueError("the server is not a node of a Cluster") from None
        return cls(facts.get(b"cluster_state") == b"ok", epoch, found.covered, found)


def newest_slots(answers: Iterable[NodeAnswer]) -> SlotMap:
    """The slots as the node sees them that knows of the last failover."""
    return max(answers, key=lambda answer: answer[:3]).slots


def read_fields(reply: Any) -> dict[str, str]:
    """Read names and values that follow each other, as a Sentinel describes a server.

    Raises :exc:`ValueError` and the like if the reply has another shape.
    """
    words = [word.decode(errors="replace") for word in reply]
    return dict(zip(words[::2], words[1::2], strict=True))
