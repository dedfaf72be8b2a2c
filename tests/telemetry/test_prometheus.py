"""What a master's workers share, and what is left of those that were killed."""

import os
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import structlog
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.support.gateways import Metrics, make_settings
from trio_gateway.core.histogram import SECONDS
from trio_gateway.gateway import create_app
from trio_gateway.stats import snapshot
from trio_gateway.telemetry.private_folder import PrivateFolder
from trio_gateway.telemetry.prometheus import METRICS, Snapshot, WorkerSnapshots, fold, render
from trio_gateway.telemetry.worker_stats import WorkerStats

SAMPLE = Snapshot({}, {})
BUCKETS = len(SECONDS) + 1
LONG_AGO = time.time() - 7200


def age(folder: Path) -> Path:
    os.utime(folder, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> WorkerSnapshots:
    return WorkerSnapshots(tmp_path / "trio-gateway-figures-own")


def test_folder_of_a_master_that_was_killed_is_removed(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    killed = tmp_path / "trio-gateway-figures-killed"
    WorkerSnapshots(killed).write(SAMPLE)
    (killed / "1.draft").touch()
    age(killed)

    own.clean_up()

    assert not killed.exists()


def test_what_is_no_abandoned_folder_of_figures_is_let_be(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    alive = tmp_path / "trio-gateway-figures-alive"
    WorkerSnapshots(alive).write(SAMPLE)
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


def test_last_one_out_takes_the_folder_along(own: WorkerSnapshots, tmp_path: Path) -> None:
    own.write(SAMPLE)
    own.leave(SAMPLE)

    assert list(tmp_path.iterdir()) == []


def of(deliveries: float, ended: bool = False) -> Snapshot:
    numbers = {"wsgateway_deliveries_total": {"": deliveries}, "wsgateway_tasks": {"": 5.0}}
    return Snapshot(numbers, {"wsgateway_gc_pause_seconds": ([1] * BUCKETS, 2.0)}, ended=ended)


def deliveries(reader: WorkerSnapshots) -> float:
    """The sum over all that this one reads."""
    found = Metrics(render(reader.read()).decode())
    assert found["gc_pause_seconds_sum"] == found["gc_pause_seconds_count"] / BUCKETS * 2
    return found["deliveries_total"]


def test_what_ended_is_folded_into_one_sample() -> None:
    counts = {"wsgateway_deliveries_total": {"": 3.0}, "of_a_newer_worker": {"a": 1.0}}
    more = {"wsgateway_deliveries_total": {"": 4.0, "b": 1.0}}
    one = Snapshot(counts, {"x": ([1, 2], 0.5), "y": ([1], 1.0)})
    other = Snapshot(more, {"x": ([1, 0], 0.25), "y": ([1, 1], 1.0)})

    assert fold([one, other, fold([])]) == Snapshot(
        {"wsgateway_deliveries_total": {"": 7.0, "b": 1.0}, "of_a_newer_worker": {"a": 1.0}},
        {"x": ([2, 2], 0.75), "y": ([1, 1], 1.0)},
        ended=True,
    )


@settings(max_examples=25)
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(0, 100)), max_size=12))
def test_folding_leaves_every_sum_as_it_is_and_no_file_of_the_dead(
    steps: list[tuple[int, int]],
) -> None:
    """Workers (by pid) write, end, and come again under the same pid."""
    with TemporaryDirectory() as place:
        reader = WorkerSnapshots(Path(place, "group"))
        reader.write(of(0))
        total = 0.0
        for pid, count in steps:
            worker = WorkerSnapshots(Path(place, "group"))
            worker._own = f"{pid}-{worker._own.partition('-')[2]}"
            worker.write(of(count))
            total += count
            assert deliveries(reader) == total
            reader.fold(pid)
            assert deliveries(reader) == total
            assert sorted(os.listdir(Path(place, "group"))) == sorted(["gone.json", reader._own])


