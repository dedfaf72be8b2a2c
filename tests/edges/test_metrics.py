"""What a master's workers share, and what is left of those that were killed."""

import os
import time
from pathlib import Path

import pytest
import structlog
import trio
from harness import make_settings
from trio.testing import MockClock

from trio_gateway.edges.metrics import METRICS, Sample, Siblings
from trio_gateway.gateway import create_app

SAMPLE = Sample({}, {})
LONG_AGO = time.time() - 7200


def age(folder: Path) -> Path:
    os.utime(folder, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> Siblings:
    return Siblings(tmp_path / "trio-gateway-figures-own")


def test_folder_of_a_master_that_was_killed_is_removed(own: Siblings, tmp_path: Path) -> None:
    killed = tmp_path / "trio-gateway-figures-killed"
    Siblings(killed).write(SAMPLE)
    (killed / "1.draft").touch()
    age(killed)

    own.clean_up()

    assert not killed.exists()


def test_what_is_no_abandoned_folder_of_figures_is_let_be(own: Siblings, tmp_path: Path) -> None:
    alive = tmp_path / "trio-gateway-figures-alive"
    Siblings(alive).write(SAMPLE)
    demo = tmp_path / "trio-gateway-demo-x"
    somebodys = tmp_path / "trio-gateway-figures-somebodys"
    for folder in (demo, somebodys):
        folder.mkdir()
        (folder / "precious").touch()
        age(folder)

    own.clean_up()

    assert list(alive.iterdir())
    assert (demo / "precious").exists()
    assert (somebodys / "precious").exists()


def test_last_one_out_takes_the_folder_along(own: Siblings, tmp_path: Path) -> None:
    own.write(SAMPLE)
    own.leave(SAMPLE)

    assert list(tmp_path.iterdir()) == []


async def test_figures_that_can_t_be_written_are_an_error_in_the_log_and_not_the_end(
    own: Siblings, tmp_path: Path, autojump_clock: MockClock
) -> None:
    folder = tmp_path / "trio-gateway-figures-own"
    folder.touch()  # no folder can be made here
    app = create_app(make_settings("redis://127.0.0.1:1"))
    with structlog.testing.capture_logs() as logs:
        with trio.move_on_after(5):
            await app._share(own)
        folder.unlink()
        with trio.move_on_after(5):
            await app._share(own)

    assert [line["event"] for line in logs] == ["figures not shared"]


async def test_every_metric_has_its_figure_and_every_figure_its_metric() -> None:
    sample = create_app(make_settings("redis://127.0.0.1:1")).sample()

    assert sample.numbers.keys() | sample.histograms.keys() == METRICS.keys()
