"""What a master's workers share, and what is left of those that were killed."""

import os
import time
from pathlib import Path

import pytest

from trio_gateway.edges.metrics import Sample, Siblings

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
