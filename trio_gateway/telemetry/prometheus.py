"""Metrics: a Prometheus collector that reads statistics when scraped, of every worker."""

import hashlib
import multiprocessing
import os
import secrets
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from operator import add
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
from .private_folder import PrivateFolder

CONTENT_TYPE: Final = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4
# In the environment of several workers: the folder of their figures; empty if there is none.
GROUP: Final = "TRIO_GATEWAY_GROUP"
_PREFIX: Final = "trio-gateway-figures-"
_SUFFIX: Final = ".json"
_GONE: Final = "gone.json"
_TRIES: Final = 5
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
    "wsgateway_ready": _Gauge("Processes that are ready to serve clients"),
    "wsgateway_metrics_partial": _Gauge(
        "1 if the metrics of other workers are missing", None, "max"
    ),
    "wsgateway_connections_total": _Gauge("Open connections"),
    "wsgateway_connections_limit": _Gauge("Maximum number of open connections"),
    "wsgateway_connections_by_endpoint": _Gauge("Open connections by endpoint", "endpoint"),
    "wsgateway_circuit_breaker_state": _Gauge(
        "State of the circuit breaker: 0 closed, 1 open, 2 half-open", "name", "max"
    ),
    "wsgateway_event_queue_depth": _Gauge("Events waiting to be delivered"),
    "wsgateway_connections_rejected_total": _Counter("Rejected connections by reason", "reason"),
    "wsgateway_connections_closed_total": _Counter("Closed connections by close code", "code"),
    "wsgateway_connections_closed_by_gateway_total": _Counter(
        "Connections closed by the gateway, by close code", "code"
    ),
    "wsgateway_upgrades_refused_total": _Counter(
        "Refused upgrade requests by HTTP status", "status"
    ),
    "wsgateway_broadcasts_total": _Counter("Events with at least one recipient"),
    "wsgateway_broadcasts_failed_total": _Counter("Events whose delivery timed out"),
    "wsgateway_events_received_total": _Counter(
        "Events received from Redis, valid or not, by source", "source"
    ),
    "wsgateway_events_processed_total": _Counter("Events dispatched, without duplicates"),
    "wsgateway_events_dropped_total": _Counter("Events dropped before delivery"),
    "wsgateway_events_dropped_by_source_total": _Counter(
        "Events dropped before delivery, by source and reason", "source,reason"
    ),
    "wsgateway_events_invalid_total": _Counter("Invalid events by reason", "reason"),
    "wsgateway_events_duplicate_total": _Counter("Duplicates of events received before"),
    "wsgateway_events_unheard_total": _Counter(
        "Events without a recipient, or whose sector has no waiter"
    ),
    "wsgateway_events_unknown_type_total": _Counter("Events of a type without a route"),
    "wsgateway_deliveries_total": _Counter("Events written to a connection or its outbox"),
    "wsgateway_resumes_total": _Counter("Requests to resume by outcome", "outcome"),
    "wsgateway_replayed_events_total": _Counter("Durable events replayed from the history"),
    "wsgateway_stream_gaps_total": _Counter(
        "Times that stream entries were lost before they were read"
    ),
    "wsgateway_log_lines_dropped_total": _Counter(
        "Log lines dropped because they could not be written"
    ),
    "wsgateway_tasks": _Gauge("Running Trio tasks"),
    "wsgateway_history_events": _Gauge("Durable events in the history"),
    "wsgateway_history_bytes": _Gauge("Bytes of the durable events in the history"),
    "wsgateway_dead_letters_total": _Counter(
        "Invalid stream entries to be copied to the dead-letter stream, by outcome", "outcome"
    ),
    "wsgateway_sector_queries_total": _Counter(
        "Queries to the sector database by outcome", "outcome"
    ),
    "wsgateway_messages_received_total": _Counter("Messages received from clients"),
    "wsgateway_broadcast_duration_seconds": _Histogram(
        "Duration of the delivery of one batch of events"
    ),
    "wsgateway_event_latency_seconds": _Histogram("Time from receiving an event to its last write"),
    "wsgateway_loop_stall_seconds": _Histogram("Turns of the event loop that took 10 ms or more"),
    "wsgateway_gc_pause_seconds": _Histogram("Duration of garbage collections"),
}


