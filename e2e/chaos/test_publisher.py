"""Publishers while a real Sentinel set or Cluster fails over: what was confirmed is kept."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import pytest

from tests.support.stopwatch import Stopwatch
from trio_gateway.publisher import InDoubt, Publisher, PublishFailed
from trio_gateway.redis_sets import Cluster, Node, SentinelSet, cluster_set, sentinel_set
from trio_gateway.redis_sets.node import NotRunning, wait_until

pytestmark = pytest.mark.chaos

STREAM: Final = "events:critical"
EVENT: Final = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
LARGE: Final = EVENT | {"data": 20_000 * "x"}  # more than the sockets to a frozen replica hold
THREADS: Final = 4
SETS: Final[dict[str, Any]] = {
    "sentinel": sentinel_set,
    "cluster": lambda: cluster_set(replicas=2),
}
FAULTS: Final = ("killed", "frozen", "planned")


def ids(node: Node) -> list[str]:
    """The ids of the events in the stream."""
    with node.client(timeout=10) as client:
        found: Any = client.xrange(STREAM)
    return [json.loads(fields["data"])["id"] for _, fields in found]


def is_replaced(found: SentinelSet | Cluster, node: Node) -> bool:
    """Whether most Sentinels, or nodes, name another primary.

    On a busy machine that need not be the one that took writes first.
    """
    try:
        return found.primary(STREAM) is not node
    except NotRunning:
        return False


class Backend:
    """Threads that publish one event after the other, each again until that succeeds."""

    def __init__(self, url: str, confirm: Any, event: dict[str, Any]) -> None:
        self.succeeded: dict[str, float] = {}  # when, by id
        self.failures = 0
        self._publisher = Publisher(url, confirm=confirm, max_length=None)
        self._event = event
        self._name = ""
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(n,)) for n in range(THREADS)]

    def _run(self, thread: int) -> None:
        n = 0
        while not self._stop.is_set():
            key = f"{self._name}-{thread}-{n}"
            try:
                self._publisher.publish(self._event, id=key)
            except PublishFailed:
                self.failures += 1
                time.sleep(0.01)
            else:
                self.succeeded[key] = time.monotonic()
                n += 1

    def wait_for(self, count: int, since: float, timeout: float = 15) -> float:
        """Seconds from then until so many events have been published."""
        end = time.monotonic() + timeout
        while time.monotonic() < end:
            after = sorted(at for at in list(self.succeeded.values()) if at > since)
            if len(after) >= count:
                return after[count - 1] - since
            time.sleep(0.01)
        raise AssertionError(f"{count} events were not published in {timeout:g} s")

    @contextmanager
    def publishing(self, name: str = "") -> Iterator[None]:
        self._name = name
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            self._stop.set()
            for thread in self._threads:
                thread.join()
            self._publisher.close()


@pytest.mark.parametrize("repetition", range(3))
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", SETS)
def test_publisher_works_two_seconds_after_the_new_primary_and_loses_nothing_that_all_confirmed(
    kind: str, fault: str, repetition: int
) -> None:
    """In a planned failover by Sentinels the former primary takes events for another second."""
    found: SentinelSet | Cluster
    with SETS[kind]() as found:
        careful, plain = Backend(found.url, "all", EVENT), Backend(found.url, 0, EVENT)
        before = found.primary(STREAM)
        with plain.publishing("plain"), careful.publishing("all"):
            careful.wait_for(100, 0.0)
            faults: dict[str, Callable[[], None]] = {
                "killed": before.kill,
                "frozen": before.freeze,
                "planned": lambda: found.failover(STREAM),
            }
            faults[fault]()
            found.wait_writable(STREAM, other_than=before)
            writable, watch = time.monotonic(), Stopwatch()
            took = plain.wait_for(THREADS + 1, writable)
            net = took - watch.taken
            wait_until(lambda: is_replaced(found, before), 10, "the failover does not end")
            known = time.monotonic()
            confirmed = known - writable + careful.wait_for(THREADS + 1, known)
        print(f"\n{kind}, {fault}: {took:.2f} s, confirmed {confirmed:.2f} s; ", end="")
        print(
            f"{plain.failures} and {careful.failures} failures, {len(careful.succeeded)} confirmed"
        )
        assert net <= 2
        assert set(careful.succeeded) <= set(ids(found.primary(STREAM)))


@pytest.mark.parametrize("confirm", [0, 1, "all"])
def test_frozen_replica_and_a_killed_primary_lose_only_what_was_not_confirmed(
    confirm: Any,
) -> None:
    """The experiment behind ``confirm``: acknowledged is not kept."""
    with sentinel_set(replicas=1) as found:
        before = found.primary()
        (replica,) = (node for node in found.nodes if node is not before)
        backend = Backend(found.url, confirm, LARGE)
        with backend.publishing():
            backend.wait_for(100, 0.0)
            replica.freeze()
            time.sleep(3)
            before.kill()
            replica.thaw()
            succeeded = set(backend.succeeded)
            found.wait_writable(other_than=before)
            if confirm == 0:
                backend.wait_for(THREADS, time.monotonic())
        lost = len(succeeded - set(ids(replica)))
        print(f"\nconfirm={confirm}: {lost} of {len(succeeded)} acknowledged events lost")
        assert (lost > 0) == (confirm == 0)


def test_event_sent_to_a_frozen_primary_is_published_by_the_same_call() -> None:
    with sentinel_set() as found, Publisher(found.url) as publisher:
        publisher.publish(EVENT, id="first")
        before = found.primary()
        freezing = threading.Timer(0.0, before.freeze)
        freezing.start()
        freezing.join()
        time.sleep(1.5)  # the others find that out meanwhile
        with pytest.raises(InDoubt):
            publisher.publish(EVENT)  # without an id it is not sent again
        publisher.publish(EVENT, id="second")
        assert ids(found.wait_writable(other_than=before))[-1] == "second"
