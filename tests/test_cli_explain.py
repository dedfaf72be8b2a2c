"""``explain`` by the settings of this machine; test_cli has it ask a gateway."""

import json
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from tests.support import gateways as harness
from tests.support.commands import EVENT, SAMPLES, SECRETS, run
from tests.test_cli import own_settings
from trio_gateway.testing import make_jwt, make_table_token

__all__ = ["own_settings"]

SECTORED = EVENT[:-1] + ',"sector_id":5,"session_id":456}'
WAITER = make_jwt(harness.JWT_SECRET, sector_ids=[1, 2])


def explain(*tokens: str, event: str = SECTORED, **env: str) -> Result:
    arguments = [each for token in tokens for each in ("--token", token)]
    return run("explain", "-", "--json", *arguments, env=SECRETS | env, stdin=event)


def verdicts(*tokens: str, event: str = SECTORED, **env: str) -> list[dict[str, Any]]:
    done = explain(*tokens, event=event, **env)
    assert (done.exit_code, done.stderr) == (0, "")
    found: list[dict[str, Any]] = json.loads(done.stdout)["tokens"]
    return found


def test_audiences_and_reasons_match_the_gateway(tmp_path: Path) -> None:
    (tmp_path / "event.json").write_text(SECTORED)
    done = run("explain", "event.json", "--json", "--token", WAITER, env=SECRETS)
    found = json.loads(done.stdout)
    assert (found["type"], found["known"], found["durable"]) == ("ROUND_READY", True, True)
    assert found["audiences"][1] == {
        "audience": "waiters", "tenant_id": 1, "branch_id": 1, "sector_id": 5
    }  # fmt: skip
    assert "connections" not in found
    (verdict,) = found["tokens"]
    assert verdict["verified"]
    assert verdict["reasons"]["waiter"] == (
        "sector: the event is for sector 5 of branch 1, this waiter has 1, 2"
    )


def test_output_shows_each_token_and_why_it_does_not_receive() -> None:
    tokens = ["--token", WAITER, "--token", make_table_token(harness.TABLE_SECRET)]
    done = run("explain", "-", *tokens, env=SECRETS | {"COLUMNS": "200"}, stdin=SECTORED)
    assert done.exit_code == 0
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert lines[0] == "ROUND_READY (durable if read from a stream)"
    assert "goes to admins of branch 1" in lines
    assert "waiters of sector 5 in branch 1" in lines
    assert "diners of session 456" in lines
    assert any(line.startswith("1 user 21 WAITER /ws/waiter no sector: ") for line in lines)
    assert "2 session 456 /ws/diner yes" in lines


def test_text_of_events_and_tokens_cannot_contain_terminal_controls() -> None:
    event = json.dumps({"type": "\x1b[2J[red]", "tenant_id": 1, "branch_id": 1})
    token = make_jwt("x" * 32, roles=["\x1b]0;x"])
    done = run("explain", "-", "--token", token, env=SECRETS, stdin=event)
    assert done.exit_code == 0
    assert "\x1b" not in done.stdout
    assert "\\u001b[2J[red]" in done.stdout


