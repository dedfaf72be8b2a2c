"""The operations listener: metrics and health details on a separate address, over plain HTTP.

With ``WS_OPERATIONS_BIND`` they are served there and not to clients.
"""

import socket
from functools import partial
from typing import Any, Final, NoReturn

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from quart_trio import QuartTrio

from ..transports.listener import Listener
from ..transports.tcp import TcpConnection

PATHS: Final = frozenset({"/ws/metrics", "/ws/health/detailed"})
_ON_BOTH: Final = frozenset({"/ws/health", "/ws/health/ready"})  # served by both listeners
_OPERATIONS: Final = "operations"  # key in the ASGI state of this listener's requests
_BACKLOG: Final = 100


def is_operations_request(scope: Any) -> bool:
    """Whether a request came through the operations listener."""
    return _OPERATIONS in (scope.get("state") or {})


def is_hidden(scope: Any, path: str) -> bool:
    """Whether the listener through which a request came does not serve this path."""
    return path not in PATHS | _ON_BOTH if is_operations_request(scope) else path in PATHS


class CannotListen(Exception):  # noqa: N818 - reads better where it is raised
    """Listening on ``WS_OPERATIONS_BIND`` failed; the text gives the reason."""


def open_listeners(bind: str, write_timeout: float) -> list[Listener]:
    """Listen on ``host:port``. Raises :exc:`CannotListen`.

    Each worker has its own listener (SO_REUSEPORT), and any of them may answer.
    """
    try:
        return _listeners(bind, write_timeout)
    except OSError as error:
        raise CannotListen(f"can't listen on WS_OPERATIONS_BIND {bind}: {error}") from None


def _listeners(bind: str, write_timeout: float) -> list[Listener]:
    host, _, port = bind.rpartition(":")
    found = []
    for family, kind, protocol, _, address in socket.getaddrinfo(
        host.strip("[]"), port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    ):
        opened = socket.socket(family, kind, protocol)
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if hasattr(socket, "SO_REUSEPORT"):
                opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            if family == socket.AF_INET6:
                opened.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            opened.bind(address)
            opened.listen(_BACKLOG)
        except OSError:
            opened.close()
            raise
        found.append(Listener(trio.socket.from_stdlib_socket(opened), write_timeout))
    return found


async def serve(app: QuartTrio, listeners: list[Listener]) -> NoReturn:
    """Serve the app on these listeners; returns only when cancelled."""
    config = Config()
    config.alpn_protocols = ["http/1.1"]
    config.include_server_header = False
    config.errorlog = None
    handler = partial(
        TcpConnection,
        ASGIWrapper(app),
        config,
        WorkerContext(None),
        {_OPERATIONS: True},
        serves_clients=False,
    )
    await trio.serve_listeners(handler, listeners)
    raise AssertionError("unreachable")