@pytest.mark.parametrize("at", ["before the file is removed", "and it is never removed"])
def test_no_sum_is_wrong_while_one_is_folded(
    own: WorkerSnapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    worker = WorkerSnapshots(tmp_path / "trio-gateway-figures-own")
    worker.write(of(3))
    own.write(of(0))
    seen: list[float] = []
    remove = PrivateFolder.remove

    def look(folder: PrivateFolder, name: str) -> None:
        seen.append(deliveries(own))
        if at.startswith("before"):
            remove(folder, name)

    monkeypatch.setattr(PrivateFolder, "remove", look)
    worker.fold(os.getpid())  # both have this pid
    assert deliveries(own) == 3
    own.fold(os.getpid())  # again
    assert deliveries(own) == 3
    assert set(seen) == {3.0}


def test_a_reader_that_is_overtaken_by_a_fold_reads_again(
    own: WorkerSnapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = WorkerSnapshots(tmp_path / "trio-gateway-figures-own")
    worker.write(of(3))
    names = PrivateFolder.names

    def late(folder: PrivateFolder) -> list[str]:
        monkeypatch.setattr(PrivateFolder, "names", names)
        worker.fold(os.getpid())
        return names(folder)

    monkeypatch.setattr(PrivateFolder, "names", late)
    assert deliveries(own) == 3


def test_no_symbolic_link_is_followed(own: WorkerSnapshots, tmp_path: Path) -> None:
    """Neither to a folder of figures, nor to a file in one, nor when one is removed."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "1.json").write_text("precious")
    age(victim)
    (tmp_path / "trio-gateway-figures-link").symlink_to(victim)
    os.utime(tmp_path / "trio-gateway-figures-link", (LONG_AGO, LONG_AGO), follow_symlinks=False)
    own.clean_up()
    with pytest.raises(OSError, match=r"."):
        WorkerSnapshots(tmp_path / "trio-gateway-figures-link").write(SAMPLE)

    own.write(SAMPLE)
    folder = tmp_path / "trio-gateway-figures-own"
    (folder / f"{own._own}.draft").symlink_to(victim / "1.json")
    with pytest.raises(OSError, match=r"."):
        own.write(SAMPLE)
    (folder / "2-a.json").symlink_to(victim / "1.json")
    (folder / "3-a.json").symlink_to("/dev/zero")  # nor read for ever
    own.read()
    own.fold(2)
    own.remove()

    assert [path.name for path in victim.iterdir()] == ["1.json"]
    assert (victim / "1.json").read_text() == "precious"


def test_a_folder_that_others_may_enter_is_refused(own: WorkerSnapshots, tmp_path: Path) -> None:
    folder = tmp_path / "trio-gateway-figures-own"
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(PermissionError):
        own.write(SAMPLE)
    assert own.read() == [fold([])]
    assert not list(folder.iterdir())


async def test_figures_that_can_t_be_written_are_an_error_in_the_log_and_not_the_end(
    own: WorkerSnapshots, tmp_path: Path, autojump_clock: MockClock
) -> None:
    folder = tmp_path / "trio-gateway-figures-own"
    folder.touch()  # no folder can be made here
    app = create_app(make_settings("redis://127.0.0.1:1"))
    stats = WorkerStats(own)
    with structlog.testing.capture_logs() as logs:
        with trio.move_on_after(5):
            await stats.share(partial(snapshot, app.parts))
        folder.unlink()
        with trio.move_on_after(5):
            await stats.share(partial(snapshot, app.parts))

    assert [line["event"] for line in logs] == ["figures not shared"]


async def test_every_metric_has_its_figure_and_every_figure_its_metric() -> None:
    sample = snapshot(create_app(make_settings("redis://127.0.0.1:1")).parts)

    assert sample.numbers.keys() | sample.histograms.keys() == METRICS.keys()


async def test_a_close_code_keeps_its_label_for_good(autojump_clock: MockClock) -> None:
    """However many others clients choose, and however often."""
    app = create_app(make_settings("redis://127.0.0.1:1"))
    before: dict[str, float] = {}
    for code in [*range(3000, 3100), *[3099] * 50, *range(3050, 3200), 1001, 4001]:
        app.parts.hub.closed[code] += 1
        found = snapshot(app.parts).numbers["wsgateway_connections_closed_total"]
        assert all(found[label] >= number for label, number in before.items())
        assert sum(found.values()) == app.parts.hub.closed.total()
        before = found
    assert len(before) < 100
