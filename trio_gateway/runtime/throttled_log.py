"""A log that clients cannot flood: at most one line of a kind per interval."""

from collections import Counter
from collections.abc import Callable
from typing import Any

import trio


class ThrottledLog:
    """Passes one line of a kind to ``log`` per ``interval`` seconds and counts the others.

    Each line that is logged has the field ``held_back``: the number of lines of its kind that were
    not logged since the last one. The kind is the event's name, or ``kind`` where lines of one
    name are counted apart; there must be only a few kinds, because each is remembered.
    """

    def __init__(
        self, log: Any, interval: float = 1.0, *, clock: Callable[[], float] = trio.current_time
    ) -> None:
        self._log = log
        self._interval = interval
        self._clock = clock
        self._logged_at: dict[str, float] = {}
        self._held_back: Counter[str] = Counter()

    def info(self, event: str, /, *, kind: str | None = None, **fields: Any) -> None:
        """Log at level info, unless a line of this kind was logged within the interval."""
        self._write("info", event, kind, fields)

    def warning(self, event: str, /, *, kind: str | None = None, **fields: Any) -> None:
        """Log at level warning, unless a line of this kind was logged within the interval."""
        self._write("warning", event, kind, fields)

    def error(self, event: str, /, *, kind: str | None = None, **fields: Any) -> None:
        """Log at level error, unless a line of this kind was logged within the interval."""
        self._write("error", event, kind, fields)

    def exception(self, event: str, /, *, kind: str | None = None, **fields: Any) -> None:
        """Log the exception being handled, unless a line of this kind was logged within the
        interval.
        """
        self._write("exception", event, kind, fields)

    def _write(self, level: str, event: str, kind: str | None, fields: dict[str, Any]) -> None:
        kind, now = kind or event, self._clock()
        if now - self._logged_at.get(kind, float("-inf")) < self._interval:
            self._held_back[kind] += 1
            return
        self._logged_at[kind] = now
        getattr(self._log, level)(event, **fields, held_back=self._held_back.pop(kind, 0))
