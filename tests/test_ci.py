"""The last line of ``.ci/run``: what could not be tried is counted, and is never a success."""

import os
import subprocess
from pathlib import Path

import pytest

RUN = Path(__file__).parent.parent / ".ci" / "run"
SESSIONS = ("lint", "types", "tests", "bench_smoke", "package", "clients", "docs", "browser")
TOOLS = ("bash", "dirname", "mktemp", "rm", "timeout")


def run(folder: Path, **broken: str) -> "subprocess.CompletedProcess[str]":
    """Run it where nothing but these commands exists; ``name="…"`` is what a broken one does."""
    commands = {
        "python3": 'mkdir -p "$3/bin" && : > "$3/bin/activate"',
        "pip": "true",
        "npm": "true",
        "chromium": "true",
        "nox": 'echo "nox $2"',
        "id": "echo 1000",
    }
    for name, text in (commands | broken).items():
        if text:
            path = folder / name
            path.write_text(f"#!/bin/bash\nPATH=/usr/bin:/bin\n{text}\n")
            path.chmod(0o755)
    for name in TOOLS:
        real = next(p for p in ("/bin", "/usr/bin") if Path(p, name).exists())
        (folder / name).symlink_to(Path(real, name))
    return subprocess.run(
        [str(RUN)],
        env={"PATH": str(folder), "TMPDIR": str(folder), "HOME": os.environ.get("HOME", "/")},
        capture_output=True,
        text=True,
        timeout=20,
    )


def test_all_steps_are_counted(tmp_path: Path) -> None:
    done = run(tmp_path)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert [line for line in lines if line.startswith("nox")] == [f"nox {s}" for s in SESSIONS]
    assert lines[-1] == "ci: 9 passed, 0 failed, 0 skipped"


@pytest.mark.parametrize("session", ["lint", "tests", "browser"])
def test_step_that_fails_fails_the_run_and_hides_no_other(tmp_path: Path, session: str) -> None:
    done = run(tmp_path, nox=f'echo "nox $2"; [ "$2" != {session} ]')
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert sum(line.startswith("nox") for line in lines) == len(SESSIONS)
    assert any(line.startswith(f"ci: {session}: FAILED") for line in lines)
    assert lines[-1] == "ci: 8 passed, 1 failed, 0 skipped"


@pytest.mark.parametrize(
    ("broken", "names"),
    [
        ({"npm": "exit 1"}, {"clients", "docs", "browser"}),
        ({"chromium": ""}, {"browser"}),
        ({"chromium": "", "id": "echo 0", "apt-get": "exit 100"}, {"browser"}),
    ],
    ids=["no npm registry", "no Chromium", "no Debian mirror"],
)
def test_step_that_cannot_run_is_reported_as_skipped(
    tmp_path: Path, broken: dict[str, str], names: set[str]
) -> None:
    done = run(tmp_path, **broken)
    lines = done.stdout.splitlines()
    assert done.returncode == 0, done.stderr
    assert {line.split(": ")[1] for line in lines if ": skipped, " in line} == names
    assert lines[-1] == f"ci: {9 - len(names)} passed, 0 failed, {len(names)} skipped"


def test_run_without_an_environment_or_interrupted_has_failed(tmp_path: Path) -> None:
    done = run(tmp_path, pip="exit 1")
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        1,
        "ci: 0 passed, 1 failed, 0 skipped",
    )
    for name in TOOLS:
        (tmp_path / name).unlink()
    done = run(tmp_path, pip="true", nox='[ "$2" != types ] || kill -TERM $PPID')
    assert (done.returncode, done.stdout.splitlines()[-1]) == (
        143,
        "ci: 2 passed, 1 failed, 0 skipped",
    )
