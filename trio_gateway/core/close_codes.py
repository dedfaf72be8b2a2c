"""How a connection ends: the contract's close codes, rejections, and hints when to retry."""

import re
from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class Close(IntEnum):
    """Close codes (RFC 6455, 7.4; 4000 and up are the gateway's own).

    ``when`` says when a code is sent, ``then`` what the client should do: docs/protocol.md and the
    AsyncAPI document are generated from them. ``status`` is the HTTP status of a response that
    rejects a client for the same reason.
    """

    when: str
    then: str
    status: int

    def __new__(cls, code: int, when: str = "", then: str = "–", status: int = 401) -> "Close":
        close = int.__new__(cls, code)
        close._value_ = code
        close.when, close.then, close.status = when, then, status
        return close

    NORMAL = 1000, "the client closed"
    GOING_AWAY = (
        1001,
        "the gateway shuts down; the reason is `retry in 3.2s`",
        "reconnect after that time",
        503,
    )
    PROTOCOL_ERROR = 1002, "frames that violate RFC 6455", "fix its code"
    UNSUPPORTED_DATA = 1003, "a binary frame", "fix its code"
    NO_STATUS = 1005  # never sent: the client's close frame carried no code
    ABNORMAL = 1006  # never sent: the connection ended without a close frame
    INVALID_DATA = 1007, "text that is not UTF-8", "fix its code"
    POLICY_VIOLATION = (
        1008,
        "the Origin is not allowed, or is missing in production",
        "not retry",
        403,
    )
    MESSAGE_TOO_BIG = (
        1009,
        "a message of more than `WS_MAX_MESSAGE_SIZE` bytes, or of more than 256 fragments",
        "not retry",
    )
    INTERNAL_ERROR = 1011, "a bug in the gateway", "retry with back-off", 500
    SERVER_OVERLOADED = (
        1013,
        (
            "a limit is reached (in total, per user, session, tenant or address, or of clients "
            "being admitted), or a service that is needed to admit the client is down"
        ),
        "retry with back-off",
        503,
    )
    AUTH_FAILED = (
        4001,
        "the token is missing, invalid, expired or revoked, or a backend disconnects the client",
        "not retry with the same token",
    )
    FORBIDDEN = (
        4003,
        "the role is not admitted here, the token has no branch, or the Origin is malformed",
        "not retry",
        403,
    )
    HEARTBEAT_TIMEOUT = (
        4008,
        (
            "no heartbeat for `WS_HEARTBEAT_TIMEOUT`, no data at all for `WS_RECEIVE_TIMEOUT`, or "
            "no pong within 2 s when room is needed for a new connection"
        ),
        "reconnect",
    )
    SLOW_CONSUMER = (
        4009,
        (
            "its kernel accepted no byte for `WS_WRITE_TIMEOUT`, the history in memory has moved "
            "past it, or it leaves too many answers unread; see Slow clients"
        ),
        "reconnect and resume",
    )
    RATE_LIMITED = (
        4029,
        (
            "more than `WS_MESSAGE_RATE_LIMIT` messages in `WS_MESSAGE_RATE_WINDOW`; or, on "
            "connect, `WS_MAX_FAILED_LOGINS` failed logins from its address in a minute: then the "
            "credential was not checked"
        ),
        "wait before it reconnects",
        429,
    )

    @property
    def sent(self) -> bool:
        """Whether the gateway sends it. The others only occur in logs and metrics."""
        return bool(self.when)


# Seconds after which to try again, by HTTP status, where nothing else is known.
RETRY_AFTER: Final[Mapping[int, int]] = {503: 1, 429: 60}
# Limits that one user, session, tenant or address has reached: the server has room for others.
_OWN_LIMITS: Final = frozenset({"user_limit", "session_limit", "tenant_limit", "address_limit"})
_OWN_LIMIT_RETRY_AFTER: Final = 5  # seconds: dead connections are found in that time


class Rejected(Exception):  # noqa: N818 - a decision, not an error of ours
    """This client is not admitted.

    ``label`` is one of a fixed few, fit for a metric; ``text`` goes to the client and must not
    contain anything that the client sent.
    """

    def __init__(self, close: Close, text: str, label: str) -> None:
        super().__init__(text)
        self.close = close
        self.text = text
        self.label = label

    @property
    def own_limit(self) -> bool:
        """Whether this client has reached a limit of its own, on a server that serves others."""
        return self.label in _OWN_LIMITS

    @property
    def status(self) -> int:
        """The HTTP status of a response that says so.

        Load balancers take a 503 for a failing server, so a limit that one client alone has
        reached is a 429.
        """
        return 429 if self.own_limit else self.close.status

    @property
    def retry_after(self) -> int | None:
        """Seconds after which to try again; None if that does not help."""
        return _OWN_LIMIT_RETRY_AFTER if self.own_limit else RETRY_AFTER.get(self.status)


def auth_failed(text: str) -> Rejected:
    """Return the rejection of a credential that is not valid, for this reason."""
    return Rejected(Close.AUTH_FAILED, text, "auth")


_RETRY_HINT: Final = re.compile(r"\bretry in (\d+(?:\.\d+)?)s")


def format_retry_hint(seconds: float) -> str:
    """The reason of a close that says when to reconnect, such as ``retry in 3.2s``."""
    return f"retry in {seconds:.1f}s"


def parse_retry_hint(reason: str) -> float | None:
    """The seconds that a close reason says to wait; None if it does not."""
    found = _RETRY_HINT.search(reason)
    return float(found[1]) if found else None
