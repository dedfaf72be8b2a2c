"""Sentinel: which server is the primary of a Sentinel set."""

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..core.slots import Node, SlotMap
from ..redis_url import RedisAddress, RedisUrl
from ..runtime.supervision import ConnectionLost
from .asking import ask_servers
from .connection import RedisConnection, no_error
from .topology import Topology


class Named(NamedTuple):
    """What one Sentinel says: the primary, and in which failover it became that."""

    epoch: int
    primary: Node


def sentinel_topology(url: RedisUrl) -> Topology:
    """The topology of a Sentinel set. It asks the Sentinels of the URL."""

    async def ask(redis: RedisConnection, sentinel: RedisAddress) -> Named:
        address, details = await redis.ask_all(
            [
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.master_name),
                ("SENTINEL", "MASTER", url.master_name),
            ]
        )
        return read_answer(no_error(address, "SENTINEL"), details, url.master_name)

    async def look(before: SlotMap) -> SlotMap:
        return SlotMap.of_one(newest(await ask_servers(url.seeds, ask)))

    return Topology(look, lambda node: url.node(*node))


def read_answer(address: Any, details: Any, name: str) -> Named:
    """Read a Sentinel's replies to ``GET-MASTER-ADDR-BY-NAME`` and ``MASTER``.

    Without the right to the second command the epoch is 0. Raises :exc:`ConnectionLost` if the
    Sentinel does not know the name, or a reply has another shape.
    """
    if address is None:
        raise ConnectionLost(f"a Sentinel knows no primary with the name {name}")
    try:
        host, port = address
        known = (
            dict(zip(details[::2], details[1::2], strict=True)) if isinstance(details, list) else {}
        )
        return Named(int(known.get(b"config-epoch", 0)), (host.decode(), int(port)))
    except (AttributeError, TypeError, ValueError):
        raise ConnectionLost("the server is no Sentinel") from None


def newest(answers: Sequence[Named]) -> Node:
    """The primary since the last failover; if they differ, what most say.

    Sentinels believe the highest epoch. All but the leader have an older one for a moment after a
    failover, and one that is cut off for longer.
    """
    votes = Counter(answers)
    return max(votes, key=lambda answer: (answer.epoch, votes[answer])).primary
