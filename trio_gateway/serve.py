"""Serving: Hypercorn's Trio server in this process, ended by signals, with true exit statuses."""

import gc
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, Final

import click
import hypercorn.logging
import hypercorn.trio.run
import structlog
import trio
from hypercorn.config import Config
from hypercorn.trio import serve as hypercorn_serve
from hypercorn.utils import LifespanFailureError

from . import workers
from .core.exception_groups import leaves
from .gateway import Gateway
from .telemetry import logs
from .transports import tcp
from .transports.accepting import AcceptBalancer, WorkerLoads

log = structlog.get_logger()

DEFAULT_BIND: Final = "0.0.0.0:8001"
_LAST_PORT: Final = 65_535
_LAST_WORDS: Final = 0.5  # seconds for HTTP answers, however long the drain took


class BadConfig(ValueError):  # noqa: N818 - reads better where it is raised
    """Hypercorn's configuration can't be used; the text says why."""


def read_config(
    path: Path | None, binds: tuple[str, ...] = (), insecure_binds: tuple[str, ...] = ()
) -> Config:
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
        config.keep_alive_timeout = 15
        config.websocket_max_message_size = 65_536
        config.websocket_ping_interval = 25
        config.include_server_header = False
    else:
        try:
            config = Config.from_toml(path)
        except (OSError, ValueError) as error:
            raise BadConfig(f"{path}: {error}") from None
    if config.worker_class != "trio":
        raise BadConfig(f'trio-gateway runs on Trio only: worker_class = "trio" in {path}')
    # 0 is for the hypercorn command: its master then serves by itself, as we do.
    config.workers = max(1, config.workers)
    if binds:
        config.bind = list(binds)
    if insecure_binds:
        config.insecure_bind = list(insecure_binds)
    for bind in [*config.bind, *config.insecure_bind]:
        port = bind.rpartition(":")[2]
        if not bind.startswith(("unix:", "fd:")) and port.isdecimal() and int(port) > _LAST_PORT:
            raise BadConfig(f"can't serve on {bind}: there is no such port")
    return config


def tune_gc() -> None:
    """Let the garbage collector leave alone what stays for ever, and look less often at the rest.

    Each accept makes hundreds of objects that live on: with the usual thresholds a third of its
    cost is looking through them all again, and a full collection stops every client for as long.
    """
    gc.collect()
    gc.freeze()
    # What is young is looked at twice and then left alone, so a pause is short however many have
    # come; a middle generation of twenty times as much would cost the same in one piece.
    gc.set_threshold(10_000, 1, 4_000)


