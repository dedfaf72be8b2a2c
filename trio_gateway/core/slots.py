"""Slots of a Redis Cluster: which key is in which, and which node owns it."""

from binascii import crc_hqx
from bisect import bisect_right
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

SLOTS: Final = 16384
Node = tuple[str, int]  # host and port


def slot_of(key: str) -> int:
    """The slot of a key or of a sharded channel: CRC-16 of its hash tag."""
    return crc_hqx(hash_tag(key).encode(), 0) % SLOTS


def hash_tag(key: str) -> str:
    """What is between the first ``{`` of a key and the next ``}``; if that is nothing, the key.

    ``{tag}`` in another key brings that into the same slot.
    """
    _, opened, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return tag if opened and closed and tag else key


@dataclass(frozen=True)
class SlotMap:
    """Which node is the primary of each slot."""

    ranges: tuple[tuple[int, int, Node], ...] = ()  # first slot, last slot, primary; in order
    replicas: frozenset[Node] = frozenset()

    @classmethod
    def of_one(cls, primary: Node) -> "SlotMap":
        """One primary for all slots: that of a Redis that is not a Cluster."""
        return cls(((0, SLOTS - 1, primary),))

    @classmethod
    def from_reply(cls, reply: Any, asked: str) -> "SlotMap":
        """Read the reply to ``CLUSTER SLOTS``, from a node that was asked at the host ``asked``.

        Raises :exc:`ValueError` for anything else.
        """
        ranges, replicas = [], set[Node]()
        try:
            for first, last, primary, *others in reply:
                ranges.append((int(first), int(last), _node(primary, asked)))
                replicas.update(_node(each, asked) for each in others)
        except (LookupError, TypeError, ValueError):
            raise ValueError("not a reply to CLUSTER SLOTS") from None
        return cls(tuple(sorted(ranges)), frozenset(replicas))

    @cached_property
    def _firsts(self) -> list[int]:
        return [first for first, _, _ in self.ranges]

    @property
    def covers_all(self) -> bool:
        """Whether each slot has a primary."""
        return self.covered == SLOTS

    @property
    def covered(self) -> int:
        """The number of slots that have a primary."""
        return sum(last - first + 1 for first, last, _ in self.ranges)

    @cached_property
    def primaries(self) -> frozenset[Node]:
        """The nodes that own slots."""
        return frozenset(node for _, _, node in self.ranges)

    def primary_of(self, slot: int) -> Node | None:
        """The node that owns the slot, or None if nobody does."""
        at = bisect_right(self._firsts, slot) - 1
        if at < 0 or slot > self.ranges[at][1]:
            return None
        return self.ranges[at][2]

    def primaries_of(self, slot: int | None) -> frozenset[Node]:
        """The node that owns the slot; all that own any, if None."""
        if slot is None:
            return self.primaries
        return frozenset({found}) if (found := self.primary_of(slot)) else frozenset()

    def moved(self, slot: int, primary: Node) -> "SlotMap":
        """The map after this slot got another primary."""
        ranges = [(slot, slot, primary)]
        for first, last, node in self.ranges:
            ranges += [
                (start, end, node)
                for start, end in ((first, min(last, slot - 1)), (max(first, slot + 1), last))
                if start <= end
            ]
        return SlotMap(tuple(sorted(ranges)), self.replicas - {primary})


def read_node(address: str, asked: str) -> Node:
    """Read ``host:port`` of a redirection (MOVED, ASK) by a node asked at the host ``asked``.

    Raises :exc:`ValueError`.
    """
    host, _, port = address.rpartition(":")
    return (_host(host.strip("[]"), asked), int(port))


def _node(node: Any, asked: str) -> Node:
    host, port = node[0], node[1]
    return (_host(host.decode() if isinstance(host, bytes) else host, asked), int(port))


def _host(host: str | None, asked: str) -> str:
    # A node that does not know how clients reach a node says so in one of these ways. They then
    # take the host that they have reached it at.
    return asked if host in (None, "", "?") else host
