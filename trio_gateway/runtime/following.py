"""Following: a process reads the streams of its clients' tenants, and those that it holds."""

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Final, NoReturn

import trio

from ..core.audiences import TenantId
from ..core.event_ids import tag
from ..core.shards import Sharding
from .extent import Extent
from .source import Source

_NOTHING: Final = nullcontext()  # one for all: a generator would cost each client half a KB
LINGER: Final = 60.0  # seconds that a stream is read after its last client has left


class Following:
    """Which streams the source reads.

    With shards, a stream is read from the first client of its tenants on, and for ``linger``
    seconds after the last one has left, and while it is held (:meth:`hold`). Without shards, all
    streams are always read.
    """

    def __init__(
        self,
        source: Source,
        extent: Extent,
        sharding: Sharding,
        *,
        linger: float = LINGER,
    ) -> None:
        self._source = source
        self._extent = extent
        self._sharding = sharding
        self._linger = linger
        self._clients: Counter[str] = Counter()  # by stream
        self._left: dict[str, float] = {}  # when the last client left, the longest ago first
        self._idle = trio.lowlevel.ParkingLot()
        self._held: set[str] = set()
        self.names: set[str] = set()
        self._by_tenant = sharding.by_tenant
        if not self._by_tenant:
            self._follow(sharding.names)

    def client_of(self, tenant: TenantId) -> AbstractContextManager[None]:
        """Read the streams of this tenant meanwhile."""
        return self._client_of(tenant) if self._by_tenant else _NOTHING

    @contextmanager
    def _client_of(self, tenant: TenantId) -> Iterator[None]:
        names = self._sharding.names_of(tenant)
        for name in names:
            self._clients[name] += 1
            self._left.pop(name, None)
        self._follow(names)
        try:
            yield
        finally:
            for name in names:
                self._clients[name] -= 1
                if not self._clients[name]:
                    del self._clients[name]
                    self._leave(name)

    def has_clients(self, name: str) -> bool:
        """Whether clients here need this stream."""
        return name in self._clients

    def hold(self, names: Set[str]) -> None:
        """Read these streams, too, whether they have clients here or not."""
        given_up = self._held - names
        self._held = set(names)
        self._follow([name for name in self._sharding.names if name in names])
        for name in given_up:
            if name not in self._clients:
                self._leave(name)

    def _leave(self, name: str) -> None:
        self._left.pop(name, None)  # the longest ago is first
        self._left[name] = trio.current_time()
        self._idle.unpark_all()

    async def run(self) -> NoReturn:
        """Give up streams without clients; return only when cancelled."""
        while True:
            while not self._left:
                await self._idle.park()
            await trio.sleep_until(next(iter(self._left.values())) + self._linger)
            until = trio.current_time() - self._linger
            left = [name for name, left_at in self._left.items() if left_at <= until]
            for name in left:
                del self._left[name]
            given_up = [name for name in left if name not in self._held]
            self.names -= set(given_up)
            # Here, because the source forgets only what it has begun.
            self._extent.expected -= set(map(tag, given_up))
            if given_up:
                self._source.follow(self._in_order())

    def _follow(self, names: Sequence[str]) -> None:
        if self.names.issuperset(names):
            return
        self.names.update(names)
        self._extent.expected.update(map(tag, names))
        self._source.follow(self._in_order())

    def _in_order(self) -> list[str]:
        return [name for name in self._sharding.names if name in self.names]
