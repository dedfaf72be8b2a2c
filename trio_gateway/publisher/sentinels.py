"""A Sentinel set: its Sentinels say which server is the primary, and which are its replicas."""

import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any, Final

from ..redis_url import RedisAddress, RedisUrl
from .asking import Round, asking_links
from .links import Command, NotReached

_SETTLED: Final = 3000  # milliseconds after which most Sentinels know of a new primary
_FORMER: Final = 10.0  # seconds in which a former primary becomes a replica


@dataclass(frozen=True, slots=True)
class Replica:
    """A replica, as a Sentinel describes it."""

    address: RedisAddress
    lost_for: int | None = None  # milliseconds for which it was down, or said it is a primary

    def counts(self, former: RedisAddress | None) -> bool:
        """Whether it must have an event that all replicas have.

        One that has just got lost may have become the primary: the Sentinel that does that closes
        the connections to it. Until most Sentinels know, the primary of before goes on taking
        events, and its other replicas confirm them, but all of that will be lost.

        After that, the ``former`` primary is such a replica for a while, and does not count.
        """
        if self.lost_for is None:
            return True
        return self.lost_for < _SETTLED and self.address != former


class Sentinels:
    """What most of the Sentinels said a moment ago.

    One alone may have been cut off from the others, with the primary of before.
    """

    def __init__(self, url: RedisUrl, counts_replicas: bool) -> None:
        self._url = url
        self._links = asking_links()
        self._sentinels = list(url.seeds)  # those that answer first
        self._questions: list[Command] = [("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.master_name)]
        if counts_replicas:
            self._questions.append(("SENTINEL", "REPLICAS", url.master_name))
        self._one_at_a_time = threading.Lock()
        self._primary: RedisAddress | None = None
        self._replicas = 0
        self._former: RedisAddress | None = None  # the primary of before
        self._former_until = 0.0
        self._fresh_until = 0.0

    def primary_of(self, key: str) -> RedisAddress:
        with self._one_at_a_time:
            if self._primary is None or time.monotonic() >= self._fresh_until:
                self._primary = self._look()
            return self._primary

    def replicas_of(self, primary: RedisAddress) -> int | None:
        return self._replicas if primary == self._primary else None

    def suspect(self, address: RedisAddress) -> None:
        self._fresh_until = 0.0

    def close(self) -> None:
        self._links.close()

    def _look(self) -> RedisAddress:
        asking = Round(self._links, *self._questions)
        said: list[tuple[RedisAddress, list[Replica]]] = []
        for sentinel, (address, *replicas) in asking.ask(self._sentinels):
            if address is None:
                name = self._url.master_name
                asking.failed[sentinel] = f"the Sentinel at {sentinel} knows no {name}"
                continue
            try:
                said.append((self._read_address(address), self._read_replicas(*replicas)))
            except (AttributeError, LookupError, TypeError, ValueError):
                asking.failed[sentinel] = f"the Sentinel at {sentinel} sent an invalid reply"
                continue
            if 2 * sum(primary == said[-1][0] for primary, _ in said) > len(self._sentinels):
                break
        self._sentinels.sort(key=asking.failed.__contains__)
        self._fresh_until = asking.fresh_until()
        if not said:
            if self._primary is not None:
                return self._primary
            raise NotReached(f"no Sentinel tells where the primary is: {asking}")
        ((found, _),) = Counter(primary for primary, _ in said).most_common(1)
        if found != self._primary:
            self._former, self._former_until = self._primary, time.monotonic() + _FORMER
        former = self._former if time.monotonic() < self._former_until else None
        self._replicas = max(
            sum(each.counts(former) for each in replicas)
            for primary, replicas in said
            if primary == found
        )
        return found

    def _read_address(self, reply: Any) -> RedisAddress:
        host, port = reply
        return self._url.node(host.decode(), int(port))

    def _read_replicas(self, reply: Any = ()) -> list[Replica]:
        found = []
        for each in reply:
            fields = dict(zip(each[::2], each[1::2], strict=True))
            lost_for = None
            if fields[b"role-reported"] == b"master":
                lost_for = int(fields[b"role-reported-time"])
            elif b"s-down-time" in fields:
                lost_for = int(fields[b"s-down-time"])
            address = self._read_address((fields[b"ip"], fields[b"port"]))
            found.append(Replica(address, lost_for))
        return found
