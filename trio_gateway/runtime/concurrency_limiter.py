"""A concurrency limiter: a number of tasks run at once, the others wait for a bounded time."""

from collections.abc import Awaitable, Callable
from itertools import islice
from typing import Final, Generic, TypeVar

import trio

T = TypeVar("T")

_MOMENT: Final = 0.5  # seconds
_LOOKED_AT: Final = 20  # running ones, for one that waits


class Overloaded(Exception):  # noqa: N818 - an outcome
    """No slot became free in time."""


class ConcurrencyLimiter(Generic[T]):
    """Limits how many coroutines run at once, to ``most``.

    The others wait in FIFO order, so that a crowd is served in turn instead of being turned away.
    Each slot is held for a bounded time. While others wait, one that dawdles (that waits for
    somebody else) loses its slot after half a second.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._turns = trio.Semaphore(most)
        self._scopes: set[trio.CancelScope] = set()
        # Those that may be ended early: since when they run, and whether they dawdle.
        self._inside: dict[trio.CancelScope, tuple[float, Callable[[], bool]]] = {}

    @property
    def inside(self) -> int:
        return self._most - self._turns.value

    def try_enter(self) -> bool:
        """Take a free slot, if there is one; :meth:`leave` must follow in bounded time."""
        try:
            self._turns.acquire_nowait()
        except trio.WouldBlock:
            return False
        return True

    def leave(self) -> None:
        """Return a slot that was taken by :meth:`try_enter`."""
        self._turns.release()

    async def run(
        self,
        work: Callable[[], Awaitable[T]],
        timeout: float,
        patience: float | None = None,
        dawdles: Callable[[], bool] | None = None,
    ) -> T | None:
        """Wait for a slot, then run ``work`` and return its result.

        It waits ``patience`` seconds for a slot (``timeout`` if None), and the work may take
        ``timeout`` seconds. ``dawdles`` tells whether the work waits for somebody else; then it
        is cancelled, too, once it has run for half a second and another waits for its slot.

        Returns None if the work was cancelled: by its timeout, or by :meth:`give_up`.
        Raises :exc:`Overloaded` if no slot became free in time.
        """
        has_turn = False
        # One scope for all of it: a handshake passes two limiters, and scopes cost.
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
        """Cancel everything that waits or runs."""
        for scope in self._scopes:
            scope.cancel()
