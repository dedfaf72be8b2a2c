"""The stats feed: this process's stats, once a second, to the admins that asked to watch."""

from collections.abc import Collection
from typing import Final, NoReturn

import trio

from . import stats
from .core.audiences import Endpoint, Principal, Role
from .core.messages import Command, statistics
from .parts import Parts
from .runtime.connection import Connection

EVERY: Final = 1.0  # seconds between two messages


def may_watch(principal: Principal) -> bool:
    """Whether this principal may see the stats, which are of the whole process."""
    return principal.endpoint is Endpoint.ADMIN and Role.ADMIN in principal.roles


class StatsFeed:
    """Sends the stats while anybody watches, and is idle otherwise."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._watchers: set[Connection] = set()
        self._begun = trio.Event()

    def command(self, connection: Connection, command: Command) -> None:
        """A client sent WATCH or UNWATCH. One that may not watch gets no answer."""
        if command is Command.UNWATCH:
            self._watchers.discard(connection)
        elif may_watch(connection.principal) and connection not in self._watchers:
            self._watchers.add(connection)
            self._send([connection])
            self._begun.set()

    async def run(self) -> NoReturn:
        """Send; returns only when cancelled."""
        while True:
            while not self._watchers:
                self._begun = trio.Event()
                await self._begun.wait()
            await trio.sleep(EVERY)
            # Without those that have left, or lost the role when they renewed their token:
            here = self._watchers & self._parts.hub.connections
            self._watchers = {each for each in here if may_watch(each.principal)}
            self._send(self._watchers)

    def _send(self, watchers: Collection[Connection]) -> None:
        reading = [each for each in watchers if not each.waiting_bytes]
        if not reading:
            return
        found = stats.describe(self._parts)
        for each in reading:
            each.send(statistics(found, stats.slow(self._parts.hub, each.principal)))
