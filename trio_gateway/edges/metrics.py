"""Metrics: a Prometheus collector that reads statistics when scraped, of every worker."""

import hashlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import msgspec
import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ..core.histogram import SECONDS, Histogram

CONTENT_TYPE: Final = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
SHARED_EVERY: Final = 0.25  # seconds
GROUP: Final = "TRIO_GATEWAY_GROUP"  # in the environment of several workers: whose figures to sum
_PREFIX: Final = "trio-gateway-figures-"
_ABANDONED: Final = 3600.0  # seconds without a word from any of its workers


class _Counter(NamedTuple):
    help: str
    label: str | None = None  # or several, as their values are: separated by commas


class _Gauge(NamedTuple):
    help: str
    label: str | None = None
    over_workers: str = "sum"  # or "max"


class _Histogram(NamedTuple):
    help: str


# The names are a promise (contract, section 5). No label has unbounded values.
METRICS: Final[Mapping[str, _Counter | _Gauge | _Histogram]] = {
    "wsgateway_ready": _Gauge("Processes that clients should be sent to"),
    "wsgateway_connections_total": _Gauge("Open connections"),
    "wsgateway_connections_limit": _Gauge("How many may be open"),
    "wsgateway_connections_by_endpoint": _Gauge("Open connections by endpoint", "endpoint"),
    "wsgateway_circuit_breaker_state": _Gauge("0 closed, 1 open, 2 half-open", "name", "max"),
    "wsgateway_event_queue_depth": _Gauge("Events that wait to be delivered"),
    "wsgateway_connections_rejected_total": _Counter("Clients that were not let in", "reason"),
    "wsgateway_connections_closed_total": _Counter("Ended connections by close code", "code"),
    "wsgateway_upgrades_refused_total": _Counter("Upgrades refused by HTTP status", "status"),
    "wsgateway_broadcasts_total": _Counter("Events that somebody heard"),
    "wsgateway_broadcasts_failed_total": _Counter("Events whose delivery took too long"),
    "wsgateway_events_received_total": _Counter("Events heard, valid or not", "source"),
    "wsgateway_events_processed_total": _Counter("Events dispatched, duplicates left out"),
    "wsgateway_events_dropped_total": _Counter("Events dropped before they were delivered"),
    "wsgateway_events_dropped_by_source_total": _Counter("The same, and why", "source,reason"),
    "wsgateway_events_invalid_total": _Counter("What was published and is no event", "reason"),
    "wsgateway_events_duplicate_total": _Counter("Copies of events that were heard before"),
    "wsgateway_events_unheard_total": _Counter("Events nobody heard, or whose sector nobody has"),
    "wsgateway_events_unknown_type_total": _Counter("Events of a type that has no route"),
    "wsgateway_deliveries_total": _Counter("Events handed to a connection"),
    "wsgateway_resumes_total": _Counter("Clients that asked to resume", "outcome"),
    "wsgateway_replayed_events_total": _Counter("Durable events sent from the history"),
    "wsgateway_stream_gaps_total": _Counter("Times that stream entries were lost unread"),
    "wsgateway_tasks": _Gauge("Trio tasks: about one for each connection, and a few"),
    "wsgateway_history_events": _Gauge("Durable events in memory"),
    "wsgateway_history_bytes": _Gauge("Their bytes"),
    "wsgateway_dead_letters_total": _Counter("Stream entries that are no events", "outcome"),
    "wsgateway_sector_queries_total": _Counter("Queries to the database", "outcome"),
    "wsgateway_messages_received_total": _Counter("Messages from clients"),
    "wsgateway_broadcast_duration_seconds": _Histogram("Delivering one batch of events"),
    "wsgateway_event_latency_seconds": _Histogram("From hearing an event to its last write"),
    "wsgateway_loop_stall_seconds": _Histogram("Turns of the event loop that took 10 ms or more"),
    "wsgateway_gc_pause_seconds": _Histogram("Collections of garbage"),
}


class Sample(msgspec.Struct):
    """One process's figures: numbers by metric and label value, histograms by metric."""

    numbers: dict[str, dict[str, float]]
    histograms: dict[str, tuple[list[int], float]]
    ended: bool = False

    @classmethod
    def of(
        cls, numbers: Mapping[str, float | Mapping[str, float]], histograms: Mapping[str, Histogram]
    ) -> "Sample":
        return cls(
            {
                name: dict(found) if isinstance(found, Mapping) else {"": found}
                for name, found in numbers.items()
            },
            {name: (list(found.counts), found.sum) for name, found in histograms.items()},
        )