def run(
    app: Gateway, config: Config, supervisor: int | None = None, board: str | None = None
) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; returns the exit status: 0, or 1 after a failure.

    ``supervisor`` is a socket to who started us as one of several: it is told when we are ready,
    and when it is gone we stop, too. ``board`` is a descriptor and a slot, see
    :mod:`.transports.accepting`: ``5:0``.
    """
    tcp.install()
    tune_gc()
    _fit(app, config)
    config.workers = 1  # of a file for several, Hypercorn would warn
    try:
        trio.run(_serve, app, config, supervisor, board)
    except BaseException as error:
        for failure in leaves(error):
            match failure:
                case OSError():
                    _cannot_serve(config, failure)
                case LifespanFailureError():
                    pass  # logged where it happened
                case _:
                    raise
        return 1
    return 0


def _fit(app: Gateway, config: Config) -> None:
    """Let the gateway and Hypercorn agree."""
    app.parts.drain.patience = config.graceful_timeout
    if config.logger_class is hypercorn.logging.Logger and config.statsd_host is None:
        config.logger_class = logs.HypercornLogger
    # Hypercorn pings the WebSockets that it serves itself.
    config.websocket_ping_interval = app.settings.ws_ping_interval


def heed_signals_in_master(app: Gateway) -> None:
    """Make ``hypercorn`` with ``workers = 0`` end as :func:`run` does.

    Its master then serves in its own process, and would heed no signal: SIGTERM would end it
    without a word to any client. With workers it has a way to tell them, which stays as it is.
    """
    hypercorns_own = hypercorn.trio.run.worker_serve

    async def worker_serve(
        wrapped: Any, config: Config, *, shutdown_trigger: Any = None, **options: Any
    ) -> None:
        _fit(app, config)
        server = partial(hypercorns_own, wrapped, config, **options)
        if shutdown_trigger is not None:
            await server(shutdown_trigger=shutdown_trigger)
            return
        try:
            await _serve(app, config, None, None, server)
        except BaseException as error:
            if all(isinstance(failure, LifespanFailureError) for failure in leaves(error)):
                raise SystemExit(1) from None  # logged where it happened
            raise

    vars(hypercorn.trio.run)["worker_serve"] = worker_serve


def supervise(config: Config, arguments: Sequence[str], env: Mapping[str, str]) -> int:
    """Serve with ``config.workers`` processes; returns the exit status."""
    try:
        return workers.supervise(config, arguments, config.workers, env)
    except OSError as error:
        return _cannot_serve(config, error)


def _cannot_serve(config: Config, error: OSError) -> int:
    where = ", ".join(config.bind)
    click.echo(f"trio-gateway: can't serve on {where}: {error.strerror}", err=True)
    return 1


def heeded() -> list[signal.Signals]:
    """What ends it. One process has nothing to roll at SIGHUP: it ends, too, and not in silence;
    under nohup it is to be ignored.
    """
    found = [signal.SIGTERM, signal.SIGINT]
    hup = getattr(signal, "SIGHUP", None)  # not on Windows
    return found if hup is None or signal.getsignal(hup) == signal.SIG_IGN else [*found, hup]


async def _serve(
    app: Gateway,
    config: Config,
    supervisor: int | None,
    board: str | None = None,
    server: Callable[..., Awaitable[None]] | None = None,
) -> None:
    """Serve with ``server``, Hypercorn's, until a signal or the supervisor says to stop."""
    server = server or partial(hypercorn_serve, app, config, mode="asgi")
    asked = trio.Event()

    async def shutdown_trigger() -> None:
        # Hypercorn stops accepting when this returns: until then HTTP answers "draining".
        await asked.wait()
        began = trio.current_time()
        await app.drain()
        # Its patience with HTTP clients begins only now: it is what is left of the one there is.
        left = config.graceful_timeout - (trio.current_time() - began)
        config.graceful_timeout = max(_LAST_WORDS, left)

    failed = False

    async def beside(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """A bug beside the server ends it as one inside does: when every client has been told."""
        nonlocal failed
        try:
            await work(*arguments)
        except Exception:
            log.critical("stopped by a bug", exc_info=True)
            failed = True
            asked.set()

    async with trio.open_nursery() as nursery:

        async def heed_signals() -> None:
            with trio.open_signal_receiver(*heeded()) as signals:
                async for number in signals:
                    if asked.is_set():
                        log.warning("stopping at once", signal=signal.Signals(number).name)
                        nursery.cancel_scope.cancel()
                        return
                    log.info("stopping", signal=signal.Signals(number).name)
                    asked.set()

        async def tell_supervisor(link: trio.SocketStream) -> None:
            while not app.ready:  # noqa: ASYNC110 - it depends on many things, and is asked once
                await trio.sleep(0.05)
            with suppress(trio.BrokenResourceError):
                await link.send_all(workers.READY)

        async def heed_supervisor(link: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                await link.receive_some(1)  # it never says anything
            log.warning("supervisor is gone")
            asked.set()

        nursery.start_soon(beside, heed_signals)
        if supervisor is not None:
            ours = trio.socket.from_stdlib_socket(socket.socket(fileno=supervisor))
            link = trio.SocketStream(ours)
            nursery.start_soon(beside, tell_supervisor, link)
            nursery.start_soon(beside, heed_supervisor, link)
        if board is not None:
            descriptor, slot = map(int, board.split(":"))
            balancer = AcceptBalancer(WorkerLoads(descriptor), slot, app.parts.load)
            balancer.install()
            nursery.start_soon(beside, balancer.keep_published)
        log.info("starting", pid=os.getpid(), bind=config.bind)
        await server(shutdown_trigger=shutdown_trigger)
        nursery.cancel_scope.cancel()
    if failed:
        raise LifespanFailureError("serving", "stopped by a bug")
