"""Free ports of this machine for servers."""

import random
import socket
from contextlib import ExitStack, suppress


def free_port() -> int:
    """Return a free port below the range that the kernel gives to clients.

    A client that connects to an unused port of that range can get that port as its own, and is
    then connected to itself.
    """
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of so many free ports in a row."""
    while True:
        first = random.randrange(20_000, 32_000)  # noqa: S311 - not a secret
        with ExitStack() as stack, suppress(OSError):
            for port in range(first, first + count):
                probe = stack.enter_context(socket.socket())
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", port))
            return first
