"""The bench: its figures are right, checked in a short run of each kind."""

import json
import os
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from bench.client import Client, Load
from bench.crowd import Expected, Kind, Template
from bench.many import Size
from bench.processes import NotHere
from trio_gateway.core.frames import text_frame


def bench(*arguments: str) -> dict[str, Any]:
    """The gateway's figures of a run."""
    found = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert found.returncode == 0, found.stderr
    figures: dict[str, Any] = json.loads(found.stdout)["figures"]["gateway"]
    return figures


@pytest.mark.slow
def test_every_event_is_delivered_to_its_audiences_and_to_no_other_client() -> None:
    figures = bench(
        "mixed", "--clients", "60", "--branches", "6", "--each", "3", "--seconds", "0.5"
    )

    assert figures["deliveries/s"] > 1000
    faults = ("missing", "duplicate", "out of order", "to the wrong client")
    assert [figures[name] for name in faults] == [0, 0, 0, 0]


@pytest.mark.slow
def test_concurrent_resumes_have_no_gap_and_no_redis_command_per_client() -> None:
    figures = bench("storm", "--resume", "--clients", "100", "--missed", "20")

    faults = ("missing", "duplicate", "out of order", "not recovered")
    assert [figures[name] for name in faults] == [0, 0, 0, 0]
    assert sum(n for name, n in figures.items() if name.startswith("Redis: ")) < 100


@pytest.mark.chaos
def test_many_connections_over_several_processes_receive_one_event_each() -> None:
    figures = bench(
        "many", "--clients", "60", "--branches", "12", "--processes", "2", "--seconds", "0.2"
    )

    assert figures["delivered"] == 60
    faults = ("missing", "duplicate", "out of order", "to the wrong client", "lost connections")
    assert [figures[name] for name in faults] == [0, 0, 0, 0, 0]
    assert figures["KB per connection"] < 100


def marked(mark: str) -> list[str]:
    """The command lines of the processes that have this in their environment."""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark.encode() in environ.read_bytes():
                found.append(environ.with_name("cmdline").read_text().replace("\0", " "))
    return found


@pytest.mark.chaos
def test_bench_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    mark = f"THIS_BENCH={tmp_path}"
    options = ["--clients", "60", "--branches", "12", "--processes", "2", "--seconds", "60"]
    process = subprocess.Popen(
        [sys.executable, "-m", "bench", "many", *options],
        cwd=Path(__file__).parent.parent,
        env={**os.environ, "THIS_BENCH": str(tmp_path)},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        ends = time.monotonic() + 60
        while True:  # until there are a supervisor with two workers, and two load processes
            texts = " ".join(marked(mark))
            if texts.count("trio_gateway serve") == texts.count("-m bench many") == 3:
                break
            assert time.monotonic() < ends, texts
            time.sleep(0.1)
    finally:
        process.kill()
        process.wait()
    ends = time.monotonic() + 20
    while found := marked(mark):
        assert time.monotonic() < ends, found
        time.sleep(0.1)


def test_the_connections_of_a_tenant_are_on_one_process() -> None:
    size = Size(clients=6000, branches=60, processes=4, size=300)
    places: dict[int, set[int]] = {}
    for place, clients in enumerate(size.by_process()):
        assert 1000 < len(clients) < 2000
        for client in clients:
            places.setdefault(size.tenant(client % size.branches), set()).add(place)
    assert {len(found) for found in places.values()} == {1}


@pytest.mark.parametrize(
    ("size", "problem"),
    [
        (Size(10_000_000, 2000, 2, 300), "open files in one of 2 processes, and"),
        (Size(50_000_000, 2000, 2000, 300), r"clients need about \d+ MB, and \d+ are free"),
        (Size(100, 200, 2, 300), "--branches is from 2 to 100"),
        (Size(100, 1, 2, 300), "--branches is from 2 to 100"),
    ],
)
def test_more_connections_than_the_machine_can_hold_are_refused_with_the_remedy(
    size: Size, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = 1_000_000 if size.processes > 2 else 20_000
    monkeypatch.setattr("resource.getrlimit", lambda _what: (files, files))
    with pytest.raises(NotHere, match=problem):
        size.verify()


@pytest.mark.parametrize(("texts", "missing"), [("eeP", 0), ("Pee", 0), ("P-e", 1), ("eP-e", 1)])
def test_client_that_receives_an_event_before_its_first_pong_has_missed_none(
    texts: str, missing: int
) -> None:
    """``e`` is the next event, ``-`` a missing one, ``P`` the pong after admission."""
    template = Template([Kind("c", {"type": "A"})] * 10, 300)
    load, client = Load(1, template), Client(1, "/ws/waiter", Expected(range(10), 10))
    number, data = 5000, b""
    for text in texts:
        if text == "P":
            data += text_frame(b'{"type":"pong"}')
            continue
        if text == "e":
            data += text_frame(template.payload(number, 0))
        number += 1
    load.expects_from = lambda: 5000 + texts[: texts.index("P")].count("e")
    load._read(client, data)
    load.shut()
    client.socket.close()

    assert client.ready
    assert load.faults.missing == missing
