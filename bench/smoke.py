"""The regression guard: bounds on ratios, wide enough for a noisy machine."""

from collections.abc import Iterator
from typing import Final

from rich.console import Console

from .delivering import both
from .runs import Bench, Figures

MAX_OF_FLOOR: Final = 2.5  # CPU per delivery, unbatched
MAX_OF_NAIVE: Final = 1 / 4
TIMES_NAIVE: Final = 20  # deliveries per second, saturated
TRIES: Final = 3
_CPU: Final = "CPU µs per delivery"


def guard(bench: Bench, console: Console) -> bool:
    """Whether the bounds hold in one of three tries. No event may be lost or doubled in any."""
    for attempt in range(1, TRIES + 1):
        found = {who: both(bench, who, 1.0) for who in ("floor", "naive", "gateway")}
        wrong = {k: v for k, v in found["gateway"][2].items() if v and k in _FAULTS}
        if wrong:
            for name, number in wrong.items():
                console.print(f"broken: {name}: {number:.0f}", style="bold red")
            return False
        problems = list(_problems({who: (slow, fast) for who, (slow, fast, _) in found.items()}))
        for text, holds in problems:
            console.print(("holds:  " if holds else "broken: ") + text)
        if all(holds for _, holds in problems):
            return True
        console.print(f"try {attempt} of {TRIES} is over a bound", style="yellow")
    return False


_FAULTS: Final = {"missing", "duplicate", "out of order", "to the wrong client"}


def _problems(found: dict[str, tuple[Figures, Figures]]) -> Iterator[tuple[str, bool]]:
    (floor, _), (naive, naive_fast), (ours, ours_fast) = (
        found[who] for who in ("floor", "naive", "gateway")
    )
    ratio = ours[_CPU] / floor[_CPU]
    yield (
        f"unbatched, {ours[_CPU]:.2f} µs: {ratio:.2f} x floor, at most {MAX_OF_FLOOR:g}",
        ratio <= MAX_OF_FLOOR,
    )
    ratio = ours[_CPU] / naive[_CPU]
    yield (
        f"unbatched: {ratio:.3f} x naive, at most {MAX_OF_NAIVE:g}",
        ratio <= MAX_OF_NAIVE,
    )
    rate = ours_fast["deliveries/s"]
    ratio = rate / naive_fast["deliveries/s"]
    yield (
        f"saturated, {rate:,.0f} deliveries/s: {ratio:.0f} x naive, at least {TIMES_NAIVE}",
        ratio >= TIMES_NAIVE,
    )
