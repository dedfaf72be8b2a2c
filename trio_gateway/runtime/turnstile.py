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

    async def run(
        self, work: Callable[[], Awaitable[T]], timeout: float, patience: float | None = None
    ) -> T | None:
        """Do the work when it is our turn. Raise :exc:`TooMany` if that did not come within our
        patience (seconds; the timeout if None); return None if the work took longer than the
        timeout, or if everything was given up meanwhile.
        """
        has_turn = False
        # The one scope of all that happens here: with its two turnstiles a handshake has few.
        with trio.CancelScope(deadline=trio.current_time() + timeout) as scope:
            self._scopes.add(scope)
            try:
                try:
                    self._turns.acquire_nowait()
                except trio.WouldBlock:
                    if patience is not None:
                        scope.deadline = trio.current_time() + patience
                    await self._turns.acquire()
                    scope.deadline = trio.current_time() + timeout
                has_turn = True
                try:
                    return await work()
                finally:
                    self._turns.release()
            finally:
                self._scopes.discard(scope)
        if not has_turn and trio.current_time() >= scope.deadline:
            raise TooMany
        return None

    def give_up(self) -> None:
        """Cancel what waits and what is at work."""
        for scope in self._scopes:
            scope.cancel()