class Snapshot(msgspec.Struct):
    """One process's figures: numbers by metric and label value, histograms by metric."""

    numbers: dict[str, dict[str, float]]
    histograms: dict[str, tuple[list[int], float]]
    ended: bool = False

    @classmethod
    def of(
        cls, numbers: Mapping[str, float | Mapping[str, float]], histograms: Mapping[str, Histogram]
    ) -> "Snapshot":
        return cls(
            {
                name: dict(found) if isinstance(found, Mapping) else {"": found}
                for name, found in numbers.items()
            },
            {name: (list(found.counts), found.sum) for name, found in histograms.items()},
        )


def render(samples: Iterable[Snapshot]) -> bytes:
    """The processes' figures, summed, in Prometheus' text format."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Collector(list(samples)))
    return prometheus_client.generate_latest(registry)


class _Collector(prometheus_client.registry.Collector):
    def __init__(self, samples: list[Snapshot]) -> None:
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
            found = sample.histograms.get(name)
            if found is not None and len(found[0]) == len(counts):  # not of another version
                counts = list(map(add, counts, found[0]))
                total += found[1]
        below, buckets = 0, []
        for bound, count in zip([*map(str, SECONDS), "+Inf"], counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family = HistogramMetricFamily(name, kind.help)
        family.add_metric([], buckets, total)
        return family


def fold(samples: Iterable[Snapshot]) -> Snapshot:
    """What processes that have ended leave to the sums, as one sample.

    Every number is added, whatever its metric: the gauges of ended processes count for nothing,
    and a supervisor may be older than its workers and not know all their counters.
    """
    numbers: dict[str, dict[str, float]] = {}
    histograms: dict[str, tuple[list[int], float]] = {}
    for sample in samples:
        for name, found in sample.numbers.items():
            sums = numbers.setdefault(name, {})
            for label, number in found.items():
                sums[label] = sums.get(label, 0.0) + number
        for name, (counts, total) in sample.histograms.items():
            before, sum_before = histograms.get(name, ([0] * len(counts), 0.0))
            if len(before) == len(counts):  # else one is of another version
                counts, total = list(map(add, before, counts)), sum_before + total
            histograms[name] = counts, total
    return Snapshot(numbers, histograms, ended=True)


class _Gone(msgspec.Struct):
    """What workers have left that ended, and the names of their files, if they still exist."""

    sample: Snapshot
    folded: list[str]


class WorkerSnapshots:
    """The figures of several workers, shared through files in a private folder.

    Each worker writes its own four times a second, and before it tells anybody a sum. One that has
    ended leaves its counters behind, so that sums never go down: the supervisor folds its file
    into one for all that are gone. ``supervised`` says that the folder is the supervisor's to
    remove, unless it was killed.
    """

    def __init__(self, folder: Path, *, supervised: bool = False) -> None:
        self._folder = PrivateFolder(folder)
        self._own = f"{os.getpid()}-{secrets.token_hex(4)}{_SUFFIX}"  # pids come again
        self._supervisor = os.getppid() if supervised else None

    @classmethod
    def of_this_process(cls) -> "WorkerSnapshots | None":
        """None if this process has no siblings, or can share nothing with them.

        Raises :exc:`OSError` if there is no place for temporary files.
        """
        if (group := os.environ.get(GROUP)) is not None:  # one of several that serve runs
            return cls(Path(group), supervised=True) if group else None
        if multiprocessing.parent_process() is None:
            return None
        # What a master's workers have in common, and nobody else knows.
        common = hashlib.sha256(multiprocessing.current_process().authkey).hexdigest()[:16]
        return cls(Path(tempfile.gettempdir()) / f"{_PREFIX}{common}")

    def clean_up(self) -> None:
        """Remove the folders of masters that were killed with all their workers."""
        for path in self._folder.path.parent.glob(f"{_PREFIX}*"):
            try:
                if path.lstat().st_mtime < time.time() - _ABANDONED:
                    PrivateFolder(path).remove_all(_SUFFIX)
            except OSError:
                pass  # somebody else was quicker, or it is not what it looks like

    def write(self, sample: Snapshot) -> None:
        self._folder.write(self._own, msgspec.json.encode(sample))

    def read(self) -> list[Snapshot]:
        """What the others wrote last, and what those left that are gone."""
        found: list[Snapshot] = []
        for _ in range(_TRIES):
            gone, version = self._read_gone()
            found = list(self._read_others(gone))
            try:
                if version == self._folder.version(_GONE):
                    break  # else one was folded meanwhile
            except OSError:
                break  # none ever was
        return found

    def fold(self, pid: int) -> None:
        """A worker has ended: keep its counters among those of the others that have, and remove
        its file. Only the supervisor does this. Raises :exc:`OSError`.
        """
        gone, _ = self._read_gone()
        names = self._folder.names()
        ended = [n for n in names if n != _GONE and _pid(n) == pid and n not in gone.folded]
        samples = [sample for name in ended if (sample := self._read(name)) is not None]
        if samples:
            # Until the files are removed, whoever reads knows by the names that they are in here.
            folded = [name for name in gone.folded if name in names] + ended
            gone = _Gone(fold([gone.sample, *samples]), folded)
            self._folder.write(_GONE, msgspec.json.encode(gone))
        for name in ended:
            self._folder.remove(name)

    def leave(self, sample: Snapshot) -> None:
        """Leave the counters behind; the last one out takes the folder along."""
        sample.ended = True
        try:
            self.write(sample)
            kept = self._supervisor is not None and self._supervisor == os.getppid()
            if not kept and all(other.ended for other in self.read()):
                self.remove()
        except OSError:
            pass  # the folder has gone with the last one

    def remove(self) -> None:
        """Remove the folder with all figures. Raises :exc:`OSError`."""
        self._folder.remove_all(_SUFFIX)

    def _read_others(self, gone: _Gone) -> Iterator[Snapshot]:
        yield gone.sample
        try:
            names = self._folder.names()
        except OSError:
            return
        for name in names:
            if name in {self._own, _GONE, *gone.folded} or (pid := _pid(name)) is None:
                continue
            if (sample := self._read(name)) is not None:
                sample.ended = sample.ended or not _is_alive(pid)
                yield sample

    def _read_gone(self) -> tuple[_Gone, int | None]:
        with suppress(OSError, msgspec.DecodeError):
            data, version = self._folder.read(_GONE)
            return msgspec.json.decode(data, type=_Gone), version
        return _Gone(fold([]), []), None

    def _read(self, name: str) -> Snapshot | None:
        with suppress(OSError, msgspec.DecodeError):
            return msgspec.json.decode(self._folder.read(name)[0], type=Snapshot)
        return None


def open_group() -> Path:
    """A new folder for the figures of a supervisor's workers, to which one file could be written.

    Raises :exc:`OSError`.
    """
    try:
        return _make_folder(None)
    except OSError:
        # In containers the one place that is not read-only.
        return _make_folder("/dev/shm")  # noqa: S108 - the folder is private


def _make_folder(place: str | None) -> Path:
    path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=place))
    folder = PrivateFolder(path)
    try:
        folder.write(_GONE, msgspec.json.encode(_Gone(fold([]), [])))
    except OSError:
        with suppress(OSError):
            folder.remove_all(_SUFFIX)
        raise
    return path


def _pid(name: str) -> int | None:
    """Of the worker whose file this is."""
    pid, dash, _ = name.partition("-")
    return int(pid) if dash and name.endswith(_SUFFIX) and pid.isdecimal() else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
