"""Durations, counted in buckets: counts of several processes can be added, and have quantiles."""

from bisect import bisect_left
from collections.abc import Iterable
from itertools import accumulate
from math import ceil
from typing import Final

import msgspec

from . import distinct

#: Upper bounds of the buckets, in ms. Each is 19 % above the one before, the last is 4.4 minutes.
BOUNDS: Final = tuple(2 ** (n / 4) for n in range(73))
_BUCKETS: Final = bytes(bisect_left(BOUNDS, ms) for ms in range(1024))  # of short ones


class TimeCounts(msgspec.Struct, gc=False, omit_defaults=True):
    """How many took how long, by the number of the bucket; and which events were late, as a set of
    :mod:`.distinct`.
    """

    counts: dict[int, int] = {}
    late: bytes = b""

    @property
    def count(self) -> int:
        """How many there are."""
        return sum(self.counts.values())

    @property
    def over(self) -> int:
        """How many events were late, about if they are many."""
        return min(distinct.count(self.late), self.count)

    def merge(self, other: "TimeCounts") -> None:
        """Add those of another process, or of another time."""
        counts = self.counts
        for bucket, count in other.counts.items():
            counts[bucket] = counts.get(bucket, 0) + count
        self.late = distinct.join(self.late, other.late)


def add(all_counts: Iterable[TimeCounts], ms: int, late: int | None) -> None:
    """Count one that took ``ms`` in each of these; ``late``: the number of the event, if it is."""
    bucket = _bucket(ms)
    for each in all_counts:
        each.counts[bucket] = each.counts.get(bucket, 0) + 1
        if late is not None:
            each.late = distinct.include(each.late, late)


def remove(all_counts: Iterable[TimeCounts], ms: int) -> None:
    """Undo :func:`add` in each of these, but for the event that was late: it will be again."""
    bucket = _bucket(ms)
    for each in all_counts:
        if (left := each.counts.get(bucket, 0) - 1) > 0:
            each.counts[bucket] = left
        else:
            each.counts.pop(bucket, None)


def _bucket(ms: int) -> int:
    return _BUCKETS[ms] if ms < 1024 else bisect_left(BOUNDS, ms)


class Figures(msgspec.Struct, omit_defaults=True):
    """What is known of some events: from entering Redis until each was written here last, and until
    each client had confirmed it; and how many clients have not confirmed one that they were sent.
    """

    written: TimeCounts = msgspec.field(default_factory=TimeCounts)
    delivered: TimeCounts = msgspec.field(default_factory=TimeCounts)
    unconfirmed: int = 0

    def merge(self, other: "Figures") -> None:
        """Add those of another process, or of other events."""
        self.written.merge(other.written)
        self.delivered.merge(other.delivered)
        self.unconfirmed += other.unconfirmed


class Written(msgspec.Struct):
    """How many events each process wrote, and in how many seconds. ``over``: how many events took
    more than the limit on any of them.
    """

    count: int
    p50: float | None
    p95: float | None
    p99: float | None
    over: int


class Delivered(msgspec.Struct):
    """As :class:`Written`, of events that clients confirmed, each client on its own.

    ``over`` counts events, however many clients were late. ``unconfirmed`` clients were sent an
    event and have not confirmed it.
    """

    count: int
    p50: float | None
    p95: float | None
    p99: float | None
    over: int
    unconfirmed: int


class Window(msgspec.Struct):
    """The delivery times of a while."""

    written: Written
    delivered: Delivered

    @property
    def slowness(self) -> float:
        """The 95th percentile of what was slower; 0 without events."""
        return max(self.written.p95 or 0.0, self.delivered.p95 or 0.0)


def summary(figures: Figures) -> Window:
    """The quantiles of these figures."""
    written, delivered = figures.written, figures.delivered
    return Window(
        Written(written.count, *quantiles(written), written.over),
        Delivered(
            delivered.count, *quantiles(delivered), delivered.over, max(0, figures.unconfirmed)
        ),
    )


def quantiles(times: TimeCounts) -> tuple[float | None, float | None, float | None]:
    """The median, and the 95th and 99th percentile, in seconds; None without values.

    Each is the bound of a bucket, so that it is never too small, and up to 19 % too big. Values
    above the last bound count as that.
    """
    buckets = sorted(times.counts)
    upto = list(accumulate(times.counts[bucket] for bucket in buckets))

    def quantile(q: float) -> float | None:
        if not upto:
            return None
        bucket = buckets[bisect_left(upto, ceil(q * upto[-1]))]
        return round(BOUNDS[min(bucket, len(BOUNDS) - 1)] / 1000, 4)

    return quantile(0.5), quantile(0.95), quantile(0.99)
