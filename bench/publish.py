"""The publisher: events with a time stamp, pipelined to Redis from the load client's loop."""

import socket
import time
from array import array
from collections.abc import Callable
from contextlib import suppress

from .crowd import Template

_clock = time.monotonic_ns


class Publisher:
    """Publishes the events of a template; ``sent_at[n]`` is the time stamp of the n-th event."""

    def __init__(self, port: int, template: Template) -> None:
        self._template = template
        self._socket = socket.create_connection(("127.0.0.1", port))
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setblocking(False)
        self._out = bytearray()
        self.sent_at = array("q")
        self.answered = 0
        self.late = 0  # ns, the largest delay of a publish after its planned time

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def sent(self) -> int:
        return len(self.sent_at)

    def publish(self, count: int) -> None:
        command = self._template.command
        for n in range(self.sent, self.sent + count):
            now = _clock()
            self.sent_at.append(now)
            self._out += command(n, now)
        self.flush()

    def flush(self) -> None:
        with suppress(BlockingIOError):
            while self._out:
                del self._out[: self._socket.send(self._out)]

    def read_replies(self) -> None:
        """Read the replies of Redis."""
        try:
            data = self._socket.recv(1 << 16)
        except BlockingIOError:
            return
        if not data or b"-" in data:
            raise RuntimeError(f"Redis refuses: {data[:100]!r}")
        self.answered += data.count(b"\n")
        self.flush()

    def close(self) -> None:
        self._socket.close()


# Returns how many events to publish now, and how long to wait at most, in seconds.
Pace = Callable[[int], tuple[int, float]]


def paced(publisher: Publisher, rate: float) -> Pace:
    """Publish ``rate`` events per second, one at a time, evenly."""
    began, first = _clock(), publisher.sent

    def due(now: int) -> tuple[int, float]:
        number = publisher.sent - first
        at = began + int(number * 1e9 / rate)
        if now < at:
            return 0, (at - now) / 1e9
        publisher.late = max(publisher.late, now - at)
        return 1, 0.0

    return due


def saturating(publisher: Publisher, done: Callable[[], float], window: int) -> Pace:
    """Publish as many as possible, with at most ``window`` in flight."""

    def due(now: int) -> tuple[int, float]:
        room = window - int(publisher.sent - done())
        # Not one by one: a backend under load also pipelines.
        return (min(room, 256), 0.0) if room >= min(32, window) else (0, 0.05)

    return due
