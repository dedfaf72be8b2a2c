"""Deadlines: closes the connections whose deadline has passed, with one task for all of them.

A cancel scope with a deadline for each client would be a twentieth of what admitting it costs.
"""

from heapq import heapify, heappop, heappush
from math import inf
from typing import Final, NoReturn, Protocol
from weakref import ref

import trio

_FEW: Final = 1024  # entries


class Timed(Protocol):
    """A connection, as this module sees it."""

    timer: int  # of the entry that counts; 0: none does

    @property
    def deadline(self) -> float:
        """When it is closed, on Trio's clock. It may move while nobody is told."""

    @property
    def ending(self) -> bool:
        """Whether it is closed already."""

    def close_on_time(self, now: float) -> None:
        """Close it if its deadline has passed."""


class Deadlines:
    """The deadlines of many connections.

    A deadline that moves back, as at each message, costs nothing: when the old one has passed, the
    connection is asked for the new one. One that moves forward must be told by :meth:`watch`.
    """

    def __init__(self) -> None:
        # Weak: that of a connection that has ended stays until it has passed, or there are as many.
        self._heap: list[tuple[float, int, ref[Timed]]] = []
        self._most = _FEW  # entries; then those that do not count are removed
        self._last = 0  # entry
        self._sooner = trio.Event()

    def watch(self, connection: Timed) -> None:
        """Close it when its deadline has passed, which may be sooner than it was."""
        self._last += 1
        connection.timer = self._last
        entry = connection.deadline, self._last, ref(connection)
        heappush(self._heap, entry)
        if self._heap[0] is entry:
            self._sooner.set()
        if len(self._heap) > self._most:
            self._remove_old()

    def _remove_old(self) -> None:
        """Remove the entries that do not count. Doubling makes that cheap for each new one."""
        self._heap[:] = [
            entry
            for entry in self._heap
            if (found := entry[2]()) is not None and found.timer == entry[1]
        ]
        heapify(self._heap)
        self._most = max(_FEW, 2 * len(self._heap))

    async def run(self) -> NoReturn:
        """Close connections in time; returns only when cancelled."""
        while True:
            self._sooner = trio.Event()
            self._close_overdue(trio.current_time())
            with trio.move_on_at(self._heap[0][0] if self._heap else inf):
                await self._sooner.wait()

    def _close_overdue(self, now: float) -> None:
        heap = self._heap
        while heap and heap[0][0] <= now:
            _, number, connection = heappop(heap)
            if (found := connection()) is None or found.ending or found.timer != number:
                continue
            found.close_on_time(now)
            if not found.ending:
                self.watch(found)
