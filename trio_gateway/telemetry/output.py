"""Output: standard streams that neither raise nor block, whatever their reader does.

What is written goes into a bounded buffer, and a thread of its own passes it on. The descriptor
stays as it is: it is shared with other processes, so it must not be made non-blocking. If it can't
be written to, or if its reader stalls for so long that the buffer is full, lines are dropped,
counted, and announced once lines get through again.
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

MOST_BYTES: Final = 1 << 20  # that may be queued
# Bytes that no other process's lines can come between (write(2), pipe(7)).
_AT_ONCE: Final[int] = getattr(select, "PIPE_BUF", 512)
_ENDING: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_MOST_OF_A_LINE: Final = 65_536  # characters that wait for the end of their line
_STDERR: Final = 2  # the highest of the standard descriptors
_PAUSE: Final = 0.005  # seconds between two writes, so that many lines are one
_PATIENCE: Final = 0.5  # seconds without progress after which a flush gives up
_MOST_PATIENCE: Final = 1.0  # seconds that a flush takes at most


class LineWriter:
    """Writes lines to a descriptor, from a thread that the first of them starts.

    ``announce`` is told how many lines were dropped, in that thread, when lines get through again.
    """

    def __init__(
        self, fd: int, announce: Callable[[int], None], *, most_bytes: int = MOST_BYTES
    ) -> None:
        self.fd = fd
        self.dropped = 0  # lines, since the start
        self._announce = announce
        self._most_bytes = most_bytes
        self.forget()

    def forget(self) -> None:
        """Start again. In a forked child there is no thread, and what waits is the parent's."""
        # Reentrant: a garbage collection may come at any moment, and a finalizer may write.
        self._changed = threading.Condition(threading.RLock())
        self._rest = ""  # of a line that is not complete
        self._waiting: deque[bytes] = deque()
        self._bytes = 0  # of what waits
        self._written = 0  # bytes, since the start
        self._busy = False  # the thread is writing
        self._torn = False  # the last lines were written only in part
        self._unannounced = 0
        self._thread: threading.Thread | None = None

    def write(self, text: str) -> None:
        """Queue text to be written in whole lines. A full queue drops its oldest lines."""
        with self._changed:
            lines, end, self._rest = (self._rest + text).rpartition("\n")
            if end:
                self._offer(lines + end)
            if len(self._rest) > _MOST_OF_A_LINE:
                self.end_line()

    def end_line(self) -> None:
        """Don't wait for the end of a line that is not complete."""
        with self._changed:
            rest, self._rest = self._rest, ""
            if rest:
                self._offer(rest)

    def _offer(self, text: str) -> None:
        self._waiting.append(text.encode(errors="backslashreplace"))
        self._bytes += len(self._waiting[-1])
        while self._bytes > self._most_bytes:
            oldest = self._waiting.popleft()
            self._bytes -= len(oldest)
            self._drop(oldest)
        if self._thread is None:
            self._start()
        self._changed.notify_all()

    def _start(self) -> None:
        thread = threading.Thread(target=self._run, name=f"output {self.fd}", daemon=True)
        # If no thread can be had now, what waits is bounded, and the next line tries again.
        with suppress(RuntimeError):
            thread.start()
            self._thread = thread

    def _drop(self, lines: bytes) -> None:
        number = lines.count(b"\n") or 1
        self.dropped += number
        self._unannounced += number

    def flush(self, patience: float = _PATIENCE, most: float = _MOST_PATIENCE) -> bool:
        """Wait until all is written or there is no progress; return whether all is written."""
        end = time.monotonic() + most
        with self._changed:
            self.end_line()
            while self._waiting or self._busy:
                written, until = self._written, min(time.monotonic() + patience, end)
                while self._written == written and (self._waiting or self._busy):
                    if not self._changed.wait(until - time.monotonic()):
                        return False
        return True

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
        """As many of the waiting lines as can be written at once, and one at least."""
        taken: list[bytes] = []
        size = 0
        while self._waiting and (not taken or size + len(self._waiting[0]) <= _AT_ONCE):
            taken.append(self._waiting.popleft())
            size += len(taken[-1])
        self._bytes -= size
        return b"".join(taken)

    def _write(self, data: bytes) -> bool:
        """Whether it could be written; waits for as long as that takes."""
        if self._torn:
            data = b"\n" + data
        while data:
            try:
                written = os.write(self.fd, data)
            except BlockingIOError:  # somebody else made it non-blocking
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
    """A text stream whose lines a :class:`LineWriter` writes; its ``flush`` waits for nothing."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LineWriter) -> None:
        self._writer = writer

    def write(self, text: str) -> int:
        if not isinstance(text, str):  # click asks like this whether a stream is binary
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


def _announce_plainly(number: int) -> None:
    sys.stderr.write(f"trio-gateway: {number} lines of output were dropped here\n")


_announcement: Callable[[int], None] = _announce_plainly


def announce_by(announcement: Callable[[int], None]) -> None:
    """How to report a number of dropped lines."""
    global _announcement
    _announcement = announcement


def replace(*names: Literal["stdout", "stderr"]) -> None:
    """Replace these streams of :mod:`sys`, which then neither raise nor block.

    One that is replaced already, or caught by somebody (a test, say), stays.
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
    """A stream to this descriptor, which has to stay open."""
    if not _writers:
        atexit.register(_end)
        os.register_at_fork(after_in_child=_forget)
    writer = LineWriter(fd, lambda number: _announcement(number))
    _writers.append(writer)
    return LineStream(writer)


def flush() -> None:
    """Wait until everything is written, for as long as it moves, and a second each at most."""
    for writer in _writers:
        writer.flush()


def dropped() -> int:
    """The number of lines that this process could not write."""
    return sum(writer.dropped for writer in _writers)


def _end() -> None:
    # What the process has done is done: a signal must not change its status now.
    with suppress(ValueError):  # not in the main thread
        for number in _ENDING:
            signal.signal(number, signal.SIG_IGN)
    flush()


def _forget() -> None:
    for writer in _writers:
        writer.forget()


def _null() -> int:
    """Where to write if this stream was closed at the start. All closed standard descriptors are
    taken, too: a client's socket must never get the number of stderr.
    """
    while (fd := os.open(os.devnull, os.O_RDWR)) <= _STDERR:
        pass
    return fd
