"""Liveness: when a client must be heard again, and whether it shows that it is there."""

from dataclasses import dataclass

from ..core.close_codes import Close
from .socket import Ping, Pong, Socket


@dataclass(frozen=True, slots=True)
class ConnectionLimits:
    """The limits for one client, in seconds, bytes and numbers of messages."""

    stale_after: float = 60
    receive_timeout: float = 90
    write_timeout: float = 10
    rate_limit: int = 20
    rate_window: float = 1.0
    outbox_bytes: int = 1_048_576
    outbox_messages: int = 1000


class Liveness:
    """What is known of one client's life; times are on Trio's clock.

    ``heard_at`` is when it sent something that counts as a heartbeat, ``received_at`` when it sent
    anything, and ``expires_at`` the end of its credential.
    """

    __slots__ = (
        "_acked", "_limits", "_ping_at", "expires_at", "heard_at", "is_asked", "received_at",
    )  # fmt: skip

    def __init__(self, limits: ConnectionLimits, expires_at: float) -> None:
        self._limits = limits
        self.expires_at = expires_at
        self.heard_at = self.received_at = 0.0
        self.is_asked = False  # pinged by ask(), and nothing received since
        self._acked = 0  # bytes, when it was pinged
        self._ping_at = 0  # bytes that are acknowledged once the ping has arrived

    @property
    def deadline(self) -> float:
        """When it is closed if nothing more is received."""
        return min(
            self.heard_at + self._limits.stale_after,
            self.received_at + self._limits.receive_timeout,
            self.expires_at,
        )

    def overdue(self, now: float) -> tuple[Close, str] | None:
        """Why it is to be closed if a deadline has passed: the code and the reason."""
        if now >= self.expires_at:
            return Close.AUTH_FAILED, "token expired"
        if now >= self.heard_at + self._limits.stale_after:
            return Close.HEARTBEAT_TIMEOUT, "no heartbeat"
        if now >= self.received_at + self._limits.receive_timeout:
            return Close.HEARTBEAT_TIMEOUT, "nothing received"
        return None

    def receive(self, said: str | Ping | Pong, now: float) -> bool:
        """Note that something was received; return whether it answers :meth:`ask`.

        Such a pong was caused by others, so it counts neither as a message nor for the rate.
        """
        self.received_at = now
        was_asked, self.is_asked = self.is_asked, False
        return was_asked and isinstance(said, Pong)

    def ask(self, socket: Socket, waiting: int) -> None:
        """It is sent a ping, behind this many bytes in its outbox, to see whether it is there."""
        self.is_asked = True
        self._acked, outstanding = socket.traffic()
        self._ping_at = self._acked + outstanding + waiting

    def is_there(self, socket: Socket, waiting: int) -> bool:
        """Whether it has shown since :meth:`ask` that it is there.

        By anything that was received; or, where the ping could not reach it, by what its side of
        the TCP connection acknowledges: where nobody can ask the client, it has acknowledged all
        that it was sent.
        """
        if not self.is_asked:
            return True
        acked, outstanding = socket.traffic()
        if socket.answers_pings:  # the ping may be behind what it takes slowly
            return self._acked < acked < self._ping_at
        return acked > self._acked or not (outstanding or waiting)
