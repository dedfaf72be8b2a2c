"""The Prometheus text format: renders the snapshots of all workers, combined."""

from collections.abc import Iterable, Iterator
from operator import add
from typing import Final

import prometheus_client
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ..core.histogram import SECONDS
from .metrics import METRICS, Counter, Distribution, Gauge
from .snapshot import Snapshot

CONTENT_TYPE: Final = prometheus_client.CONTENT_TYPE_PLAIN_0_0_4


def render(snapshots: Iterable[Snapshot]) -> bytes:
    """Combine the snapshots of several processes into one page of metrics."""
    registry = prometheus_client.CollectorRegistry()
    registry.register(_Collector(list(snapshots)))
    return prometheus_client.generate_latest(registry)


class _Collector(prometheus_client.registry.Collector):
    def __init__(self, snapshots: list[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        for name, kind in METRICS.items():
            if isinstance(kind, Distribution):
                yield self._histogram(name, kind)
            else:
                yield self._numbers(name, kind)

    def _numbers(self, name: str, kind: Counter | Gauge) -> Metric:
        labels = kind.label.split(",") if kind.label else []
        family: GaugeMetricFamily | CounterMetricFamily
        if isinstance(kind, Gauge):
            family = GaugeMetricFamily(name, kind.help, labels=labels)
        else:
            family = CounterMetricFamily(name, kind.help, labels=labels)
        merged: dict[str, float] = {} if kind.label else {"": 0.0}
        for snapshot in self._snapshots:
            if isinstance(kind, Gauge) and snapshot.ended:
                continue
            for value, number in snapshot.numbers.get(name, {}).items():
                before = merged.get(value, 0.0)
                largest = isinstance(kind, Gauge) and kind.over_workers == "max"
                merged[value] = max(before, number) if largest else before + number
        for value, number in sorted(merged.items()):
            family.add_metric(value.split(",", len(labels) - 1) if labels else [], number)
        return family

    def _histogram(self, name: str, kind: Distribution) -> Metric:
        counts, total = [0] * (len(SECONDS) + 1), 0.0
        for snapshot in self._snapshots:
            found = snapshot.histograms.get(name)
            if found is not None and len(found[0]) == len(counts):  # else it is of another version
                counts = list(map(add, counts, found[0]))
                total += found[1]
        below, buckets = 0, []
        for bound, count in zip([*map(str, SECONDS), "+Inf"], counts, strict=True):
            below += count
            buckets.append((bound, float(below)))
        family = HistogramMetricFamily(name, kind.help)
        family.add_metric([], buckets, total)
        return family
