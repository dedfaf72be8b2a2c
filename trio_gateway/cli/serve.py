"""``serve``: run the gateway."""

import sys
from pathlib import Path

import click

from .endings import misused, settings_or_exit


@click.command()
@click.option(
    "-c",
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Hypercorn's TOML file  [default: hypercorn.toml, if it is there]",
)
@click.option("-b", "--bind", multiple=True, help="host:port, unix:path or fd://num; repeatable")
def serve(config: Path | None, bind: tuple[str, ...]) -> None:
    """Run the gateway in this process until SIGTERM or Ctrl-C."""
    import structlog

    from .. import logs
    from .. import serve as serving
    from ..gateway import create_app
    from ..settings import InvalidSettings

    settings = settings_or_exit()
    if config is None and Path("hypercorn.toml").exists():
        config = Path("hypercorn.toml")
    try:
        hypercorn = serving.read_config(config, bind)
    except serving.BadConfig as bad:
        misused([str(bad)])
    try:
        app = create_app(settings)
    except InvalidSettings as invalid:
        misused(invalid.problems)
    logs.set_up(settings)
    for warning in settings.warnings:
        structlog.get_logger().warning(warning)
    sys.exit(serving.run(app, hypercorn))
