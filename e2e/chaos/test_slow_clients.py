"""Slow clients under load: none is closed, none misses an event, and they cost little memory."""

import pytest

from .throttled import run


@pytest.mark.chaos
def test_burst_to_healthy_clients_closes_none() -> None:
    """They share a process that has no core for a moment: none of them reads for a second."""
    figures = run(slow=400, rate=1.0, events=4000, size=800, slow_for=3.0)
    print(figures)
    assert figures.closed == {}
    assert (figures.broken, figures.incomplete) == (0, 0)


@pytest.mark.chaos
def test_thousand_clients_on_a_bad_network_are_not_closed_and_cost_little() -> None:
    """50 KB/s each, and 40 MB of durable events, compared with few clients that read all."""
    beside = run(slow=0, rate=0, fast=20)
    figures = run(slow=1000, rate=50_000, finish=20, slow_for=90.0)
    print(beside, figures, sep="\n")
    assert figures.closed == {}
    assert (figures.broken, figures.incomplete) == (0, 0)
    assert figures.most_lagging == 1000
    assert figures.grown - beside.grown < 20


@pytest.mark.chaos
def test_frozen_clients_are_closed_and_delay_no_other() -> None:
    without = run(slow=0, rate=0, fast=20, events=10_000, published_at=1000)
    figures = run(
        slow=0, rate=0, fast=20, frozen=100, events=10_000, published_at=1000, slow_for=20.0
    )
    print(without, figures, sep="\n")
    assert figures.closed == {"reset": 100}
    assert (figures.broken, figures.incomplete) == (0, 0)
    assert figures.last_reader < without.last_reader + 0.5
