"""Output whose reader has ended, is slow, or never existed."""

import gc
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import click
import pytest

from trio_gateway.telemetry import output
from trio_gateway.telemetry.output import LineStream, LineWriter

Announced = list[int]


def writer(fd: int, announced: Announced | None = None, **options: int) -> LineWriter:
    found: Announced = [] if announced is None else announced
    return LineWriter(fd, found.append, **options)


@contextmanager
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe()
    try:
        yield read, write
    finally:
        for fd in (read, write):
            with suppress(OSError):
                os.close(fd)


def soon(true: Callable[[], object], seconds: float = 5) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.002)


def fill(write: int) -> int:
    """Fill the pipe; returns the number of bytes."""
    os.set_blocking(write, False)
    filled = 0
    try:
        while True:
            filled += os.write(write, b"x" * 4096)
    except BlockingIOError:
        os.set_blocking(write, True)
    return filled


def test_lines_are_written_whole_and_in_order() -> None:
    with pipe() as (read, write):
        stream = LineStream(writer(write))
        for text in ("one\ntw", "o\n", "", "thr", "ee"):
            stream.write(text)
        stream.flush()
        stream.write("\nñ \ud83d\n")
        assert stream._writer.flush()
        assert os.read(read, 4096).decode() == "one\ntwo\nthree\nñ \\ud83d\n"
        assert stream._writer.dropped == 0


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full", "closed descriptor"])
def test_lines_that_cannot_be_written_are_dropped_and_counted(target: str) -> None:
    announced: Announced = []
    with pipe() as (read, write):
        if target == "/dev/full":
            full = os.open(target, os.O_WRONLY)
            os.dup2(full, write)
            os.close(full)
        os.close(read)
        if target == "closed descriptor":
            os.close(write)
        lines = writer(write, announced)
        for n in range(100):
            lines.write(f"{n}\n")
        assert lines.flush()
    assert lines.dropped == 100
    assert announced == []


def test_number_of_dropped_lines_is_logged_when_writing_works_again() -> None:
    announced: Announced = []
    full, (read, write) = os.open("/dev/full", os.O_WRONLY), os.pipe()
    target = os.dup(full)
    try:
        lines = writer(target, announced)
        lines.write("lost\nlost\nlost\n")
        assert lines.flush()
        os.dup2(write, target)
        lines.write("there\n")
        assert lines.flush()
        soon(lambda: announced)
        assert os.read(read, 4096) == b"there\n"
    finally:
        for fd in (full, read, write, target):
            os.close(fd)
    assert announced == [3]


def test_stalled_reader_delays_no_client_and_loses_the_oldest_lines() -> None:
    announced: Announced = []
    with pipe() as (read, write):
        filled = fill(write)
        lines = writer(write, announced, max_bytes=10_000)
        began = time.monotonic()
        for n in range(20_000):
            lines.write(f"line {n:05}\n")
        assert time.monotonic() - began < 1
        assert lines._bytes <= 10_000
        assert not lines.flush(0.05)
        dropped = lines.dropped
        assert dropped > 18_000

        left, seen = filled, b""
        while left:
            left -= len(os.read(read, left))
        while not seen.endswith(b"line 19999\n"):
            seen += os.read(read, 4096)
        soon(lambda: announced)
        numbers = [int(line.split()[1]) for line in seen.splitlines()]
        assert numbers == sorted(numbers)
        assert announced == [dropped]
        assert len(numbers) + dropped == 20_000


def test_flush_ends_although_the_reader_never_reads() -> None:
    with pipe() as (_, write):
        fill(write)
        lines = writer(write)
        lines.write("never\n")
        began = time.monotonic()
        assert not lines.flush(0.1)
        assert 0.1 <= time.monotonic() - began < 0.5


