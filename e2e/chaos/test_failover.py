"""A Redis that fails over costs clients no confirmed event, and two seconds at most."""

from functools import partial
from typing import Any, Final

import pytest

from trio_gateway.redis_sets import Node, NotRunning, RedisSet, cluster_set, sentinel_set

from .failover import LIVE_AGAIN, Confirm, Figures, Took
from .failover_faults import freeze, kill, kill_and_forget, move, plan, restart_all, split
from .failover_run import Disturb, run, settle

SETS: Final[dict[str, Any]] = {"Sentinel": sentinel_set, "Cluster": cluster_set}
QUICK: Final[dict[str, Any]] = {
    "Sentinel": sentinel_set,
    "Cluster": partial(cluster_set, cluster_node_timeout="1000"),
}
FAULTS: Final[dict[str, tuple[Disturb, int]]] = {
    "primary killed": (kill, 20),
    "primary killed, back as it was": (kill_and_forget, 3),
    "primary frozen": (freeze, 5),
    "planned failover": (plan, 5),
    "all restarted": (restart_all, 1),
}


@pytest.mark.parametrize("kind", SETS)
async def test_a_failover_loses_no_confirmed_event(kind: str) -> None:
    figures = await run(
        f"{kind}: primary killed", QUICK[kind], kill,
        times=1, clients=20, confirm="all", gateways=1, watched=0.5,
    )  # fmt: skip
    print(figures)
    figures.check()


def test_delays_of_the_machine_are_no_part_of_the_two_seconds() -> None:
    figures = Figures("", 0, clients=1, events=1, live_after=[Took(LIVE_AGAIN + 1, LIVE_AGAIN)])
    figures.check()
    figures.ready_after.append(Took(LIVE_AGAIN + 1, LIVE_AGAIN + 0.1))
    with pytest.raises(AssertionError):
        figures.check()


class Choosing(RedisSet):
    """Its servers name one primary after the other; None stands for no agreement."""

    def __init__(self, *named: Node | None) -> None:
        super().__init__("", ())
        self._named = iter(named)

    def primary(self, key: str = "") -> Node:
        if (node := next(self._named)) is None:
            raise NotRunning("no agreement")
        return node


async def test_servers_may_settle_on_another_primary_than_the_first_that_took_writes() -> None:
    old, other = object.__new__(Node), object.__new__(Node)
    assert await settle(Choosing(None, old, None, other), other_than=old) is other
    assert await settle(Choosing(None, old), other_than=None) is old


@pytest.mark.chaos
@pytest.mark.parametrize("confirm", [0, "all"], ids=["unconfirmed", "confirmed"])
@pytest.mark.parametrize("kind", SETS)
@pytest.mark.parametrize("fault", FAULTS)
async def test_failovers_under_load(
    fault: str, kind: str, confirm: Confirm, capsys: pytest.CaptureFixture[str]
) -> None:
    disturb, times = FAULTS[fault]
    figures = await run(
        f"{kind}: {fault}", SETS[kind], disturb, times=times, clients=200, confirm=confirm
    )
    with capsys.disabled():
        print(f"\n{figures}\n{figures.row()}")
    figures.check()


@pytest.mark.chaos
@pytest.mark.parametrize("confirm", [0, "all"], ids=["unconfirmed", "confirmed"])
async def test_slots_that_move_under_load(
    confirm: Confirm, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = await run(
        "Cluster: slot moved", cluster_set, move, times=10, clients=200, confirm=confirm
    )
    with capsys.disabled():
        print(f"\n{figures}\n{figures.row()}")
    figures.check()


@pytest.mark.chaos
@pytest.mark.parametrize("confirm", [0, "all"], ids=["unconfirmed", "confirmed"])
@pytest.mark.parametrize("kind", SETS)
async def test_a_network_that_splits(
    kind: str, confirm: Confirm, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = await run(
        f"{kind}: network split",
        SETS[kind],
        split,
        times=2,
        clients=200,
        confirm=confirm,
        relayed=True,
    )
    with capsys.disabled():
        print(f"\n{figures}\n{figures.row()}")
    figures.check()
