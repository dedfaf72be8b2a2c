"""The snapshots that workers share, and the files that killed workers leave behind."""

import os
import time
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import structlog
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from tests.support.gateways import Metrics, make_settings
from trio_gateway.core.histogram import SECONDS
from trio_gateway.gateway import create_app
from trio_gateway.stats import snapshot
from trio_gateway.telemetry.private_folder import PrivateFolder
from trio_gateway.telemetry.prometheus import render
from trio_gateway.telemetry.snapshot import Snapshot, fold
from trio_gateway.telemetry.worker_snapshots import ABANDONED, WorkerSnapshots
from trio_gateway.telemetry.worker_stats import PATIENCE, WorkerStats

EMPTY = Snapshot({}, {})
BUCKETS = len(SECONDS) + 1
LONG_AGO = time.time() - 7200


def age(folder: Path) -> Path:
    os.utime(folder, (LONG_AGO, LONG_AGO))
    return folder


@pytest.fixture
def own(tmp_path: Path) -> WorkerSnapshots:
    return WorkerSnapshots(tmp_path / "trio-gateway-stats-own")


def test_the_folder_of_a_killed_supervisor_is_removed(own: WorkerSnapshots, tmp_path: Path) -> None:
    killed = tmp_path / "trio-gateway-stats-killed"
    WorkerSnapshots(killed).write(EMPTY)
    (killed / "1.draft").touch()
    age(killed)

    own.clean_up()

    assert not killed.exists()


