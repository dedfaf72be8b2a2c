"""The probe: a message that is published on one connection and must come back on another.

A connection can go on answering and lead to the wrong server: a name that leads to another one by
now, a node that its Cluster has forgotten. Two connections between which a message passes lead to
the same Redis, or to the same Cluster.
"""

import math
import secrets
from contextlib import suppress
from typing import Any, Final

import hiredis
import structlog

log = structlog.get_logger()

PREFIX: Final = "gateway:probe:"
EVERY: Final = 2.0  # seconds from one probe to the next
PATIENCE: Final = 1.0  # seconds until a probe should have come back


class Probe:
    """The probes of one process, and whether they come back. Times are seconds of Trio's clock.

    It is given up for good, with one warning, if Redis allows the user no such channel. Without a
    ``channel`` it has one of its own.
    """

    def __init__(self, channel: str | None = None) -> None:
        self.channel = (channel or f"{PREFIX}{secrets.token_hex(8)}").encode()
        self.is_wanted = True
        self._is_listening = False
        self._sent = 0  # the number of the last probe; each is published with its number
        self._is_expected = False  # the last one was sent while the channel was subscribed
        self._came_back = 0  # the highest number that did
        self._due = math.inf  # the probes that are on their way must be back by then

    def next_command(self) -> tuple[str, bytes, int]:
        """The command that publishes the next probe, to be sent now."""
        self._sent += 1
        self._is_expected = self._is_listening
        return ("PUBLISH", self.channel, self._sent)

    def listens(self, listens: bool) -> None:
        """The channel is subscribed, or not any more."""
        self._is_listening = listens
        self._is_expected = False
        self._due = math.inf

    def published(self, reply: Any, now: float) -> None:
        """Note the reply to the last :meth:`next_command`, which came at ``now``.

        The probe itself may have come back before, on the other connection.
        """
        if is_refused(reply):
            self.give_up()
        elif self._is_expected and isinstance(reply, int) and self._came_back < self._sent:
            self._due = min(self._due, now + PATIENCE)

    def came_back(self, payload: bytes) -> None:
        """Note that a probe came back, with its number; those before it did, or never will."""
        with suppress(ValueError):  # somebody else's message
            self._came_back = max(self._came_back, int(payload))
            self._due = math.inf

    @property
    def due(self) -> float:
        """When a probe must have come back; infinite if none is on its way."""
        return self._due

    def give_up(self) -> None:
        """Do without: the user has no right to the channel."""
        if self.is_wanted:
            self.is_wanted, self._due = False, math.inf
            log.warning(
                "no probes: a connection that leads to a wrong server may not be noticed;"
                f" grant the Redis user &{PREFIX}* +publish +subscribe"
            )


def is_refused(reply: Any) -> bool:
    """Whether this reply says that the user lacks a right."""
    return isinstance(reply, hiredis.ReplyError) and str(reply).startswith("NOPERM")
