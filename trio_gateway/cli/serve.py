"""``serve``: run the gateway."""

import gc
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
    help="Hypercorn's TOML file  [default: hypercorn.toml, if it exists]",
)
@click.option("-b", "--bind", multiple=True, help="host:port, unix:path or fd://num; repeatable")
@click.option("-w", "--workers", type=click.IntRange(min=1), help="Number of processes")
@click.option(
    "--own-ports",
    is_flag=True,
    help="The first worker has the port of --bind, the second the next one, and so on",
)
@click.option("--insecure-bind", multiple=True, hidden=True)
@click.option("--loads", hidden=True)
@click.option("--supervisor", type=int, hidden=True)
def serve(
    config: Path | None,
    bind: tuple[str, ...],
    insecure_bind: tuple[str, ...],
    workers: int | None,
    own_ports: bool,
    loads: str | None,
    supervisor: int | None,
) -> None:
    """Run the gateway until SIGTERM or Ctrl-C.

    With several workers, SIGHUP replaces them one by one, and a worker that fails is restarted.
    A proxy can address each worker only with --own-ports.
    """
    gc.disable()  # looking for garbage, of which imports make none, is a fifth of the start
    import structlog

    from .. import serve as serving
    from ..gateway import create_app
    from ..settings import DEVELOPMENT_SECRET, InvalidSettings, load_settings
    from ..telemetry import logs, output

    gc.freeze()
    gc.enable()
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
            # Each worker reads ``.env`` itself when it starts. A secret that is not set is random,
            # and must be the same in all workers.
            env = {DEVELOPMENT_SECRET: secrets.token_urlsafe()} | os.environ
            arguments = [] if config is None else ["--config", str(config)]
            try:
                sys.exit(serving.supervise(hypercorn, arguments, env, own_ports=own_ports))
            except serving.BadConfig as bad:
                misused([str(bad)])
    sys.exit(serving.run(app, hypercorn, supervisor, loads))


def _refuse(problems: Sequence[str], supervisor: int | None) -> NoReturn:
    """Exit with status 2. A worker sends its problems to the supervisor, which logs them."""
    if supervisor is None:
        misused(problems)
    with suppress(OSError):  # it may be gone
        os.write(supervisor, "\n".join(problems).encode(errors="replace"))
    sys.exit(MISUSED)
