"""The bench: its figures are right, checked in a short run of each kind."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.client import Client, Load
from bench.crowd import Heard, Kind, Template
from trio_gateway.core.frames import text_frame


def bench(*arguments: str) -> dict[str, Any]:
    """The gateway's figures of a run."""
    found = subprocess.run(
        [sys.executable, "-m", "bench", *arguments],
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        timeout=60,
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


@pytest.mark.parametrize(("texts", "missing"), [("eeP", 0), ("Pee", 0), ("P-e", 1), ("eP-e", 1)])
def test_client_that_receives_an_event_before_its_first_pong_has_missed_none(
    texts: str, missing: int
) -> None:
    """``e`` is the next event, ``-`` a missing one, ``P`` the pong after admission."""
    template = Template([Kind("c", {"type": "A"})] * 10, 300)
    load, client = Load(1, template), Client(1, "/ws/waiter", Heard(range(10), 10))
    number, data = 5000, b""
    for text in texts:
        if text == "P":
            data += text_frame(b'{"type":"pong"}')
            continue
        if text == "e":
            data += text_frame(template.payload(number, 0))
        number += 1
    load.heard_from = lambda: 5000 + texts[: texts.index("P")].count("e")
    load._read(client, data)
    load.shut()
    client.socket.close()

    assert client.ready
    assert load.faults.missing == missing
