"""Event-loop lag: long turns of the loop, and how long garbage collections took."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import trio

from ..core.histogram import Histogram

MIN_TURN: Final = 0.01  # seconds; shorter turns of the loop are not counted


class LoopLag(trio.abc.Instrument):
    """Measures each turn of the loop: the time from one poll of the sockets to the next.

    During a turn no other client is served. The cost is two readings of the clock per turn.
    """

    def __init__(self) -> None:
        self.turns = Histogram()  # long turns, in seconds
        self.collections = Histogram()  # garbage collections, in seconds
        self._since = self._collecting_since = time.perf_counter()

    def after_io_wait(self, timeout: float) -> None:
        self._since = time.perf_counter()

    def before_io_wait(self, timeout: float) -> None:
        took = time.perf_counter() - self._since
        if took >= MIN_TURN:
            self.turns.observe(took)

    def collects(self, phase: str, _info: Mapping[str, Any]) -> None:
        """Measure a garbage collection; called by :data:`gc.callbacks`."""
        if phase == "start":
            self._collecting_since = time.perf_counter()
        else:
            self.collections.observe(time.perf_counter() - self._collecting_since)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Measure the event loop that this is called in."""
        self._since = time.perf_counter()
        trio.lowlevel.add_instrument(self)
        gc.callbacks.append(self.collects)
        try:
            yield
        finally:
            gc.callbacks.remove(self.collects)
            trio.lowlevel.remove_instrument(self)