def test_flush_waits_for_a_slow_reader() -> None:
    with pipe() as (read, write):
        filled = fill(write)
        lines = writer(write)
        lines.write("x" * 20_000 + "\n")
        for _ in range(filled // 4096):
            os.read(read, 4096)
        assert lines.flush(0.5)


def test_non_blocking_descriptor_is_waited_for() -> None:
    with pipe() as (read, write):
        left = filled = fill(write)
        os.set_blocking(write, False)
        lines = writer(write)
        lines.write("late\n")
        assert not lines.flush(0.05)
        while left:
            left -= len(os.read(read, left))
        assert lines.flush()
        assert filled
        assert os.read(read, 4096) == b"late\n"
        assert lines.dropped == 0


def test_a_line_longer_than_the_buffer_is_dropped() -> None:
    with pipe() as (read, write):
        lines = writer(write, max_bytes=100)
        lines.write("x" * 200 + "\n")
        lines.write("short\n")
        assert lines.flush()
        assert os.read(read, 4096) == b"short\n"
        assert lines.dropped == 1


def test_a_finalizer_may_write_while_a_line_is_written() -> None:
    class Noisy:
        def __init__(self, stream: LineStream) -> None:
            self.stream, self.me = stream, self

        def __del__(self) -> None:
            self.stream.write("finalized\n")

    with pipe() as (read, write):
        stream = LineStream(writer(write))
        with stream._writer._changed:
            Noisy(stream)
            gc.collect()
        assert stream._writer.flush()
        assert os.read(read, 4096) == b"finalized\n"


def script(text: str, **options: Any) -> "subprocess.CompletedProcess[bytes]":
    """Run this script in a process whose stderr is replaced."""
    head = "import os, sys\nfrom trio_gateway.telemetry import output\noutput.replace('stderr')\n"
    return subprocess.run(
        [sys.executable, "-c", head + text], timeout=20, stdout=subprocess.PIPE, **options
    )


def test_forked_child_writes_its_own_lines_and_none_of_its_parent() -> None:
    ended = script(
        "output._writers[0]._waiting.append(b'parent\\n')\n"
        "if os.fork() == 0:\n    print('child', file=sys.stderr)\n    sys.exit()\n"
        "os.wait()\n"
        "print('more', file=sys.stderr)\n",
        stderr=subprocess.PIPE,
    )
    assert ended.stderr.splitlines() == [b"child", b"parent", b"more"]


def test_traceback_of_a_crash_is_written() -> None:
    ended = script("raise ValueError('crash')", stderr=subprocess.PIPE)
    assert ended.returncode == 1
    assert ended.stderr.endswith(b"ValueError: crash\n")


@pytest.mark.parametrize("target", ["closed pipe", "/dev/full", "full pipe"])
def test_exit_status_does_not_depend_on_the_reader(target: str) -> None:
    with pipe() as (read, write):
        if target == "/dev/full":
            full = os.open(target, os.O_WRONLY)
            os.dup2(full, write)
            os.close(full)
        elif target == "closed pipe":
            os.close(read)
        else:
            fill(write)
        began = time.monotonic()
        ended = script("print('x' * 10**5, file=sys.stderr)\nsys.exit(3)", stderr=write)
        assert ended.returncode == 3
        assert time.monotonic() - began < 5


def test_late_signal_does_not_change_the_exit_status() -> None:
    with pipe() as (_, write):
        fill(write)
        ended = script(
            "import signal, threading, time\n"
            "def end():\n    time.sleep(0.2)\n    os.kill(os.getpid(), signal.SIGTERM)\n"
            "print('never read', file=sys.stderr)\n"
            "threading.Thread(target=end, daemon=True).start()\n"
            "sys.exit(3)",
            stderr=write,
        )
        assert ended.returncode == 3


@pytest.mark.parametrize(
    ("reader", "late", "written"),
    [
        ("reads", "", b""),
        ("reads", "print('late', file=sys.stderr)", b"late\n"),
        ("never reads", "print('x' * 10**6, file=sys.stderr)", None),
    ],
)
def test_process_ends_although_the_thread_was_stopped_with_the_lock(
    reader: str, late: str, written: bytes | None
) -> None:
    """The interpreter stops the thread after the exit handlers, and then flushes the streams."""
    with pipe() as (read, write):
        if reader == "never reads":
            fill(write)
        ended = script(
            "import atexit, threading, time\n"
            "held = threading.Event()\n"
            "def hold():\n"
            "    with output._writers[0]._changed:\n        held.set()\n        time.sleep(60)\n"
            "@atexit.register\n"
            "def last():\n"
            f"    threading.Thread(target=hold, daemon=True).start()\n    held.wait()\n    {late}\n"
            "atexit.unregister(output._end)\natexit.register(output._end)\n"
            "sys.exit(3)",
            stderr=write,
        )
        assert ended.returncode == 3
        if written is not None:
            os.close(write)
            assert os.read(read, 4096) == written


def test_descriptor_of_a_closed_stderr_is_not_reused() -> None:
    ended = script(
        "print('never read', file=sys.stderr)\noutput.flush()\n"
        "opened = os.open('/dev/zero', os.O_RDONLY)\n"
        "print(opened, os.path.samefile(2, os.devnull))",
        preexec_fn=lambda: os.close(2),
    )
    number, is_null = ended.stdout.split()
    assert int(number) > 2
    assert is_null == b"True"


def test_click_accepts_it_as_a_text_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    with pipe() as (read, write):
        stream = LineStream(writer(write))
        monkeypatch.setattr(sys, "stderr", stream)
        click.echo(click.style("ñ", fg="red"), err=True)
        click.echo("text", err=True)
        assert stream._writer.flush()
        assert os.read(read, 4096).decode() == "ñ\ntext\n"  # no colours: it is not a terminal
        with pytest.raises(TypeError):
            stream.write(b"bytes")  # type: ignore[arg-type]


def test_redirected_stream_is_not_replaced(capsys: pytest.CaptureFixture[str]) -> None:
    caught = sys.stderr
    output.replace("stderr")
    assert sys.stderr is caught
