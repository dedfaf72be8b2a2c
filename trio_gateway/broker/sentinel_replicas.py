"""How many replicas the primary of a Sentinel set must have, by what the Sentinels say."""

from typing import Any, Final

import trio

from ..core.primaries import KnownReplicas, Replica, SentinelAnswer, know_replicas, newest_primary
from ..core.slots import Node
from ..redis_url import RedisAddress, RedisUrl
from ..runtime.supervision import ConnectionLost
from .asking import ask_servers
from .connection import RedisConnection, no_error

_FRESH: Final = 1.0  # seconds for which the answers are believed

_Told = tuple[SentinelAnswer, list[Replica]]


class SentinelReplicas:
    """Asks the Sentinels of a URL when somebody wants to know, once a second at most."""

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._lock = trio.Lock()  # those who want to know at the same time share the answers
        self._asked_at = -_FRESH
        self._primary: Node | None = None
        self._known = KnownReplicas()

    async def of(self, primary: RedisAddress) -> KnownReplicas | None:
        """The replicas of this primary; None if it is not the primary any more.

        Raises :exc:`ConnectionLost` if no Sentinel answers.
        """
        async with self._lock:
            if trio.current_time() - self._asked_at >= _FRESH:
                await self._ask()
        assert self._primary is not None
        return self._known if self._url.node(*self._primary) == primary else None

    def forget(self) -> None:
        """Ask again before the next answer: a server has failed."""
        self._asked_at = -_FRESH

    async def _ask(self) -> None:
        now = trio.current_time()
        told: list[_Told] = await ask_servers(self._url.seeds, self._read)
        node = newest_primary(answer for answer, _ in told)
        self._primary = node
        self._known = know_replicas(told, node)
        self._asked_at = now

    async def _read(self, redis: RedisConnection, sentinel: RedisAddress) -> _Told:
        name = self._url.master_name
        address, details, replicas = await redis.ask_all(
            [
                ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", name),
                ("SENTINEL", "MASTER", name),
                ("SENTINEL", "REPLICAS", name),
            ]
        )
        try:
            answer = SentinelAnswer.read(no_error(address, "SENTINEL"), details, name)
            found: Any = no_error(replicas, "SENTINEL")
            return answer, [Replica.read(each) for each in found]
        except (TypeError, ValueError) as error:
            raise ConnectionLost(f"a Sentinel: {error}") from None
