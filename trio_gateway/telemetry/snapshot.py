"""Snapshots: the values of all metrics of one process, or of several that have ended."""

from collections.abc import Iterable, Mapping
from operator import add

import msgspec

from ..core.histogram import Histogram


class Snapshot(msgspec.Struct):
    """The metrics of one process at one moment.

    ``numbers`` has the values of counters and gauges by metric and label value ("" without a
    label); ``histograms`` has the counts per bucket and the sum of the values by metric.
    ``ended`` says that the process has ended, so that its gauges no longer count.
    """

    numbers: dict[str, dict[str, float]]
    histograms: dict[str, tuple[list[int], float]]
    ended: bool = False

    @classmethod
    def of(
        cls, numbers: Mapping[str, float | Mapping[str, float]], histograms: Mapping[str, Histogram]
    ) -> "Snapshot":
        """A snapshot of the current values; a number that is not a mapping has no label."""
        return cls(
            {
                name: dict(found) if isinstance(found, Mapping) else {"": found}
                for name, found in numbers.items()
            },
            {name: (list(found.counts), found.sum) for name, found in histograms.items()},
        )


def fold(snapshots: Iterable[Snapshot]) -> Snapshot:
    """The sum of the snapshots of processes that have ended, as one snapshot.

    All numbers are added, whatever their metric: the gauges of ended processes do not count, and a
    supervisor may be older than its workers and not know all their counters.
    """
    numbers: dict[str, dict[str, float]] = {}
    histograms: dict[str, tuple[list[int], float]] = {}
    for snapshot in snapshots:
        for name, found in snapshot.numbers.items():
            sums = numbers.setdefault(name, {})
            for label, number in found.items():
                sums[label] = sums.get(label, 0.0) + number
        for name, (counts, total) in snapshot.histograms.items():
            before, sum_before = histograms.get(name, ([0] * len(counts), 0.0))
            if len(before) == len(counts):  # else one is of another version
                counts, total = list(map(add, before, counts)), sum_before + total
            histograms[name] = counts, total
    return Snapshot(numbers, histograms, ended=True)
