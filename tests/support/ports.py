"""Ports on this machine."""

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """A free port below the range that the kernel gives to clients.

    A client that connects to a port of that range on which nobody listens could be given that
    port itself, and be connected to itself.
    """
    while True:
        port = random.randrange(20_000, 32_000)
        with socket.socket() as probe, suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            return port