def render(samples: Iterable[Sample]) -> bytes:
    """The processes' figures, summed, in Prometheus' text format."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Collector(list(samples)))
    return prometheus_client.generate_latest(registry)


class _Collector(prometheus_client.registry.Collector):
    def __init__(self, samples: list[Sample]) -> None:
        self._samples = samples

    def collect(self) -> Iterator[Metric]:
        for name, kind in METRICS.items():
            if isinstance(kind, _Histogram):
                yield self._histogram(name, kind)
            else:
                yield self._numbers(name, kind)

    def _numbers(self, name: str, kind: _Counter | _Gauge) -> Metric:
        labels = kind.label.split(",") if kind.label else []
        family: GaugeMetricFamily | CounterMetricFamily
        if isinstance(kind, _Gauge):
            family = GaugeMetricFamily(name, kind.help, labels=labels)
        else:
            family = CounterMetricFamily(name, kind.help, labels=labels)
        merged: dict[str, float] = {} if kind.label else {"": 0.0}
        for sample in self._samples:
            if isinstance(kind, _Gauge) and sample.ended:
                continue
            for value, number in sample.numbers.get(name, {}).items():
                before = merged.get(value, 0.0)
                largest = isinstance(kind, _Gauge) and kind.over_workers == "max"
                merged[value] = max(before, number) if largest else before + number
        for value, number in sorted(merged.items()):
            family.add_metric(value.split(",", len(labels) - 1) if labels else [], number)
        return family

    def _histogram(self, name: str, kind: _Histogram) -> Metric:
        counts, total = [0] * (len(SECONDS) + 1), 0.0
        for sample in self._samples:
            if (found := sample.histograms.get(name)) is not None:
                counts = [a + b for a, b in zip(counts, found[0], strict=True)]
                total += found[1]
        below, buckets = 0, []
        for bound, count in zip([*map(str, SECONDS), "+Inf"], counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family = HistogramMetricFamily(name, kind.help)
        family.add_metric([], buckets, total)
        return family


class Siblings:
    """The figures of the other workers of one master, shared through files in a private folder.

    Each worker writes its own four times a second; a worker that was killed leaves its counters
    behind, so that sums never go down.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{os.getpid()}.json"

    @classmethod
    def of_this_process(cls) -> "Siblings | None":
        """None if no master started this process."""
        if group := os.environ.get(GROUP):  # one of several that serve runs
            return cls(_folder(group))
        if multiprocessing.parent_process() is None:
            return None
        # What a master's workers have in common, and nobody else knows.
        common = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
        return cls(_folder(common))

    def clean_up(self) -> None:
        """Remove the folders of masters that were killed with all their workers."""
        for folder in self._folder.parent.glob(f"{_PREFIX}*"):
            try:
                status = folder.stat()
                if status.st_uid == os.getuid() and status.st_mtime < time.time() - _ABANDONED:
                    _remove(folder)
            except OSError:
                pass  # somebody else was quicker, or it is not what it looks like

    def write(self, sample: Sample) -> None:
        self._folder.mkdir(mode=0o700, exist_ok=True)
        draft = self._own.with_suffix(".draft")
        draft.write_bytes(msgspec.json.encode(sample))
        draft.replace(self._own)

    def read(self) -> list[Sample]:
        """What the others wrote last."""
        found = []
        for path in sorted(self._folder.glob("*.json")):
            if path == self._own:
                continue
            try:
                sample = msgspec.json.decode(path.read_bytes(), type=Sample)
            except (OSError, msgspec.DecodeError):
                continue
            sample.ended = sample.ended or not _is_alive(int(path.stem))
            found.append(sample)
        return found

    def leave(self, sample: Sample) -> None:
        """Leave the counters behind; the last one out takes the folder along."""
        sample.ended = True
        try:
            self.write(sample)
            if all(other.ended for other in self.read()):
                _remove(self._folder)
        except OSError:
            pass  # the folder has gone with the last one


def _folder(group: str) -> Path:
    return Path(tempfile.gettempdir()) / f"{_PREFIX}{group}"


def _remove(folder: Path) -> None:
    """Remove a folder of figures; one that holds anything else stays, with that."""
    for pattern in ("*.json", "*.draft"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)
    folder.rmdir()


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
