"""Event-loop lag: long turns of the loop, and how long garbage collections took."""

import gc
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

import trio

from ..core.histogram import Histogram

LEAST: Final = 0.01  # seconds; shorter turns of the loop are not counted


class LoopLag(trio.abc.Instrument):
    """Times each turn of the loop, from one look at the sockets to the next, in which nobody is
    read, written to or let in. Costs two looks at the clock a turn.
    """

    def __init__(self) -> None:
        self.turns = Histogram()  # long turns, in seconds
        self.collections = Histogram()  # garbage collections, in seconds
        self._since = self._collecting_since = time.perf_counter()

    def after_io_wait(self, timeout: float) -> None:
        self._since = time.perf_counter()

    def before_io_wait(self, timeout: float) -> None:
        took = time.perf_counter() - self._since
        if took >= LEAST:
            self.turns.observe(took)

    def collects(self, phase: str, _info: Mapping[str, Any]) -> None:
        """One of :data:`gc.callbacks`."""
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
