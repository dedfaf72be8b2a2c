"""The stopwatch: what is left out is the machine's, and only that."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from tests.support.stopwatch import Stopwatch, _sleeper


@contextmanager
def crowded(others: int) -> Iterator[None]:
    """One core for this thread and for so many processes that want all of it."""
    cores = os.sched_getaffinity(0)
    with ExitStack() as stack:
        stack.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {min(cores)})
        for _ in range(others):
            hog = subprocess.Popen(
                [sys.executable, "-S", "-c", "print(flush=True)\nwhile True: pass"],
                stdout=subprocess.PIPE,
            )
            stack.enter_context(hog)
            stack.callback(hog.kill)
            assert hog.stdout is not None
            hog.stdout.readline()
        yield


def compute(seconds: float) -> None:
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        pass


def test_time_without_a_core_is_excluded() -> None:
    with crowded(4):
        watch = Stopwatch()
        compute(0.1)
        assert watch.net < 0.2 < watch.elapsed


def most_net(work: Callable[[float], None]) -> float:
    """What counts of 0.2 s of this work, at most, in ten tries: the machine may take a part."""
    found = 0.0
    for _ in range(10):
        watch = Stopwatch()
        work(0.2)
        found = max(found, watch.net)
        assert watch.net <= watch.elapsed
        if found > 0.15:
            break
    return found


def test_time_in_which_this_process_computes_counts() -> None:
    assert most_net(compute) > 0.15


def test_time_in_which_this_process_waits_counts() -> None:
    assert most_net(time.sleep) > 0.15


def test_lateness_of_the_other_process_is_excluded() -> None:
    sleeper = _sleeper()
    watch = Stopwatch()
    sleeper.process.send_signal(signal.SIGSTOP)
    time.sleep(0.1)
    assert watch.net < 0.05 < watch.elapsed
    sleeper.process.send_signal(signal.SIGCONT)
    while sleeper.overdue > 0:
        time.sleep(0.001)
    assert watch.net < watch.elapsed - 0.05
