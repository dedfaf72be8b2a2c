"""``serve``: run the gateway."""

import os
import secrets
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

import click

from .errors import MISUSED, misused


@click.command()
@click.option(
    "-c",
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hypercorn's TOML file  [default: hypercorn.toml, if it is there]",
)
@click.option("-b", "--bind", multiple=True, help="host:port, unix:path or fd://num; repeatable")
@click.option("-w", "--workers", type=click.IntRange(min=1), help="Processes on one listener")
@click.option("--insecure-bind", multiple=True, hidden=True)
@click.option("--board", hidden=True)
@click.option("--supervisor", type=int, hidden=True)
def serve(
    config: Path | None,
    bind: tuple[str, ...],
    insecure_bind: tuple[str, ...],
    workers: int | None,
    board: str | None,
    supervisor: int | None,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    With several workers SIGHUP replaces them one by one, and one that dies is started again.
    """
    import structlog

    from .. import serve as serving
    from ..gateway import create_app
    from ..settings import DEVELOPMENT_SECRET, InvalidSettings, load_settings
    from ..telemetry import logs, output

    output.replace("stdout", "stderr")
    try:
        settings = load_settings()
    except InvalidSettings as invalid:
        _refuse(invalid.problems, supervisor)
    if config is None and Path("hypercorn.toml").exists():
        config = Path("hypercorn.toml")
    try:
        hypercorn = serving.read_config(config, bind, insecure_bind)
    except serving.BadConfig as bad:
        _refuse([str(bad)], supervisor)
    if workers is not None:
        hypercorn.workers = workers
    try:
        app = create_app(settings)
    except InvalidSettings as invalid:
        _refuse(invalid.problems, supervisor)
    logs.set_up(settings)
    if supervisor is None:
        for warning in settings.warnings:
            structlog.get_logger().warning(warning)
        if hypercorn.workers > 1:
            # Each worker reads ``.env`` for itself, as it is then. What was set nowhere is random,
            # and must be the same in all of them.
            env = {DEVELOPMENT_SECRET: secrets.token_urlsafe()} | os.environ
            arguments = [] if config is None else ["--config", str(config)]
            sys.exit(serving.supervise(hypercorn, arguments, env))
    sys.exit(serving.run(app, hypercorn, supervisor, board))


def _refuse(problems: Sequence[str], supervisor: int | None) -> NoReturn:
    """Exit because of these. The supervisor logs those of a worker."""
    if supervisor is None:
        misused(problems)
    with suppress(OSError):  # it may be gone
        os.write(supervisor, "\n".join(problems).encode(errors="replace"))
    sys.exit(MISUSED)
