"""Which server an event is sent to: the one of the URL, or a primary of a Sentinel set or Cluster.

Where Sentinels or nodes know the primary, they are asked again every few seconds, and whenever a
server has failed. What they said last counts while none of them answers.
"""

import random
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final, Protocol

from ..core.slots import SlotMap, slot_of
from ..redis_url import RedisAddress, RedisKind, RedisUrl
from .links import Command, Links, NoReply, NotReached, Refused, T

_FRESH: Final = 1.0  # seconds until Sentinels or nodes are asked again
_FRESH_WITH_FAILURES: Final = 5.0  # the same if one of them did not answer
_ANSWER: Final = 0.5  # seconds to connect to one of them, and again for its answer
_ROUND: Final = 2.0  # seconds after which no further one is asked


class Nodes(Protocol):
    """Knows the primaries."""

    def primary_of(self, key: str) -> RedisAddress:
        """The server that accepts writes to the key. Raises :exc:`NotReached` if it is unknown."""

    def suspect(self, address: RedisAddress) -> None:
        """Look again before the next answer: this server has failed, or is not the primary."""

    def close(self) -> None:
        """Close all connections; a later question connects again."""


def open_nodes(url: RedisUrl) -> Nodes:
    """Make what knows the primaries of this URL. It connects when it is asked."""
    if url.kind is RedisKind.SENTINEL:
        return _Sentinels(url)
    if url.kind is RedisKind.CLUSTER:
        return _Cluster(url)
    return _Server(url)


class _Server:
    """The one server of a URL; a later connection may lead to another one, by its name."""

    def __init__(self, url: RedisUrl) -> None:
        self._address = url.data

    def primary_of(self, key: str) -> RedisAddress:
        return self._address

    def suspect(self, address: RedisAddress) -> None:
        pass

    def close(self) -> None:
        pass


class _Round:
    """One question to several servers, one after the other, with what has failed."""

    def __init__(self, links: Links, question: Command) -> None:
        self._links = links
        self._question = question
        self.failed: dict[RedisAddress, str] = {}

    def ask(
        self, servers: Iterable[RedisAddress], kind: type[T]
    ) -> Iterator[tuple[RedisAddress, T]]:
        """Each server and its reply. The caller may stop when it has heard enough."""
        end = time.monotonic() + _ROUND
        for server in servers:
            if time.monotonic() > end:
                return
            try:
                with self._links.to(server) as link:
                    link.send(self._question)
                    reply = link.receive(kind)
            except (NotReached, NoReply, Refused) as error:
                self.failed[server] = str(error)
            else:
                yield server, reply


class _Sentinels:
    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._links = Links(connect=_ANSWER, reply=_ANSWER)
        self._sentinels = list(url.seeds)  # those that answer first
        self._primary: RedisAddress | None = None
        self._fresh_until = 0.0

    def primary_of(self, key: str) -> RedisAddress:
        if self._primary is None or time.monotonic() >= self._fresh_until:
            self._primary = self._look()
        return self._primary

    def suspect(self, address: RedisAddress) -> None:
        self._fresh_until = 0.0

    def close(self) -> None:
        self._links.close()

    def _look(self) -> RedisAddress:
        """The primary that most of the Sentinels name.

        One alone may have been cut off from the others, with the primary of before.
        """
        name = self._url.master_name
        asking = _Round(self._links, ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name))
        votes: Counter[RedisAddress] = Counter()
        for sentinel, reply in asking.ask(list(self._sentinels), object):
            match reply:
                case [bytes(host), bytes(port)] if port.isdigit():
                    primary = self._url.node(host.decode(), int(port))
                    votes[primary] += 1
                    if 2 * votes[primary] > len(self._sentinels):
                        break
                case None:
                    asking.failed[sentinel] = f"the Sentinel at {sentinel} knows no {name}"
                case _:
                    asking.failed[sentinel] = f"the Sentinel at {sentinel} sent an invalid reply"
        self._sentinels.sort(key=asking.failed.__contains__)
        self._fresh_until = time.monotonic() + (_FRESH_WITH_FAILURES if asking.failed else _FRESH)
        if votes:
            return votes.most_common(1)[0][0]
        if self._primary is not None:
            return self._primary
        raise NotReached(f"no Sentinel tells where the primary is: {_joined(asking)}")


class _Cluster:
    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._links = Links(connect=_ANSWER, reply=_ANSWER)
        self._slots = SlotMap()
        self._suspect: RedisAddress | None = None
        self._fresh_until = 0.0

    def primary_of(self, key: str) -> RedisAddress:
        if time.monotonic() >= self._fresh_until:
            self._look()
        node = self._slots.primary_of(slot_of(key))
        if node is None:
            self._fresh_until = 0.0
            raise NotReached(f"no node of the Cluster at {self._url} owns the slot of {key}")
        return self._url.node(*node)

    def suspect(self, address: RedisAddress) -> None:
        self._suspect = address
        self._fresh_until = 0.0

    def close(self) -> None:
        self._links.close()

    def _look(self) -> None:
        """Ask any node for the slot map; one that has failed is asked last."""
        nodes = [self._url.node(*node) for node in self._slots.primaries]
        random.shuffle(nodes)  # one may have been cut off from the others
        replicas = (self._url.node(*node) for node in self._slots.replicas)
        nodes = list(dict.fromkeys([*nodes, *self._url.seeds, *replicas]))
        asking = _Round(self._links, ("CLUSTER", "SLOTS"))
        nodes.sort(key=lambda node: node == self._suspect)
        self._suspect = None
        for node, reply in asking.ask(nodes, list):
            try:
                slots = SlotMap.from_reply(reply, node.host)
            except ValueError as error:
                asking.failed[node] = f"the node at {node} sent {error}"
                continue
            if slots.primaries:  # else it belongs to no Cluster any more
                self._slots = slots
                break
            asking.failed[node] = f"the node at {node} knows of no slots"
        else:
            if not self._slots.primaries:
                raise NotReached(
                    f"no node of the Cluster tells who owns its slots: {_joined(asking)}"
                )
        self._fresh_until = time.monotonic() + (_FRESH_WITH_FAILURES if asking.failed else _FRESH)


def _joined(asking: _Round) -> str:
    return "; ".join(asking.failed.values())
