"""A Sentinel set: its Sentinels say which server is the primary, and which are its replicas."""

import threading
import time
from typing import Any

from ..core.primaries import KnownReplicas, Replica, SentinelAnswer, know_replicas, newest_primary
from ..redis_url import RedisAddress, RedisUrl
from .asking import PATIENCE, Round, asking_links, no_error
from .links import Command, NotReached


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
        self._replicas = KnownReplicas()
        self._fresh_until = 0.0

    def primary_of(self, key: str) -> RedisAddress:
        with self._one_at_a_time:
            if self._primary is None or time.monotonic() >= self._fresh_until:
                self._primary = self._look()
            return self._primary

    def replicas_of(self, primary: RedisAddress) -> KnownReplicas | None:
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
        self._replicas = know_replicas(said, node)
        return self._url.node(*node)

    def _read(
        self, address: Any, details: Any, replicas: Any = ()
    ) -> tuple[SentinelAnswer, list[Replica]]:
        """Read a Sentinel's replies to the questions; raises :exc:`ValueError`."""
        answer = SentinelAnswer.read(no_error(address), details, self._url.master_name)
        try:
            return answer, [Replica.read(each) for each in no_error(replicas)]
        except TypeError:
            raise ValueError("the server sent an invalid reply") from None
