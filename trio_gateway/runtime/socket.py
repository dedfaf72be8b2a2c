"""The socket: what a connection needs of a transport, and what a client can say on it."""

from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from ..core.close_codes import Close

LINGER: Final = 1.0  # seconds that the peer has to receive a close


class Ping(NamedTuple):
    """A WebSocket ping frame from the client."""

    payload: bytes


class Pong(NamedTuple):
    """A WebSocket pong frame. It is not a heartbeat: the client's library sends it."""


class Disconnected(Exception):  # noqa: N818 - an outcome
    """The client has closed, with this code and reason, or is gone: then the code is 1006."""

    def __init__(self, code: int, reason: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.reason = reason


class ProtocolViolation(Exception):  # noqa: N818 - an outcome
    """The client broke a rule of the protocol, and is to be closed with this code."""

    def __init__(self, close: Close, reason: str) -> None:
        super().__init__(reason)
        self.close = close
        self.reason = reason


class Socket(Protocol):
    """One client on some transport. All bytes are whole WebSocket frames, unmasked."""

    @property
    def is_plain(self) -> bool:
        """Whether bytes go at once if the kernel accepts them, :meth:`receive` and
        :meth:`send_some` can be cancelled and called again, and there is :meth:`interrupt`.
        """

    def try_write(self, data: bytes) -> int:
        """Hand over what can go without waiting, and return the number of bytes.

        Raises :exc:`OSError` if the client is gone.
        """

    @property
    def measures_progress(self) -> bool:
        """Whether :meth:`send_some` has a deadline of its own, because it sees what is taken."""

    async def send_some(self, head: Callable[[], memoryview]) -> int:
        """Wait until something can go, hand it over, and return the number of bytes.

        ``head`` returns what is to be sent next. It is called only when something can go, because
        frames may be discarded until then; it may return nothing. One task sends at a time.

        Raises :exc:`OSError` if the client is gone, and of these :exc:`TimeoutError` if it took
        nothing for the write timeout.
        """

    @property
    def answers_pings(self) -> bool:
        """Whether :data:`PING_FRAME` reaches the client, and its pong is received."""

    def traffic(self) -> tuple[int, int]:
        """Bytes that the peer has acknowledged, and bytes that it has yet to acknowledge.

        Zeros where the kernel does not tell.
        """

    def has_left(self) -> bool:
        """Whether the client has ended the connection, as far as that is known unread."""

    async def receive(self) -> str | Ping | Pong:
        """The next message. Raises :exc:`Disconnected` or :exc:`ProtocolViolation`."""

    def interrupt(self) -> None:
        """Let a :meth:`receive` that waits raise :exc:`Disconnected`. Call it if it is plain."""

    async def close(self, code: int, reason: str) -> None:
        """Send the close frame, and linger until it has arrived. Bounded in time."""

    def abort(self) -> None:
        """Cut the client off at once. Never raises, may be called again."""
