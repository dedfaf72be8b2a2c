"""Relays in front of the servers of a set, so that a test can split the network between them."""

from collections.abc import Callable

#: Puts a relay in front of a port, and returns the port by which all others are to know it.
Front = Callable[[int], int]


def no_front(port: int) -> int:
    """The port itself: nothing is in front of it."""
    return port


def source_of(front: Front, number: int) -> str | None:
    """The address from which a server connects, so that relays know it from others; or None."""
    return None if front is no_front else f"127.0.0.{2 + number}"
