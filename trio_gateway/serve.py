"""Serving: run Hypercorn's Trio server in this process, with signals and exit statuses."""

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
from .worker_listeners import BadAddress

log = structlog.get_logger()

DEFAULT_BIND: Final = "0.0.0.0:8001"
_LAST_PORT: Final = 65_535
_HTTP_GRACE: Final = 0.5  # seconds at least for HTTP responses, however long the drain took


class BadConfig(ValueError):  # noqa: N818 - reads better where it is raised
    """Hypercorn's configuration is invalid; the text says why."""


def read_config(
    path: Path | None, binds: tuple[str, ...] = (), insecure_binds: tuple[str, ...] = ()
) -> Config:
    """Read Hypercorn's configuration from a TOML file; without one, use that of hypercorn.toml.

    ``binds`` and ``insecure_binds`` replace those of the file. Raises :exc:`BadConfig`.
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
    # 0 makes the hypercorn command serve in its own process, which we always do.
    config.workers = max(1, config.workers)
    if binds:
        config.bind = list(binds)
    if insecure_binds:
        config.insecure_bind = list(insecure_binds)
    for bind in [*config.bind, *config.insecure_bind]:
        port = bind.rpartition(":")[2]
        if not bind.startswith(("unix:", "fd:")) and port.isdecimal() and int(port) > _LAST_PORT:
            raise BadConfig(f"can't serve on {bind}: a port is at most {_LAST_PORT}")
    return config


def tune_gc() -> None:
    """Exclude the objects that exist now from garbage collection, and collect the rest less often.

    Each accept creates hundreds of objects that stay. With the default thresholds, traversing them
    is a third of the cost of an accept, and all clients wait during a full collection.
    """
    gc.collect()
    gc.freeze()
    # Objects survive one young collection and are then ignored until a full one, which is rare, so
    # pauses do not grow with the number of clients. A client leaves no garbage for a second one.
    gc.set_threshold(10_000, 8_000, 1)


def run(
    app: Gateway, config: Config, supervisor: int | None = None, loads: str | None = None
) -> int:
    """Serve until SIGTERM, SIGINT or SIGHUP; return the exit status: 0, or 1 after a failure.

    Arguments:
        supervisor: the descriptor of a socket to the supervisor, if this process is one of its
            workers. The worker reports there that it is ready, and stops when the socket closes.
        loads: the descriptor of the workers' loads and the slot of this worker, as ``5:0``; see
            :mod:`.transports.accepting`.
    """
    tcp.install(app.settings.ws_write_timeout)
    tune_gc()
    _configure(app, config)
    config.workers = 1  # for any other number, Hypercorn would warn
    try:
        trio.run(_serve, app, config, supervisor, loads)
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


def _configure(app: Gateway, config: Config) -> None:
    """Apply Hypercorn's settings to the gateway, and the gateway's to Hypercorn."""
    app.parts.drain.patience = config.graceful_timeout
    if config.logger_class is hypercorn.logging.Logger and config.statsd_host is None:
        config.logger_class = logs.HypercornLogger
    # Hypercorn pings the WebSockets that it serves itself.
    config.websocket_ping_interval = app.settings.ws_ping_interval


def handle_signals_in_master(app: Gateway) -> None:
    """Make ``hypercorn`` with ``workers = 0`` handle signals as :func:`run` does.

    Its master then serves in its own process and installs no signal handlers: SIGTERM would end it
    without closing a connection. With workers, Hypercorn stops them itself, and that stays as it
    is.
    """
    hypercorns_own = hypercorn.trio.run.worker_serve

    async def worker_serve(
        wrapped: Any, config: Config, *, shutdown_trigger: Any = None, **options: Any
    ) -> None:
        _configure(app, config)
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


def supervise(
    config: Config, arguments: Sequence[str], env: Mapping[str, str], *, own_ports: bool = False
) -> int:
    """Serve with ``config.workers`` processes; return the exit status.

    Raises :exc:`BadConfig` if the workers can't have ports of their own.
    """
    try:
        return workers.supervise(config, arguments, config.workers, env, own_ports=own_ports)
    except BadAddress as error:
        raise BadConfig(str(error)) from None
    except OSError as error:
        return _cannot_serve(config, error)


def _cannot_serve(config: Config, error: OSError) -> int:
    where = error.filename or ", ".join(config.bind)
    click.echo(f"trio-gateway: can't serve on {where}: {error.strerror}", err=True)
    return 1


def shutdown_signals() -> list[signal.Signals]:
    """The signals that start a graceful shutdown.

    A single process has no workers to replace at SIGHUP: it treats it like SIGTERM, unless the
    signal is ignored (nohup).
    """
    found = [signal.SIGTERM, signal.SIGINT]
    hup = getattr(signal, "SIGHUP", None)  # not on Windows
    return found if hup is None or signal.getsignal(hup) == signal.SIG_IGN else [*found, hup]


async def _serve(
    app: Gateway,
    config: Config,
    supervisor: int | None,
    loads: str | None = None,
    server: Callable[..., Awaitable[None]] | None = None,
) -> None:
    """Serve with Hypercorn's ``server`` until a signal arrives or the supervisor is gone."""
    server = server or partial(hypercorn_serve, app, config, mode="asgi")
    stopping = trio.Event()

    async def shutdown_trigger() -> None:
        # Hypercorn stops accepting when this returns. Until then HTTP requests are answered.
        await stopping.wait()
        began = trio.current_time()
        await app.drain()
        # Hypercorn's timeout for HTTP clients begins only now: set it to the rest of ours.
        left = config.graceful_timeout - (trio.current_time() - began)
        config.graceful_timeout = max(_HTTP_GRACE, left)

    failed = False

    async def stop_on_bug(work: Callable[..., Awaitable[None]], *arguments: Any) -> None:
        """Run a task along with the server; a bug in it stops the server, after a drain."""
        nonlocal failed
        try:
            await work(*arguments)
        except Exception:
            log.critical("stopped by a bug", exc_info=True)
            failed = True
            stopping.set()

    async with trio.open_nursery() as nursery:

        async def handle_signals() -> None:
            with trio.open_signal_receiver(*shutdown_signals()) as signals:
                async for number in signals:
                    if stopping.is_set():
                        log.warning("stopping at once", signal=signal.Signals(number).name)
                        nursery.cancel_scope.cancel()
                        return
                    log.info("stopping", signal=signal.Signals(number).name)
                    stopping.set()

        async def report_ready(link: trio.SocketStream) -> None:
            while not app.ready:  # noqa: ASYNC110 - readiness depends on several parts
                await trio.sleep(0.05)
            with suppress(trio.BrokenResourceError):
                await link.send_all(workers.READY)

        async def watch_supervisor(link: trio.SocketStream) -> None:
            with suppress(trio.BrokenResourceError):
                await link.receive_some(
                    1
                )  # the supervisor sends nothing; this returns when the socket closes
            log.warning("supervisor is gone")
            stopping.set()

        nursery.start_soon(stop_on_bug, handle_signals)
        if supervisor is not None:
            ours = trio.socket.from_stdlib_socket(socket.socket(fileno=supervisor))
            link = trio.SocketStream(ours)
            nursery.start_soon(stop_on_bug, report_ready, link)
            nursery.start_soon(stop_on_bug, watch_supervisor, link)
        if loads is not None:
            descriptor, slot = map(int, loads.split(":"))
            balancer = AcceptBalancer(WorkerLoads(descriptor), slot, app.parts.load)
            balancer.install()
            nursery.start_soon(stop_on_bug, balancer.keep_published)
        log.info("starting", pid=os.getpid(), bind=config.bind)
        await server(shutdown_trigger=shutdown_trigger)
        nursery.cancel_scope.cancel()
    if failed:
        raise LifespanFailureError("serving", "stopped by a bug")
