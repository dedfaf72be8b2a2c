"""The project's sessions: `nox -s tests` is the one that must pass."""

import nox

nox.options.sessions = ["lint", "types", "tests"]
nox.options.default_venv_backend = "venv"
nox.options.reuse_existing_virtualenvs = True


@nox.session
def lint(session: nox.Session) -> None:
    """Style and simple mistakes."""
    session.install("ruff>=0.6")
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", ".")


@nox.session
def types(session: nox.Session) -> None:
    """Types, strictly, of the package and its tests."""
    session.install("-e", ".[lint,test]", "nox")
    session.run("mypy")


@nox.session
def tests(session: nox.Session) -> None:
    """The three rings of tests, with branch coverage. Extra arguments go to pytest."""
    session.install("-e", ".[test]")
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", silent=True)
    if not session.posargs:
        session.run("coverage", "report")


@nox.session
def chaos(session: nox.Session) -> None:
    """Redis and the gateway are killed again and again under load; takes minutes."""
    session.install("-e", ".[test]")
    session.run("pytest", "-m", "chaos", "tests/chaos", *session.posargs)


@nox.session
def demo(session: nox.Session) -> None:
    """Everything at once on this machine, from a plain installation; Ctrl-C ends it."""
    session.install(".[demo]")
    session.run("trio-gateway", "demo", *session.posargs)