def test_only_abandoned_folders_of_snapshots_are_removed(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    alive = tmp_path / "trio-gateway-stats-alive"
    WorkerSnapshots(alive).write(EMPTY)
    demo = tmp_path / "trio-gateway-demo-x"
    foreign = tmp_path / "trio-gateway-stats-foreign"
    for folder in (demo, foreign):
        folder.mkdir()
        (folder / "precious").touch()
        age(folder)

    own.clean_up()

    assert list(alive.iterdir())
    assert (demo / "precious").exists()
    assert (foreign / "precious").exists()


def test_the_last_worker_removes_the_folder(own: WorkerSnapshots, tmp_path: Path) -> None:
    own.write(EMPTY)
    own.leave(EMPTY)

    assert list(tmp_path.iterdir()) == []


def of(deliveries: float, ended: bool = False) -> Snapshot:
    numbers = {"wsgateway_deliveries_total": {"": deliveries}, "wsgateway_tasks": {"": 5.0}}
    return Snapshot(numbers, {"wsgateway_gc_pause_seconds": ([1] * BUCKETS, 2.0)}, ended=ended)


def deliveries(reader: WorkerSnapshots) -> float:
    """The sum over all snapshots that this worker reads."""
    found = Metrics(render(reader.read()).decode())
    assert found["gc_pause_seconds_sum"] == found["gc_pause_seconds_count"] / BUCKETS * 2
    return found["deliveries_total"]


def test_snapshots_of_ended_workers_are_folded_into_one() -> None:
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
def test_folding_changes_no_sum_and_leaves_no_file_of_an_ended_worker(
    steps: list[tuple[int, int]],
) -> None:
    """Workers (by pid) write, end, and start again with the same pid."""
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
def test_sums_stay_correct_while_a_worker_is_folded(
    own: WorkerSnapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    worker = WorkerSnapshots(tmp_path / "trio-gateway-stats-own")
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


def test_reader_overtaken_by_a_fold_reads_again(
    own: WorkerSnapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = WorkerSnapshots(tmp_path / "trio-gateway-stats-own")
    worker.write(of(3))
    names = PrivateFolder.names

    def late(folder: PrivateFolder) -> list[str]:
        monkeypatch.setattr(PrivateFolder, "names", names)
        worker.fold(os.getpid())
        return names(folder)

    monkeypatch.setattr(PrivateFolder, "names", late)
    assert deliveries(own) == 3


def test_no_symbolic_link_is_followed(own: WorkerSnapshots, tmp_path: Path) -> None:
    """Neither as a folder of snapshots, nor as a file in one, nor when one is removed."""
    victim = tmp_path / "victim"
    victim.mkdir(mode=0o700)
    (victim / "1.json").write_text("precious")
    age(victim)
    (tmp_path / "trio-gateway-stats-link").symlink_to(victim)
    os.utime(tmp_path / "trio-gateway-stats-link", (LONG_AGO, LONG_AGO), follow_symlinks=False)
    own.clean_up()
    with pytest.raises(OSError, match=r"."):
        WorkerSnapshots(tmp_path / "trio-gateway-stats-link").write(EMPTY)

    own.write(EMPTY)
    folder = tmp_path / "trio-gateway-stats-own"
    (folder / f"{own._own}.draft").symlink_to(victim / "1.json")
    with pytest.raises(OSError, match=r"."):
        own.write(EMPTY)
    (folder / "2-a.json").symlink_to(victim / "1.json")
    (folder / "3-a.json").symlink_to("/dev/zero")  # reading it would never end
    own.read()
    own.fold(2)
    own.remove()

    assert [path.name for path in victim.iterdir()] == ["1.json"]
    assert (victim / "1.json").read_text() == "precious"


def test_a_folder_that_others_can_open_is_refused(own: WorkerSnapshots, tmp_path: Path) -> None:
    folder = tmp_path / "trio-gateway-stats-own"
    folder.mkdir()
    folder.chmod(0o770)
    with pytest.raises(PermissionError):
        own.write(EMPTY)
    assert own.read() == [fold([])]
    assert not list(folder.iterdir())


async def test_snapshots_that_cannot_be_written_are_logged_once_and_do_not_end_the_process(
    own: WorkerSnapshots, tmp_path: Path, autojump_clock: MockClock
) -> None:
    folder = tmp_path / "trio-gateway-stats-own"
    folder.touch()  # no folder can be made here
    app = create_app(make_settings("redis://127.0.0.1:1"))
    stats = WorkerStats(own)
    with structlog.testing.capture_logs() as logs:
        with trio.move_on_after(5):
            await stats.share(partial(snapshot, app.parts))
        folder.unlink()
        with trio.move_on_after(5):
            await stats.share(partial(snapshot, app.parts))

    assert [line["event"] for line in logs] == ["snapshots not shared"]


class Sibling:
    """Another worker in the folder, which shares its number of deliveries."""

    def __init__(self, place: Path) -> None:
        self.snapshots = WorkerSnapshots(place / "trio-gateway-stats-own")
        self.deliveries = self.written = 0

    def own(self) -> Snapshot:
        self.written += 1
        return of(self.deliveries)


async def total(own: WorkerSnapshots) -> float:
    """The deliveries that this worker reports; it has none of its own."""
    found = await WorkerStats(own).all(lambda: of(0))
    return Metrics(render(found).decode())["deliveries_total"]


async def test_a_worker_has_the_present_numbers_of_its_siblings_which_write_only_when_asked(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    siblings = [Sibling(tmp_path), Sibling(tmp_path)]
    async with trio.open_nursery() as nursery:
        for sibling in siblings:
            nursery.start_soon(WorkerStats(sibling.snapshots).share, sibling.own)
        await trio.testing.wait_all_tasks_blocked()
        for n in (1, 2, 3):
            for sibling in siblings:
                sibling.deliveries += n
            assert await total(own) == sum(each.deliveries for each in siblings)
        assert [each.written for each in siblings] == [3, 3]
        nursery.cancel_scope.cancel()


async def test_what_was_reported_of_a_worker_that_is_killed_stays_in_the_sum(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    sibling = Sibling(tmp_path)
    pipe = sibling.snapshots.listen()
    sibling.deliveries = 7
    async with trio.open_nursery() as nursery:
        answer = WorkerStats(sibling.snapshots)._answer
        nursery.start_soon(answer, sibling.snapshots, pipe, sibling.own)
        await trio.testing.wait_all_tasks_blocked()
        assert await total(own) == 7
        nursery.cancel_scope.cancel()  # and it does not leave
    os.close(pipe)
    sibling.deliveries = 9

    assert await total(own) == 7
    own.fold(os.getpid())  # both have this pid
    assert await total(own) == 7
    assert sorted(each.suffix for each in (tmp_path / "trio-gateway-stats-own").iterdir()) == [
        ".json", ".json",
    ]  # fmt: skip


async def test_a_sibling_that_does_not_answer_delays_nobody_for_long(
    own: WorkerSnapshots, tmp_path: Path, autojump_clock: MockClock
) -> None:
    sibling = Sibling(tmp_path)
    pipe = sibling.snapshots.listen()
    sibling.snapshots.write(of(5))
    for _ in range(3):
        began = trio.current_time()
        assert await total(own) == 5
        assert trio.current_time() == pytest.approx(began + PATIENCE)
    os.close(pipe)


async def test_the_folder_of_workers_that_nobody_asks_is_not_removed(
    own: WorkerSnapshots, tmp_path: Path, autojump_clock: MockClock
) -> None:
    sibling, folder = Sibling(tmp_path), tmp_path / "trio-gateway-stats-own"
    async with trio.open_nursery() as nursery:
        nursery.start_soon(WorkerStats(sibling.snapshots).share, sibling.own)
        await trio.testing.wait_all_tasks_blocked()
        age(folder)
        await trio.sleep(ABANDONED / 2)
        own.clean_up()
        assert folder.exists()
        nursery.cancel_scope.cancel()


async def test_a_file_in_the_place_of_a_pipe_is_not_written_to(
    own: WorkerSnapshots, tmp_path: Path
) -> None:
    own.write(EMPTY)
    folder = tmp_path / "trio-gateway-stats-own"
    (folder / "2-a.pipe").write_text("precious")
    (folder / "3-a.pipe").symlink_to(folder / "2-a.pipe")

    assert await total(own) == 0
    assert (folder / "2-a.pipe").read_text() == "precious"
