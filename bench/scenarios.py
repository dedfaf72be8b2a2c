"""The scenarios: their names, their defaults, and how one is run."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from .connecting import accepts, idle, many, quiet, storm
from .delivering import burst, fanout, growth, mixed, slow, small, soak, steady
from .elsewhere import elsewhere, tenth
from .processes import NotHere
from .runs import Bench, Broken, Figures, Options


@dataclass(frozen=True)
class Scenario:
    """A scenario; ``rooms`` says whether the baselines, which have one room, can run it."""

    run: Callable[[Bench, str], Figures]
    defaults: Options
    rooms: bool = True
    plotted: tuple[str, ...] = ("CPU µs per delivery", "deliveries/s")

    @property
    def about(self) -> str:
        return (self.run.__doc__ or "").strip().splitlines()[0]


_PLAIN: Final = Options()
SCENARIOS: Final[dict[str, Scenario]] = {
    "fanout": Scenario(fanout, _PLAIN),
    "mixed": Scenario(mixed, replace(_PLAIN, each=20), rooms=False),
    "small": Scenario(small, replace(_PLAIN, clients=10_000, window=2000), rooms=False),
    "steady": Scenario(
        steady, replace(_PLAIN, seconds=30.0), plotted=("to last p50 ms", "to last p99 ms")
    ),
    "storm": Scenario(
        storm, replace(_PLAIN, clients=2000), plotted=("all back after s", "CPU µs per return")
    ),
    "idle": Scenario(
        idle, replace(_PLAIN, clients=10_000), plotted=("KB per connection", "CPU µs per ping")
    ),
    "quiet": Scenario(
        quiet, replace(_PLAIN, clients=300, seconds=30.0), plotted=("idle CPU ms/s",)
    ),
    "slow": Scenario(
        slow, replace(_PLAIN, rate=100.0, seconds=10.0), plotted=("p99 to last, ratio",)
    ),
    "accepts": Scenario(
        accepts, replace(_PLAIN, clients=4000), plotted=("accepts/s", "CPU µs per accept")
    ),
    "soak": Scenario(soak, replace(_PLAIN, rate=50.0)),
    "many": Scenario(
        many,
        replace(_PLAIN, clients=200_000, branches=2000, processes=8),
        rooms=False,
        plotted=("accepts/s", "KB per connection"),
    ),
    "elsewhere": Scenario(elsewhere, replace(_PLAIN, rate=10_000.0), rooms=False),
    "tenth": Scenario(tenth, _PLAIN, rooms=False),
    "burst": Scenario(
        burst, replace(_PLAIN, clients=50, stuck=0), plotted=("delivered in s", "missing")
    ),
    "growth": Scenario(growth, replace(_PLAIN, seconds=2.0)),
}


def run(bench: Bench, name: str, who: str) -> Figures:
    """Run one scenario on one server."""
    scenario = SCENARIOS[name]
    if who != "gateway" and not scenario.rooms:
        raise Broken(f"{name} needs more than one room")
    try:
        return scenario.run(bench, who)
    except (Broken, NotHere):
        raise
    except (OSError, RuntimeError) as error:
        raise Broken(f"{type(error).__name__}: {error}") from error


def options_of(name: str, chosen: dict[str, Any]) -> Options:
    """A scenario's default options, replaced by the chosen ones."""
    return replace(SCENARIOS[name].defaults, **{k: v for k, v in chosen.items() if v is not None})
