"""Free ports of this machine for servers."""

import random
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager


def free_port() -> int:
    """Return a free port below the range that the kernel gives to clients.

    A client that connects to an unused port of that range can get that port as its own, and is
    then connected to itself.
    """
    return free_ports(1)


def free_ports(count: int) -> int:
    """Return the first of this many free ports in a row."""
    with reserved_ports(count) as first:
        return first


@contextmanager
def reserved_ports(count: int) -> Iterator[int]:
    """The first of this many free ports in a row; in the block nobody else takes them for free.

    A socket that is bound and does not listen keeps each of them. A server with SO_REUSEADDR can
    still listen there, and while it does not, connections are refused.
    """
    with ExitStack() as stack:
        first = None
        while first is None:
            first = _reserve(count, stack)
        yield first


def _reserve(count: int, stack: ExitStack) -> int | None:
    first = random.randrange(20_000, 32_000)  # noqa: S311 - not a secret
    with ExitStack() as tried:
        for port in range(first, first + count):
            keeper = tried.enter_context(socket.socket())
            try:
                keeper.bind(("127.0.0.1", port))
            except OSError:
                return None
            # Only now: with it, the bind would succeed beside that of another one that reserves.
            keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        stack.enter_context(tried.pop_all())
    return first
