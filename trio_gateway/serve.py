"""Serving: Hypercorn's Trio server in this process, ended by signals, with true exit statuses."""

import os
import signal
from pathlib import Path
from typing import Final

import click
import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from hypercorn.utils import LifespanFailureError

from .edges import line
from .gateway import Gateway

log = structlog.get_logger()

DEFAULT_BIND: Final = "0.0.0.0:8001"


class BadConfig(ValueError):  # noqa: N818 - reads better where it is raised
    """Hypercorn's configuration can't be used; the text says why."""


def read_config(path: Path | None, binds: tuple[str, ...] = ()) -> Config:
    """Hypercorn's configuration from a TOML file, or what hypercorn.toml says if there is none.

    Raises :exc:`BadConfig`.
    """
    if path is None:
        config = Config()
        config.bind = [DEFAULT_BIND]
        config.worker_class = "trio"
        config.backlog = 4096
        config.alpn_protocols = ["http/1.1"]
        config.graceful_timeout = 5
        config.websocket_ping_interval = 25
    else:
        try:
            config = Config.from_toml(path)
        except (OSError, ValueError) as error:
            raise BadConfig(f"{path}: {error}") from None
    if config.worker_class != "trio":
        raise BadConfig(f'trio-gateway runs on Trio only: worker_class = "trio" in {path}')
    if config.workers > 1:
        raise BadConfig("serve runs one worker: workers = 1, or use the hypercorn command")
    if binds:
        config.bind = list(binds)
    return config


def run(app: Gateway, config: Config) -> int:
    """Serve until SIGTERM or SIGINT; returns the exit status: 0, or 1 after a failure."""
    line.install()
    try:
        trio.run(_serve, app, config)
    except BaseException as error:
        for failure in _leaves(error):
            match failure:
                case OSError():
                    where = ", ".join(config.bind)
                    click.echo(
                        f"trio-gateway: can't serve on {where}: {failure.strerror}", err=True
                    )
                case LifespanFailureError():
                    pass  # logged where it happened
                case _:
                    raise
        return 1
    return 0


async def _serve(app: Gateway, config: Config) -> None:
    asked = trio.Event()

    async def shutdown_trigger() -> None:
        # Hypercorn stops accepting when this returns: until then HTTP answers "draining".
        await asked.wait()
        await app.drain()

    async with trio.open_nursery() as nursery:

        async def heed_signals() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for number in signals:
                    if asked.is_set():
                        log.warning("stopping at once", signal=signal.Signals(number).name)
                        nursery.cancel_scope.cancel()
                        return
                    log.info("stopping", signal=signal.Signals(number).name)
                    asked.set()

        nursery.start_soon(heed_signals)
        log.info("starting", pid=os.getpid(), bind=config.bind)
        await hypercorn_serve(app, config, shutdown_trigger=shutdown_trigger, mode="asgi")
        nursery.cancel_scope.cancel()


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]
