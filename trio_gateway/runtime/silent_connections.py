"""Connections that have not sent a byte yet: many may wait, and none blocks another."""

from collections.abc import Awaitable, Callable

import trio

from .concurrency_limiter import Overloaded


class SilentConnections:
    """Limits how many connections are silent, in total and of one address.

    One too many ends the one that has been silent longest. A client that means to speak does so
    within a round trip, so a crowd that never speaks costs the others nothing.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._scopes: dict[trio.CancelScope, str] = {}  # the oldest first
        self._by_address: dict[str, dict[trio.CancelScope, None]] = {}

    def __len__(self) -> int:
        return len(self._scopes)

    async def wait(
        self,
        speaks: Callable[[], Awaitable[object]],
        timeout: float,
        address: str = "",
        most: int | None = None,
    ) -> bool:
        """Wait until it speaks; False if it did not in ``timeout`` seconds, or was given up.

        ``most`` is how many connections of its address may be silent. Raises :exc:`Overloaded`
        if a newer one took its place.
        """
        spoke = False
        deadline = trio.current_time() + timeout
        with trio.CancelScope(deadline=deadline) as scope:
            siblings = self._by_address.setdefault(address, {})
            if most is not None and len(siblings) >= max(1, most):
                self._end(next(iter(siblings)))
            elif len(self._scopes) >= self._most:
                self._end(next(iter(self._scopes)))
            siblings = self._by_address.setdefault(address, {})
            self._scopes[scope] = address
            siblings[scope] = None
            try:
                await speaks()
                spoke = True
            finally:
                ended = scope not in self._scopes
                self._forget(scope)
        if not spoke and ended and trio.current_time() < deadline:
            raise Overloaded
        return spoke

    def give_up(self) -> None:
        """End all of them."""
        for scope in self._scopes:
            scope.cancel()

    def _end(self, scope: trio.CancelScope) -> None:
        scope.cancel()
        self._forget(scope)

    def _forget(self, scope: trio.CancelScope) -> None:
        if (address := self._scopes.pop(scope, None)) is None:
            return
        siblings = self._by_address[address]
        del siblings[scope]
        if not siblings:
            del self._by_address[address]
