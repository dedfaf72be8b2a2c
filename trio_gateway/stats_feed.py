"""The stats feed: sends this process's stats to the admins that watch, once a second."""

from collections.abc import Collection
from typing import Final, NoReturn

import trio

from . import stats
from .core.audiences import Endpoint, Principal, Role
from .core.messages import Command, statistics
from .parts import Parts
from .runtime.connection import Connection

INTERVAL: Final = 1.0  # seconds between two messages


def may_watch(principal: Principal) -> bool:
    """Whether this principal may see the stats, which concern all tenants."""
    return principal.endpoint is Endpoint.ADMIN and Role.ADMIN in principal.roles


class StatsFeed:
    """Sends the stats to its watchers. Without watchers it is idle."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._watchers: set[Connection] = set()
        self._added = trio.lowlevel.ParkingLot()

    def command(self, connection: Connection, command: Command) -> None:
        """Handle WATCH or UNWATCH from a client. One that may not watch gets no answer."""
        if command is Command.UNWATCH:
            self._watchers.discard(connection)
        elif may_watch(connection.principal) and connection not in self._watchers:
            self._watchers.add(connection)
            self._send([connection])
            self._added.unpark_all()

    async def run(self) -> NoReturn:
        """Send the stats; returns only when cancelled."""
        while True:
            while not self._watchers:
                await self._added.park()
            await trio.sleep(INTERVAL)
            # Some may have left, or have lost the role with a renewed token.
            connected = self._watchers & self._parts.hub.connections
            self._watchers = {each for each in connected if may_watch(each.principal)}
            self._send(self._watchers)

    def _send(self, watchers: Collection[Connection]) -> None:
        ready = [each for each in watchers if not each.waiting_bytes]
        if not ready:
            return
        found = stats.describe(self._parts)
        for each in ready:
            tenant = each.principal.tenant
            slow = stats.slow(self._parts.hub, tenant)
            each.send(statistics(found, slow, stats.delivery_times(self._parts, tenant)))
