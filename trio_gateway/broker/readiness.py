"""Readiness: whether Redis works. It is checked rarely, however often it is asked."""

from collections.abc import Awaitable, Callable
from math import inf
from typing import Final, NoReturn

import trio

from .commands import Unavailable

FRESH: Final = 0.5  # seconds for which a result is used again
ANSWER_TIMEOUT: Final = 0.25  # seconds that a request waits for a slow check
CHECK_TIMEOUT: Final = 2.0  # seconds until a check without an answer has failed


class Readiness:
    """Runs one check at a time and shares its result.

    While a check is slow, the last result is given: a Redis that is slow for a second must not
    take this process out of the load balancer. ``check`` gets a timeout in seconds and raises
    :exc:`Unavailable` if Redis does not work.
    """

    def __init__(self, check: Callable[[float], Awaitable[None]]) -> None:
        self._check = check
        self._problem: str | None = "not checked yet"
        self._is_known = False
        self._checked_at = -inf
        self._is_checking = False
        self._wanted = trio.lowlevel.ParkingLot()
        self._done = trio.lowlevel.ParkingLot()

    async def ask(self) -> str | None:
        """Return None if Redis answers and accepts writes, otherwise the reason."""
        if self._is_checking or self._checked_at + FRESH <= trio.current_time():
            if not self._is_checking:
                self._is_checking = True
                self._wanted.unpark_all()
            with trio.move_on_after(ANSWER_TIMEOUT if self._is_known else CHECK_TIMEOUT):
                await self._done.park()
        return self._problem

    async def run(self) -> NoReturn:
        """Check when asked; return only when cancelled."""
        while True:
            while not self._is_checking:
                await self._wanted.park()
            try:
                await self._check(CHECK_TIMEOUT)
                self._problem = None
            except Unavailable as unavailable:
                self._problem = str(unavailable)
            self._is_known, self._is_checking = True, False
            self._checked_at = trio.current_time()
            self._done.unpark_all()
