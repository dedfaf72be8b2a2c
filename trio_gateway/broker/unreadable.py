"""Streams that can't be read, though Redis answers: their keys are of another type, say."""

from collections.abc import Iterator
from typing import Any

import structlog

from .stream_replies import error_of_key

log = structlog.get_logger()


class Unreadable:
    """The names of these streams. Each is logged once until it is back."""

    def __init__(self) -> None:
        self._names: set[str] = set()

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def note(self, name: str, command: str, reply: Any) -> bool:
        """Note a stream if this reply is an error that concerns it alone; return whether it is."""
        if (word := error_of_key(reply)) is None:
            return False
        if name not in self._names:
            self._names.add(name)
            log.error("stream can't be read", stream=name, error=f"{command} failed: {word}")
        return True

    def is_back(self, name: str) -> None:
        """Note that a stream can be read."""
        self._names.discard(name)
        log.info("stream can be read again", stream=name)

    def forget(self, name: str) -> None:
        """Note that nobody wants to read a stream any more."""
        self._names.discard(name)
