"""Output: standard streams whose writes neither raise nor block.

Written text goes into a bounded buffer, and a separate thread writes it to the descriptor. The
descriptor is shared with other processes, so it is not made non-blocking. Lines are dropped if the
descriptor can't be written to, or if its reader stalls until the buffer is full. Dropped lines are
counted, and announced when a later write succeeds.
"""

import atexit
import io
import os
import select
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Final, Literal, NoReturn

MAX_BYTES: Final = 1 << 20  # in the queue
# A pipe takes this many bytes in one piece, not mixed with other writers' (write(2), pipe(7)).
_ATOMIC_BYTES: Final[int] = getattr(select, "PIPE_BUF", 512)
_ENDING_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MAX_LINE: Final = 65_536  # characters; a longer line is written in pieces
_STDERR: Final = 2  # the highest of the standard descriptors
_PAUSE: Final = 0.005  # seconds between two writes, so that one write takes several lines
_STALL_TIMEOUT: Final = 0.5  # seconds without progress after which a flush gives up
_FLUSH_TIMEOUT: Final = 1.0  # seconds for a whole flush


class LineWriter:
    """Writes lines to a descriptor in a thread, which starts with the first line.

    After lines were dropped, the first successful write calls ``announce`` with their number, in
    that thread. After :meth:`end` nothing waits for the thread, nor for its lock.
    """

    def __init__(
        self, fd: int, announce: Callable[[int], None], *, max_bytes: int = MAX_BYTES
    ) -> None:
        self.fd = fd
        self.dropped = 0  # lines, since the start
        self._announce = announce
        self._max_bytes = max_bytes
        self.reset()

    def reset(self) -> None:
        """Start again. A forked child has no thread, and the queued lines are its parent's."""
        # Reentrant: the garbage collector may run at any moment, and a finalizer may write.
        self._changed = threading.Condition(threading.RLock())
        self._rest = ""  # an incomplete line
        self._waiting: deque[bytes] = deque()
        self._bytes = 0  # in the queue
        self._written = 0  # bytes, since the start
        self._busy = False  # the thread is writing
        self._torn = False  # the last write ended inside a line
        self._unannounced = 0
        self._ended = False
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Queue text to be written in whole lines. A full queue drops its oldest lines."""
        if self._ended:
            self._write_now(text.encode(errors="backslashreplace"))
            return
        with self._changed:
            lines, end, self._rest = (self._rest + text).rpartition("\n")
            if end:
                self._offer(lines + end)
            if len(self._rest) > _MAX_LINE:
                self.end_line()

    def end_line(self) -> None:
        """Queue an incomplete line, too."""
        if self._ended:
            return
        with self._changed:
            rest, self._rest = self._rest, ""
            if rest:
                self._offer(rest)

    def _offer(self, text: str) -> None:
        self._waiting.append(text.encode(errors="backslashreplace"))
        self._bytes += len(self._waiting[-1])
        while self._bytes > self._max_bytes:
            oldest = self._waiting.popleft()
            self._bytes -= len(oldest)
            self._drop(oldest)
        if self._thread is None:
            self._start()
        self._changed.notify_all()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"output {self.fd}", daemon=True)
        # If no thread can be started, the queue stays bounded, and the next line tries again.
        with suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _drop(self, lines: bytes) -> None:
        number = lines.count(b"\n") or 1
        self.dropped += number
        self._unannounced += number

    def flush(self, stall_timeout: float = _STALL_TIMEOUT, timeout: float = _FLUSH_TIMEOUT) -> bool:
        """Wait until everything is written; return whether it is.

        Gives up after ``stall_timeout`` seconds without progress, and after ``timeout`` in all.
        """
        end = time.monotonic() + timeout
        with self._changed:
            self.end_line()
            while self._waiting or self._busy:
                written, until = self._written, min(time.monotonic() + stall_timeout, end)
                while self._written == written and (self._waiting or self._busy):
                    if not self._changed.wait(until - time.monotonic()):
                        return False
        return True

    def end(self) -> None:
        """Flush, and use neither the thread nor its lock any more: the interpreter ends.

        It stops such a thread anywhere, also where that holds the lock. The interpreter itself
        flushes the streams after that.
        """
        self.flush()
        self._ended = True

    def _write_now(self, data: bytes) -> None:
        """Write what fits without waiting, and drop the rest."""
        poll = select.poll()
        poll.register(self.fd, select.POLLOUT)
        with suppress(OSError):
            while data and poll.poll(0):
                data = data[os.write(self.fd, data[:_ATOMIC_BYTES]) :]

    def _run(self) -> NoReturn:
        while True:
            with self._changed:
                while not self._waiting:
                    self._changed.wait()
                lines = self._take()
                self._busy = True
            done = self._write(lines)
            unannounced = 0
            with self._changed:
                self._busy = False
                if done:
                    unannounced, self._unannounced = self._unannounced, 0
                else:
                    self._drop(lines)
                self._changed.notify_all()
            if unannounced:
                with suppress(Exception):  # nothing may end this thread
                    self._announce(unannounced)
            elif not self._waiting:
                time.sleep(_PAUSE)

    def _take(self) -> bytes:
        """Take the queued lines that fit into one atomic write; at least one."""
        taken: list[bytes] = []
        size = 0
        while self._waiting and (not taken or size + len(self._waiting[0]) <= _ATOMIC_BYTES):
            taken.append(self._waiting.popleft())
            size += len(taken[-1])
        self._bytes -= size
        return b"".join(taken)

    def _write(self, data: bytes) -> bool:
        """Write the data, waiting as long as it takes; return whether that succeeded."""
        if self._torn:
            data = b"\n" + data
        while data:
            try:
                written = os.write(self.fd, data)
            except BlockingIOError:  # another process made it non-blocking
                poll = select.poll()
                poll.register(self.fd, select.POLLOUT)
                poll.poll()
            except OSError:
                return False  # its reader is gone, the disk is full
            else:
                data = data[written:]
                self._torn = bool(data)
                with self._changed:
                    self._written += written
                    self._changed.notify_all()
        return True


class LineStream(io.TextIOBase):
    """A text stream that writes through a :class:`LineWriter`. ``flush`` does not wait."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click tests in this way whether a stream is binary
            raise TypeError(f"write() argument must be str, not {type(text).__name__}")
        self._writer.write(text)
        return len(text)

    def flush(self) -> None:
        self._writer.end_line()

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._writer.fd

    def isatty(self) -> bool:
        return os.isatty(self._writer.fd)


