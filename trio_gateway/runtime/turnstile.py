"""A turnstile: so many do something at a time, the others wait for their turn, not for ever."""

from collections.abc import Awaitable, Callable
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


class TooMany(Exception):  # noqa: N818 - an outcome
    """There was no turn in time."""


class Turnstile(Generic[T]):
    """Bounds how many are at it. A crowd that comes at once is served in turn instead of being
    turned away, and whoever dawdles holds up one place, for a bounded time.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns = trio.Semaphore(most)
        self._scopes: set[trio.CancelScope] = set()

    @property
    def inside(self) -> int:
        return self._most - self._turns.value

    async def run(self, work: Callable[[], Awaitable[T]], timeout: float) -> T | None:
        """Do the work when it is our turn; raise :exc:`TooMany` if that takes longer than the
        timeout (seconds), return None if everything was given up meanwhile.
        """
        with trio.CancelScope() as scope:
            self._scopes.add(scope)
            try:
                await self._wait(timeout)
                try:
                    return await work()
                finally:
                    self._turns.release()
            finally:
                self._scopes.discard(scope)
        return None

    async def _wait(self, timeout: float) -> None:
        try:
            self._turns.acquire_nowait()
        except trio.WouldBlock:
            with trio.move_on_after(timeout) as waiting:
                await self._turns.acquire()
            if waiting.cancelled_caught:
                raise TooMany from None

    def give_up(self) -> None:
        """Cancel what waits and what is at work."""
        for scope in self._scopes:
            scope.cancel()
