"""The command line."""

import sys
from pathlib import Path

import click

from . import __version__, logs
from .settings import InvalidSettings, Settings, load_settings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="trio-gateway")
def main() -> None:
    """A real-time gateway: events from Redis to the WebSocket clients that may hear them."""


def settings_or_exit() -> Settings:
    """The settings, or exit status 2 with a line per problem."""
    try:
        return load_settings()
    except InvalidSettings as invalid:
        for problem in invalid.problems:
            click.echo(f"trio-gateway: {problem}", err=True)
        sys.exit(2)


@main.command()
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

    from . import serve as serving
    from .gateway import create_app

    settings = settings_or_exit()
    if config is None and Path("hypercorn.toml").exists():
        config = Path("hypercorn.toml")
    try:
        hypercorn = serving.read_config(config, bind)
    except serving.BadConfig as bad:
        click.echo(f"trio-gateway: {bad}", err=True)
        sys.exit(2)
    logs.set_up(settings)
    for warning in settings.warnings:
        structlog.get_logger().warning(warning)
    sys.exit(serving.run(create_app(settings), hypercorn))
