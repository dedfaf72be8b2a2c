"""A turnstile: so many do something at a time, the others wait for their turn, not for ever."""

from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final, Generic, TypeVar

import trio

T = TypeVar("T")

_MOMENT: Final = 0.5  # seconds
_LOOKED_AT: Final = 20  # of those at work, for one that waits


class Overloaded(Exception):  # noqa: N818 - an outcome
    """There was no turn in time."""


class ConcurrencyLimiter(Generic[T]):
    """Bounds how many are at it. A crowd that comes at once is served in turn instead of being
    turned away. One that dawdles holds a place for a bounded time, and while others wait for one,
    no longer than a moment.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns = trio.Semaphore(most)
        self._scopes: set[trio.CancelScope] = set()
        # Those that may be ended early: since when they are at it, and whether they dawdle.
        self._inside: dict[trio.CancelScope, tuple[float, Callable[[], bool]]] = {}

    @property
    def inside(self) -> int:
        return self._most - self._turns.value

    async def run(
        self,
        work: Callable[[], Awaitable[T]],
        timeout: float,
        patience: float | None = None,
        dawdles: Callable[[], bool] | None = None,
    ) -> T | None:
        """Do the work when it is our turn. Raise :exc:`Overloaded` if that did not come within our
        patience (seconds; the timeout if None); return None if the work took longer than the
        timeout, or if everything was given up meanwhile.

        ``dawdles`` says whether the work waits for somebody else: then it is given up, too, once
        it has taken a moment and another one waits for its place.
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
                    await self._wait_for_turn()
                    scope.deadline = trio.current_time() + timeout
                has_turn = True
                try:
                    if dawdles is not None:
                        self._inside[scope] = trio.current_time(), dawdles
                    return await work()
                finally:
                    self._inside.pop(scope, None)
                    self._turns.release()
            finally:
                self._scopes.discard(scope)
        if not has_turn and trio.current_time() >= scope.deadline:
            raise Overloaded
        return None

    async def _wait_for_turn(self) -> None:
        while True:
            self._end_one_that_dawdles()
            with trio.move_on_after(_MOMENT) as waiting:
                await self._turns.acquire()
            if not waiting.cancelled_caught:
                return

    def _end_one_that_dawdles(self) -> None:
        before = trio.current_time() - _MOMENT
        for scope, (since, dawdles) in islice(self._inside.items(), _LOOKED_AT):  # oldest first
            if since > before:
                return
            if dawdles():
                scope.cancel()
                del self._inside[scope]
                return

    def give_up(self) -> None:
        """Cancel what waits and what is at work."""
        for scope in self._scopes:
            scope.cancel()
