"""A Sentinel set: its Sentinels say which server is the primary, and which are its replicas."""

import threading
import time
from dataclasses import dataclass
from typing import Any, Final

from ..core.primaries import SentinelAnswer, newest_primary, read_fields
from ..redis_url import RedisAddress, RedisUrl
from .asking import PATIENCE, Round, asking_links, no_error
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
    """What the Sentinels said a moment ago: the one that knows of the last failover is believed.

    All are asked, as one may be cut off from the others, with the primary of before. One that did
    not answer is not waited for again for a while if most of the others do.
    """

    def __init__(self, url: RedisUrl, counts_replicas: bool) -> None:
        self._url = url
        self._links = asking_links()
        self._silent_until: dict[RedisAddress, float] = {}  # of those that did not answer
        self._questions: list[Command] = [
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", url.master_name),
            ("SENTINEL", "MASTER", url.master_name),
        ]
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
        now = time.monotonic()
        asking = Round(self._links, *self._questions)
        seeds = self._url.seeds
        silent = [each for each in seeds if self._silent_until.get(each, 0.0) > now]
        said: list[tuple[SentinelAnswer, list[Replica]]] = []
        for sentinels in ([each for each in seeds if each not in silent], silent):
            if 2 * len(said) > len(seeds):
                break
            for sentinel, replies in asking.ask(sentinels):
                try:
                    said.append(self._read(*replies))
                except ValueError as error:
                    asking.failed[sentinel] = f"the Sentinel at {sentinel}: {error}"
        self._silent_until.update(dict.fromkeys(asking.failed, now + PATIENCE))
        self._fresh_until = asking.fresh_until()
        if not said:
            if self._primary is not None:
                return self._primary
            raise NotReached(f"no Sentinel tells where the primary is: {asking}")
        node = newest_primary(answer for answer, _ in said)
        found = self._url.node(*node)
        if found != self._primary:
            self._former, self._former_until = self._primary, time.monotonic() + _FORMER
        former = self._former if time.monotonic() < self._former_until else None
        self._replicas = max(
            sum(each.counts(former) for each in replicas)
            for answer, replicas in said
            if answer.primary == node
        )
        return found

    def _read(
        self, address: Any, details: Any, replicas: Any = ()
    ) -> tuple[SentinelAnswer, list[Replica]]:
        """Read a Sentinel's replies to the questions; raises :exc:`ValueError`."""
        answer = SentinelAnswer.read(no_error(address), details, self._url.master_name)
        try:
            found = [self._read_replica(read_fields(each)) for each in no_error(replicas)]
        except (AttributeError, LookupError, TypeError):
            raise ValueError("the server sent an invalid reply") from None
        return answer, found

    def _read_replica(self, fields: dict[str, str]) -> Replica:
        lost_for = None
        if fields["role-reported"] == "master":
            lost_for = int(fields["role-reported-time"])
        elif "s-down-time" in fields:
            lost_for = int(fields["s-down-time"])
        return Replica(self._url.node(fields["ip"], int(fields["port"])), lost_for)
