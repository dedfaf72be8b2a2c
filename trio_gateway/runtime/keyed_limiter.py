"""Keyed limiter: a concurrency limit for each user or session."""

from collections import Counter
from collections.abc import Callable, Hashable
from typing import Final

import trio

from .concurrency_limiter import Overloaded

_MOST_WAITING: Final = 32  # requests of one key


class KeyedLimiter:
    """Limits each key (a user or a session) to ``most`` requests at a time.

    Others wait for up to ``patience`` seconds. It is more than one, because a dead connection
    must not lock its user out.
    """

    def __init__(self, most: int = 4, *, patience: float = 2.0) -> None:
        self._most = most
        self._patience = patience
        self._turns: dict[Hashable, trio.Semaphore] = {}
        self._there: Counter[Hashable] = Counter()  # running or waiting

    async def take(self, key: Hashable) -> Callable[[], None]:
        """Wait for a slot, and return the function that releases it.

        Raises :exc:`Overloaded` if there is none in time, or too many wait.
        """
        if self._there[key] >= self._most + _MOST_WAITING:
            raise Overloaded
        self._there[key] += 1
        turns = self._turns.setdefault(key, trio.Semaphore(self._most))
        try:
            with trio.fail_after(self._patience):
                await turns.acquire()
        except BaseException as error:
            self._leave(key)
            if isinstance(error, trio.TooSlowError):
                raise Overloaded from None
            raise

        def give_back() -> None:
            turns.release()
            self._leave(key)

        return give_back

    def _leave(self, key: Hashable) -> None:
        self._there[key] -= 1
        if not self._there[key]:
            del self._there[key], self._turns[key]
