"""Slots of a Redis Cluster: which key is in which, and which node owns it."""

from binascii import crc_hqx
from bisect import bisect_right
from collections.abc import Iterable
from typing import Any, Final

SLOTS: Final = 16384
Node = tuple[str, int]  # host and port


def slot_of(key: str) -> int:
    """The slot of a key or of a sharded channel: CRC-16 of its hash tag, or of all of it.

    The hash tag is what is between the first ``{`` and the next ``}``, unless that is empty.
    """
    _, opened, rest = key.partition("{")
    tag, closed, _ = rest.partition("}")
    return crc_hqx((tag if opened and closed and tag else key).encode(), 0) % SLOTS


class SlotMap:
    """Which node is the primary of each slot.

    Arguments:
        ranges: first slot, last slot and node of each range.
    """

    def __init__(self, ranges: Iterable[tuple[int, int, Node]] = ()) -> None:
        self._ranges = sorted(ranges)
        self._firsts = [first for first, _, _ in self._ranges]

    @classmethod
    def from_reply(cls, reply: Any, asked: str) -> "SlotMap":
        """Read the reply to ``CLUSTER SLOTS``, from a node that was asked at the host ``asked``.

        Raises :exc:`ValueError` for anything else.
        """
        try:
            return cls(
                (int(first), int(last), _node(node, asked)) for first, last, node, *_ in reply
            )
        except (LookupError, TypeError, ValueError):
            raise ValueError("not a reply to CLUSTER SLOTS") from None

    @property
    def covers_all(self) -> bool:
        """Whether each slot has a primary."""
        following = 0
        for first, last, _ in self._ranges:
            if first > following:
                return False
            following = max(following, last + 1)
        return following >= SLOTS

    @property
    def primaries(self) -> frozenset[Node]:
        """The nodes that own slots."""
        return frozenset(node for _, _, node in self._ranges)

    def primary_of(self, slot: int) -> Node | None:
        """The node that owns the slot, or None if nobody does."""
        at = bisect_right(self._firsts, slot) - 1
        if at < 0 or slot > self._ranges[at][1]:
            return None
        return self._ranges[at][2]


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
