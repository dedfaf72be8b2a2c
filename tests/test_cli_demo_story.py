"""``trio-gateway demo --story receipts``: what a viewer sees."""

from pathlib import Path

import pytest

from tests.support.ports import free_port
from tests.test_cli import own_settings
from trio_gateway.cli import demo_story, main

__all__ = ["own_settings"]

CALL, UNHEARD = "SERVICE_CALL_CREATED", "EVENT_UNHEARD"


def test_call_that_nobody_confirms_goes_to_the_floor_and_to_the_manager(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(demo_story, "WITHIN", 0.6)
    monkeypatch.setattr(demo_story, "_PAUSE", 0.2)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "200")
    arguments = f"--story receipts --loops 1 --port {free_port()}".split()
    main.commands["demo"].main(arguments, standalone_mode=False)
    printed = capfd.readouterr().out
    lines = [line.split()[1:3] for line in printed.splitlines()]
    shown = {name: [line[1] for line in lines if line[:1] == [name]] for name in ("Ana", "Ben")}
    assert shown == {"Ana": [CALL, CALL], "Ben": [CALL]}
    assert lines.index(["Eva", UNHEARD]) < lines.index(["Eva", CALL]) < lines.index(["Ben", CALL])
    text = " ".join(printed.split())
    assert "Written, not confirmed: user 21 (waiter), user 22 (waiter)." in text
    assert "waiters: nobody had confirmed within 0.6 s. floor: nobody had confirmed within" in text
    assert "trio-gateway why 1" in text
