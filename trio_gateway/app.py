"""``app``, for the hypercorn command: ``hypercorn -c hypercorn.toml trio_gateway.app:app``.

Importing this module sets up the process: it reads the settings, exits with status 2 if they are
invalid, replaces stdout and stderr, and patches Hypercorn. To embed a gateway, call
:func:`trio_gateway.gateway.create_app` instead.
"""

import sys

import structlog

from .gateway import Gateway, create_app
from .serve import handle_signals_in_master, tune_gc
from .settings import InvalidSettings, load_settings
from .telemetry import logs, output
from .transports import tcp

__all__ = ["app"]


def _from_environment() -> Gateway:
    output.replace("stdout", "stderr")
    try:
        settings = load_settings()
        gateway = create_app(settings)
    except InvalidSettings as invalid:
        for problem in invalid.problems:
            print(f"trio-gateway: {problem}", file=sys.stderr)  # noqa: T201 - before there are logs
        raise SystemExit(2) from None
    logs.set_up(settings)
    log = structlog.get_logger()
    for warning in settings.warnings:
        log.warning(warning)
    tcp.install(settings.ws_write_timeout)
    tune_gc()
    handle_signals_in_master(gateway)
    return gateway


app = _from_environment()
