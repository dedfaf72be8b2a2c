"""A Cluster: its nodes say which of them owns a slot."""

import random
import threading
import time
from typing import Final

from ..core.primaries import KnownReplicas, NodeAnswer, newest_slots
from ..core.slots import SlotMap, slot_of
from ..redis_url import RedisAddress, RedisUrl
from .asking import Round, asking_links, no_error
from .links import NotReached

_ENOUGH: Final = 3  # answers; a big Cluster is not asked as a whole


class Cluster:
    """The slot map that some of the nodes had a moment ago."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._links = asking_links()
        self._one_at_a_time = threading.Lock()
        self._slots = SlotMap()
        self._suspect: RedisAddress | None = None
        self._fresh_until = 0.0

    def primary_of(self, key: str) -> RedisAddress:
        with self._one_at_a_time:
            if time.monotonic() >= self._fresh_until:
                self._look()
            node = self._slots.primary_of(slot_of(key))
        if node is None:
            self._fresh_until = 0.0
            raise NotReached(f"no node of the Cluster at {self._url} owns the slot of {key}")
        return self._url.node(*node)

    def replicas_of(self, primary: RedisAddress) -> KnownReplicas | None:
        # While a slot gets another primary, the one of before takes no events.
        return KnownReplicas()

    def suspect(self, address: RedisAddress) -> None:
        self._suspect = address
        self._fresh_until = 0.0

    def close(self) -> None:
        self._links.close()

    def _look(self) -> None:
        """Ask some nodes for the slot map; one that has failed is asked last."""
        nodes = [self._url.node(*node) for node in self._slots.primaries]
        random.shuffle(nodes)  # one may have been cut off from the others
        replicas = (self._url.node(*node) for node in self._slots.replicas)
        nodes = list(dict.fromkeys([*nodes, *self._url.seeds, *replicas]))
        nodes.sort(key=lambda node: node == self._suspect)
        self._suspect = None
        asking = Round(self._links, ("CLUSTER", "INFO"), ("CLUSTER", "SLOTS"))
        answers: list[NodeAnswer] = []
        for node, (info, slots) in asking.ask(nodes):
            try:
                answer = NodeAnswer.read(info, no_error(slots), node.host)
            except ValueError as error:
                asking.failed[node] = f"the node at {node}: {error}"
                continue
            if not answer.covered:  # it belongs to no Cluster any more
                asking.failed[node] = f"the node at {node} knows of no slots"
                continue
            answers.append(answer)
            if len(answers) == _ENOUGH:
                break
        if answers:
            self._slots = newest_slots(answers)
        elif not self._slots.primaries:
            raise NotReached(f"no node of the Cluster tells who owns its slots: {asking}")
        self._fresh_until = asking.fresh_until()