def test_routes_of_a_file_are_used(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text('[routes.ROUND_READY]\nto = ["floor"]\n')
    (verdict,) = verdicts(WAITER, WS_ROUTES_FILE="routes.toml")
    assert verdict["endpoints"] == ["waiter"]


def test_promises_of_a_type_are_told(tmp_path: Path) -> None:
    (tmp_path / "routes.toml").write_text(
        '[routes.ROUND_READY]\nmust_reach = "waiters"\nwithin = 10\n'
        'then = [{to = "floor", within = 2.5}]\n'
    )
    env = SECRETS | {"WS_ROUTES_FILE": "routes.toml", "COLUMNS": "200"}
    done = run("explain", "-", env=env, stdin=SECTORED)
    assert "  must reach waiters within 10 s, then floor within 2.5 s" in done.stdout.splitlines()
    found = json.loads(run("explain", "-", "--json", env=env, stdin=SECTORED).stdout)
    assert found["receipt"] is True
    assert found["steps"] == [{"to": "waiters", "within": 10}, {"to": "floor", "within": 2.5}]
    done = run("explain", "-", "--token", WAITER, env=env, stdin=SECTORED)
    text = " ".join(done.stdout.split())
    assert "this waiter has 1, 2; after 10 s without a confirmation it goes to floor" in text


def test_invalid_signature_is_reported() -> None:
    staff, diner = verdicts(make_jwt("x" * 32), make_table_token("x" * 32))
    assert staff["reasons"]["token"].startswith("token: not signed with JWT_SECRET")
    assert diner["reasons"]["token"].startswith("token: not signed with TABLE_TOKEN_SECRET")
    assert staff["verified"]
    assert diner["verified"]


def test_other_faults_of_a_token_are_named() -> None:
    found = verdicts(
        make_jwt(harness.JWT_SECRET, life=-1),
        make_jwt(harness.JWT_SECRET, algorithm="HS512"),
        make_jwt(harness.JWT_SECRET, sub=21),
        "nonsense",
    )
    assert [verdict["reasons"]["token"] for verdict in found] == [
        "token: token expired",
        "token: token algorithm not allowed",
        "token: sub missing or not a decimal string",
        "token: token invalid",
    ]


def test_without_secrets_claims_are_trusted_with_a_note() -> None:
    tokens = [make_jwt("x" * 32), make_table_token("y" * 32), make_jwt("x" * 32, life=-1)]
    arguments = [each for token in tokens for each in ("--token", token)]
    done = run("explain", "-", "--json", *arguments, stdin=EVENT[:-1] + ',"session_id":456}')
    found = json.loads(done.stdout)
    assert [verdict["endpoints"] for verdict in found["tokens"]] == [["waiter"], ["diner"], []]
    assert [verdict["verified"] for verdict in found["tokens"]] == [False, False, False]
    assert found["tokens"][2]["reasons"] == {"token": "token: token expired"}
    assert any("claims are not verified" in note for note in found["notes"])


def test_legacy_table_tokens_are_read_if_allowed() -> None:
    legacy = run("token", "legacy", env=SECRETS).stdout.strip()
    (refused,) = verdicts(legacy)
    assert "ALLOW_LEGACY_TABLE_TOKENS" in refused["reasons"]["token"]
    (diner,) = verdicts(legacy, ALLOW_LEGACY_TABLE_TOKENS="true")
    assert (diner["endpoints"], diner["verified"]) == (["diner"], True)
    (forged,) = verdicts(legacy[:-1] + "x", ALLOW_LEGACY_TABLE_TOKENS="true")
    assert forged["reasons"]["token"].startswith("token: not signed with TABLE_TOKEN_SECRET")


def test_sectors_come_from_the_database_if_configured(tmp_path: Path) -> None:
    database = sqlite3.connect(tmp_path / "floor.db")
    database.execute(
        "CREATE TABLE waiter_sector_assignment (tenant_id, branch_id, sector_id, waiter_id,"
        " assignment_date DATE, shift, is_active)"
    )
    database.execute("INSERT INTO waiter_sector_assignment VALUES (1,1,5,21,date('now'),NULL,1)")
    database.commit()
    database.close()
    env = {"DATABASE_URL": f"sqlite:///{tmp_path}/floor.db", "SERVICE_DAY_CUTOFF": "00:00"}
    found = json.loads(explain(WAITER, **env).stdout)
    assert found["tokens"][0]["endpoints"] == ["waiter"]
    assert "sectors are today's in the database" in found["notes"]
    gone = {"DATABASE_URL": f"sqlite:///{tmp_path}/gone.db"}
    found = json.loads(explain(WAITER, **gone).stdout)
    assert "this waiter has 1, 2" in found["tokens"][0]["reasons"]["waiter"]
    assert any("did not answer" in note for note in found["notes"])


def test_fallback_of_an_uncovered_sector_is_noted() -> None:
    notes = json.loads(explain(WS_UNCOVERED_SECTOR="branch").stdout)["notes"]
    condition = "if no waiter of sector 5 is connected"
    receivers = "all waiters of branch 1 receive it"
    assert notes == [f"{condition}, {receivers} (WS_UNCOVERED_SECTOR=branch)"]


def test_token_may_come_from_a_file_or_stdin(tmp_path: Path) -> None:
    (tmp_path / "token").write_text(WAITER + "\n")
    (verdict,) = verdicts("@token")
    assert verdict["verified"]
    (tmp_path / "event.json").write_text(EVENT)
    done = run("explain", "event.json", "--json", "--token", "-", env=SECRETS, stdin=WAITER)
    assert json.loads(done.stdout)["tokens"][0]["receives"]


def test_line_of_the_samples_is_accepted_as_an_event() -> None:
    line = SAMPLES.read_text("utf-8").splitlines()[0]
    assert json.loads(explain(event=line).stdout)["type"] == json.loads(line)["event"]["type"]


@pytest.mark.parametrize(
    ("arguments", "stdin", "status", "error"),
    [
        (["-", "--token", "-"], EVENT, 2, "can be read only once"),
        (["-", "--token", "@gone"], EVENT, 2, "can't read a token from gone: No such file"),
        (["-", "--token", "@/dev/null"], EVENT, 2, "/dev/null contains no token"),
        (["-"], f"{EVENT}\n{EVENT}\n", 2, "- contains 2 events: pass one"),
        (["-"], "", 2, "- contains 0 events: pass one"),
        (["-"], '{"type":"X"}', 1, "invalid event: Object missing required field"),
        (["gone.json"], "", 2, "gone.json"),
        (["-", "--url", "redis://x"], EVENT, 2, "--url"),
        (["-", "--url", f"ws://127.0.0.1:{harness.free_port()}"], EVENT, 1, "nothing listens on"),
    ],
)
def test_invalid_input_is_reported_in_one_line(
    arguments: list[str], stdin: str, status: int, error: str
) -> None:
    done = run("explain", *arguments, env=SECRETS, stdin=stdin)
    assert (done.exit_code, done.stdout) == (status, "")
    assert error in done.stderr
