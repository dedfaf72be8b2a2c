"""Latencies without the delays of the machine: distinguishes a slow machine from a stalled loop.

The delays of the machine are measured in two places. The kernel counts how long this thread was
ready to run and had no core. A separate process, which only sleeps, measures how late it wakes up.
Neither grows while this process computes or waits for a lock or a peer: that counts in full.
"""

import atexit
import mmap
import os
import struct
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from typing import Final

_EVERY: Final = 0.005  # seconds that the sleeper sleeps
_FAIR: Final = 0.002  # seconds that it may wake up late on a machine that is idle
_SCHEDSTAT: Final = Path("/proc/thread-self/schedstat")  # of Linux
_RECORD: Final = struct.Struct("dd")  # time of its last wake-up, and the sum of its delays
_SLEEPER: Final = f"""
import mmap, os, struct, sys, time
shared, parent, late = mmap.mmap(int(sys.argv[1]), {_RECORD.size}), os.getppid(), 0.0
woke = time.monotonic()
while os.getppid() == parent:
    shared[:] = struct.pack("dd", woke, late)
    time.sleep({_EVERY})
    before, woke = woke, time.monotonic()
    late += max(0.0, woke - before - {_EVERY + _FAIR})
"""


class Stopwatch:
    """Runs from its creation, in the thread that created it."""

    def __init__(self) -> None:
        self._sleeper = _sleeper()
        self._waited, self._late = _waited(), self._sleeper.late
        self._started = time.monotonic()

    @property
    def elapsed(self) -> float:
        """Seconds in all."""
        return time.monotonic() - self._started

    @property
    def net(self) -> float:
        """Seconds without the delays of the machine."""
        return self.elapsed - self.taken

    @property
    def taken(self) -> float:
        """Seconds of delay by the machine so far."""
        return max(_waited() - self._waited, self._sleeper.late - self._late)


class _Sleeper:
    """The separate process; it ends with this one."""

    def __init__(self) -> None:
        descriptor = os.memfd_create("sleeper")
        os.ftruncate(descriptor, _RECORD.size)
        self._shared = mmap.mmap(descriptor, _RECORD.size)
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-E", "-c", _SLEEPER, str(descriptor)], pass_fds=[descriptor]
        )
        os.close(descriptor)
        atexit.register(self.process.wait)
        atexit.register(self.process.kill)
        while not _RECORD.unpack(self._shared)[0]:
            time.sleep(0.001)

    @property
    def late(self) -> float:
        """Seconds of delay since its start."""
        late: float = _RECORD.unpack(self._shared)[1]
        return late + self.overdue

    @property
    def overdue(self) -> float:
        """Seconds since it should have woken up."""
        woke: float = _RECORD.unpack(self._shared)[0]
        return max(0.0, time.monotonic() - woke - _EVERY - _FAIR)


@cache
def _sleeper() -> _Sleeper:
    return _Sleeper()


def _waited() -> float:
    """Seconds for which this thread was ready to run and did not, since its start."""
    if not _SCHEDSTAT.exists():
        return 0.0
    return int(_SCHEDSTAT.read_text().split()[1]) / 1e9
