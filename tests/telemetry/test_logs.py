import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypercorn.config import Config
from hypothesis import given
from hypothesis import strategies as st

from trio_gateway.core.close_codes import Close
from trio_gateway.settings import Settings
from trio_gateway.telemetry import output
from trio_gateway.telemetry.logs import HypercornLogger, redact, set_up
from trio_gateway.testing import make_jwt, make_table_token

SECRET = "a-secret-of-at-least-thirty-two-bytes"
JWT, TABLE_TOKEN = make_jwt(SECRET), make_table_token(SECRET)
LEGACY = "1:2:10:456:1779278400:" + "0123456789abcdef" * 2
TICKET = "Tq3-x_9LmZ0pQ7vR"


@pytest.fixture(autouse=True)
def _leave_logging_as_it_was() -> Iterator[None]:
    yield
    structlog.reset_defaults()
    for name in ("hypercorn.access", "hypercorn.error", "trio_gateway.gateway"):
        logging.getLogger(name).filters.clear()


FORMS = [
    "?token={}", "?table_token={}", "?ticket={}", "?x=1&token={}&y=2", "?TOKEN={}", "token={}#top",
    "GET /ws/waiter?token={} HTTP/1.1", '"/ws/waiter?token={}"', "Authorization: Bearer {}",
    "authorization: bearer {}", "b'Bearer {}'", "Bearer   {}", "gateway.v1, bearer.{}",
    "Sec-WebSocket-Protocol: gateway.v1, bearer.{}", '{{"type":"auth","token":"{}"}}',
    '{{"type": "auth", "token": "{}"}}', "{{'ticket': '{}', 'expires_in': 30}}",
    "Renew(token='{}')", r"{{\"table_token\":\"{}\"}}",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("credential", [JWT, TABLE_TOKEN, LEGACY, TICKET])
def test_credential_is_removed_in_every_form(credential: str, form: str) -> None:
    text = redact(f"before {form.format(credential)} after")

    assert "[redacted]" in text
    assert not any(part in text for part in re.split(r"[.:]", credential) if len(part) > 8)
    assert text.startswith("before ")
    assert text.endswith(" after")


@pytest.mark.parametrize("credential", [JWT, TABLE_TOKEN, LEGACY])
def test_bare_token_is_removed(credential: str) -> None:
    assert redact(f"bad: {credential}, sorry") == "bad: [redacted], sorry"


URLS = {
    "redis://:pw@redis:6379/0": "redis://:[redacted]@redis:6379/0",
    "rediss://user:p%40w@10.0.0.1": "rediss://user:[redacted]@10.0.0.1",
    "redis://user:p@w:d@redis": "redis://user:[redacted]@redis",
    "postgresql+psycopg://me:pw@db/x": "postgresql+psycopg://me:[redacted]@db/x",
}


@pytest.mark.parametrize("url", URLS)
def test_password_is_removed_from_a_url(url: str) -> None:
    assert redact(f"no route to {url}.") == f"no route to {URLS[url]}."


@pytest.mark.parametrize(
    "text",
    ["", "token expired", "the token: expired", "redis://redis:6379/0", "http://localhost:5176",
     "1:2:3", "12:34:56", "tenant=1 user=21", "ñ 😀", "retry in 3.2s", "unknown setting: WS_X"],
)  # fmt: skip
def test_other_text_is_unchanged(text: str) -> None:
    assert redact(text) == text


@given(st.text(st.characters()), st.text(st.characters()))
def test_redaction_never_fails_and_always_removes_the_token(before: str, after: str) -> None:
    assert JWT.split(".")[2] not in redact(f"{before}&token={JWT}&{after}")


def log_in(form: str, level: str = "info") -> Any:
    set_up(Settings.model_validate({"log_format": form, "log_level": level}))
    return structlog.get_logger()


def only_line(capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    out, err = capsys.readouterr()
    assert out == ""
    [line] = err.splitlines()
    found = json.loads(line)
    assert isinstance(found, dict)
    return found


def test_a_line_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    log_in("json").info("rejected", endpoint="waiter", tenant=1, waited=0.5, user=None)
    line = only_line(capsys)

    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+Z", line.pop("timestamp"))
    assert line == {
        "event": "rejected", "level": "info", "endpoint": "waiter", "tenant": 1, "waited": 0.5,
        "user": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("value", "logged"),
    [
        ("two\nlines ñ", "two\nlines ñ"),
        ("half an emoji \ud83d", r"half an emoji \ud83d"),
        (2**70, 2**70),
        (float("nan"), None),
        (Close.AUTH_FAILED, 4001),
        (b"\xff", r"b'\xff'"),
        (("a", {1: [TICKET]}), ["a", {"1": [TICKET]}]),
        ([f"?token={TICKET}"], ["?token=[redacted]"]),
        ({"url": f"?token={TICKET}"}, {"url": "?token=[redacted]"}),
        (ValueError(f"token={TICKET}"), "ValueError('token=[redacted]')"),
        (b"Bearer " + TICKET.encode(), "b'Bearer [redacted]'"),
    ],
)
def test_any_value_can_be_logged(
    value: object, logged: object, capsys: pytest.CaptureFixture[str]
) -> None:
    log_in("json").info("x", value=value)

    assert only_line(capsys)["value"] == logged


@pytest.mark.parametrize("form", ["json", "console"])
def test_exception_is_logged_without_secrets(form: str, capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in(form)
    try:
        raise ValueError(f"bad token={TICKET}")
    except ValueError:
        log.exception("failed", url=f"/ws?ticket={TICKET}")
    logged = capsys.readouterr().err

    assert "ValueError: bad token=[redacted]" in logged
    assert "Traceback" in logged
    assert TICKET not in logged


def test_the_console_shows_a_readable_line(capsys: pytest.CaptureFixture[str]) -> None:
    log_in("console").warning("rejected", endpoint="waiter", url=f"?token={TICKET}", n=3)
    line = capsys.readouterr().err

    assert "[warning  ] rejected" in line
    assert "endpoint=waiter n=3 url='?token=[redacted]'" in line
    assert "\x1b" not in line  # no colours, because this is not a terminal


CONTROLS = ["\x1b[2J\x1b[31m", "\x9b2J", "\x7f", "\r", "\x00", "\u202e", "\u2028"]


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize("control", CONTROLS)
def test_text_of_a_client_cannot_contain_terminal_controls(
    form: str, control: str, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_in(form)
    log.info(f"a{control}b", reason=f"a{control}b", nested=[{f"a{control}b": f"a{control}b"}])
    try:
        raise ValueError(f"a{control}b")
    except ValueError:
        log.exception("failed")
    logged = capsys.readouterr().err

    assert re.findall("[\x00-\x09\x0b-\x1f\x7f-\x9f\u2028\u202e]", logged) == []
    assert logged.count("b") >= 4
    if form == "json":
        assert json.loads(logged.splitlines()[0])["reason"] == f"a{control}b"


def test_no_log_line_can_be_forged_in_the_console(capsys: pytest.CaptureFixture[str]) -> None:
    log_in("console").info("closed", reason="bye\n2026-01-01 [critical ] stopped by a bug")

    assert len(capsys.readouterr().err.splitlines()) == 1


class Spiteful:
    def __repr__(self) -> str:
        raise ZeroDivisionError("it can't even be named")


def _endless() -> list[Any]:
    found: list[Any] = []
    found.append(found)
    return found


@pytest.mark.parametrize("form", ["json", "console"])
@pytest.mark.parametrize(
    "value", [Spiteful(), _endless(), {1: Spiteful()}], ids=["repr", "endless", "key"]
)
def test_value_that_cannot_be_formatted_does_not_raise(
    form: str, value: object, capsys: pytest.CaptureFixture[str]
) -> None:
    log_in(form).info("rejected", value=value, code=4001)
    logged = capsys.readouterr().err

    assert "rejected" in logged
    assert "4001" in logged


def test_failing_processor_loses_only_the_fields(capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("json")
    processors = structlog.get_config()["processors"]

    def picky(_logger: Any, _method: str, event: structlog.types.EventDict) -> Any:
        if "code" in event:
            raise ZeroDivisionError
        return event

    structlog.configure(processors=[picky, *processors])
    log.info("rejected", code=4001)

    line = only_line(capsys)
    assert (line["event"], line["not_logged"]) == ("rejected", "ZeroDivisionError")


def test_dropped_lines_are_announced_in_a_line_of_the_log(
    capsys: pytest.CaptureFixture[str],
) -> None:
    log_in("json")
    output._announcement(3)
    line = only_line(capsys)

    assert (line["event"], line["level"], line["lines"]) == ("log lines dropped", "warning", 3)


def test_a_context_is_part_of_every_line(capsys: pytest.CaptureFixture[str]) -> None:
    log = log_in("json")
    with structlog.contextvars.bound_contextvars(worker=2):
        log.info("x")

    assert only_line(capsys)["worker"] == 2


@pytest.mark.parametrize(
    ("level", "lines"), [("debug", 3), ("info", 2), ("warning", 1), ("error", 0), ("critical", 0)]
)
def test_the_level_decides_what_is_logged(
    level: str, lines: int, capsys: pytest.CaptureFixture[str]
) -> None:
    log = log_in("json", level)
    log.debug("x")
    log.info("x")
    log.warning("x")

    assert len(capsys.readouterr().err.splitlines()) == lines


class StoredLines(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(message)s"))
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def stored() -> Iterator[StoredLines]:
    """The lines that Hypercorn's access log writes."""
    handler, logger = StoredLines(), logging.getLogger("hypercorn.access")
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel("INFO")
    yield handler
    logger.removeHandler(handler)
    logger.setLevel(level)


def test_hypercorns_access_log_shows_no_token(stored: StoredLines) -> None:
    set_up(Settings())
    atoms = {"h": "127.0.0.1", "R": f"GET /ws/catchup?since=1&token={JWT}&x=%20", "s": 200}
    logging.getLogger("hypercorn.access").info('%(h)s "%(R)s" %(s)s', atoms)

    assert stored.lines == ['127.0.0.1 "GET /ws/catchup?since=1&token=[redacted]&x=%20" 200']


def test_a_librarys_traceback_shows_no_token(stored: StoredLines) -> None:
    set_up(Settings())
    try:
        raise ValueError(f"bad token={TICKET}")
    except ValueError:
        logging.getLogger("hypercorn.access").exception("failed")

    assert stored.lines[0].splitlines()[-1] == "ValueError: bad token=[redacted]"
    assert TICKET not in stored.lines[0]


def test_hypercorns_access_log_contains_no_terminal_controls(stored: StoredLines) -> None:
    set_up(Settings())
    logging.getLogger("hypercorn.access").info("%(r)s", {"r": "GET /\x1b[2J\n127.0.0.1 GET /x"})

    assert stored.lines == [r"GET /\u001b[2J\u000a127.0.0.1 GET /x"]


@pytest.fixture
def access_log(tmp_path: Path) -> Iterator[Path]:
    logger = logging.getLogger("hypercorn.access")
    yield tmp_path / "access"
    logger.handlers.clear()


async def test_hypercorns_access_log_accepts_any_request(access_log: Path) -> None:
    config = Config()
    config.accesslog, config.errorlog = str(access_log), None
    hypercorns = HypercornLogger(config)
    request: Any = {
        "type": "http", "method": "GET", "path": "/ws/health", "scheme": "http", "headers": [],
    }  # fmt: skip
    await hypercorns.access({**request, "query_string": b"\xff"}, None, 0.1)
    await hypercorns.access({**request, "query_string": b""}, None, 0.1)
    output.flush()

    assert len(access_log.read_text().splitlines()) == 1


async def test_hypercorns_access_log_may_be_a_pipe_that_nobody_reads(access_log: Path) -> None:
    os.mkfifo(access_log)
    reader = os.open(access_log, os.O_RDONLY | os.O_NONBLOCK)
    config = Config()
    config.accesslog, config.errorlog = str(access_log), None
    hypercorns = HypercornLogger(config)
    scope: Any = {
        "type": "http", "method": "GET", "path": "/" + "x" * 10_000, "scheme": "http",
        "headers": [], "query_string": b"",
    }  # fmt: skip
    for _ in range(20):
        await hypercorns.access(scope, None, 0.1)
    os.close(reader)


def test_a_librarys_record_that_cannot_be_formatted_does_not_raise(stored: StoredLines) -> None:
    set_up(Settings())
    logging.getLogger("hypercorn.access").info("%d", "no number")

    assert stored.lines == ["(a record that can't be logged: TypeError)"]


def test_setting_up_twice_filters_once() -> None:
    set_up(Settings())
    set_up(Settings())

    assert len(logging.getLogger("hypercorn.access").filters) == 1