_writers: Final[list[LineWriter]] = []


def _announce_on_stderr(number: int) -> None:
    sys.stderr.write(f"trio-gateway: {number} lines of output were dropped here\n")


_announcement: Callable[[int], None] = _announce_on_stderr


def announce_by(announcement: Callable[[int], None]) -> None:
    """Set the function that reports a number of dropped lines."""
    global _announcement
    _announcement = announcement


def replace(*names: Literal["stdout", "stderr"]) -> None:
    """Replace these streams of :mod:`sys` by streams that neither raise nor block.

    A stream that was already replaced, here or by a test that captures it, is not changed.
    """
    for name in names:
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        if stream is None:
            fd = _null()
        else:
            with suppress(OSError):
                stream.flush()
            fd = stream.fileno()
        setattr(sys, name, stream_to(fd))


def stream_to(fd: int) -> LineStream:
    """Make a stream that writes to this descriptor, which must stay open."""
    if not _writers:
        atexit.register(_end)
        os.register_at_fork(after_in_child=_reset)
    writer = LineWriter(fd, lambda number: _announcement(number))
    _writers.append(writer)
    return LineStream(writer)


def flush() -> None:
    """Wait until all streams are written, each for a second at most."""
    for writer in _writers:
        writer.flush()


def dropped() -> int:
    """The number of lines that this process could not write."""
    return sum(writer.dropped for writer in _writers)


def _end() -> None:
    # The process has finished its work: a signal must not change its exit status now.
    with suppress(ValueError):  # not in the main thread
        for number in _ENDING_SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    for writer in _writers:
        writer.end()


def _reset() -> None:
    for writer in _writers:
        writer.reset()


def _null() -> int:
    """Open the null device for a stream that was closed at the start.

    This also occupies every closed standard descriptor: a client's socket must never get the number
    of stderr.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    return fd
