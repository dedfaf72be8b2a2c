"""Members: the connections of one audience, and of several of them."""

from collections import defaultdict
from collections.abc import Iterable, Sequence

from .connection import Connection


class Members(set[Connection]):
    """The connections of one audience."""

    __slots__ = ("mask",)

    def __init__(self) -> None:
        super().__init__()
        self.mask = 0  # the events for this audience, while dispatch plans a batch


def union(groups: Sequence[Members]) -> list[Connection]:
    """The connections in any of these groups, each of them once."""
    return list(groups[0] if len(groups) == 1 else set().union(*groups))


def by_mask(groups: Iterable[Members]) -> dict[int, list[Connection]]:
    """Connections by what they are sent: the masks of all their groups, or-ed.

    It starts from the groups: a batch names few, and a connection may be in many. The mask is
    collected on the connection itself, at half the cost of a dictionary. Afterwards all masks are
    zero again.
    """
    found: list[Connection] = []
    for members in groups:
        bits, members.mask = members.mask, 0
        for connection in members:
            if connection.mask:
                connection.mask |= bits
            else:
                connection.mask = bits
                found.append(connection)
    sorted_out: defaultdict[int, list[Connection]] = defaultdict(list)  # few masks
    for connection in found:
        sorted_out[connection.mask].append(connection)
        connection.mask = 0
    return sorted_out
