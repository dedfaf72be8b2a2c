"""How a connection ends: the contract's close codes, and the refusal that carries one."""

from collections.abc import Mapping
from enum import IntEnum
from typing import Final


class Close(IntEnum):
    """Close codes (RFC 6455, 7.4; 4000 and up are the gateway's own).

    ``when`` one is sent and what ``then`` the client should do, in the words of the contract:
    docs/protocol.md and the AsyncAPI document are made from them.
    """

    when: str
    then: str

    def __new__(cls, code: int, when: str = "", then: str = "–") -> "Close":
        close = int.__new__(cls, code)
        close._value_ = code
        close.when, close.then = when, then
        return close

    NORMAL = 1000, "it asked"
    GOING_AWAY = 1001, "shutdown; the reason is `retry in 3.2s`", "reconnect after that time"
    PROTOCOL_ERROR = 1002, "frames that break RFC 6455", "mend itself"
    UNSUPPORTED_DATA = 1003, "a binary frame", "mend itself"
    NO_STATUS = 1005  # never sent: the client's close frame carried no code
    ABNORMAL = 1006  # never sent: the client went without a close frame
    INVALID_DATA = 1007, "text that is not UTF-8", "mend itself"
    POLICY_VIOLATION = 1008, "Origin not allowed, or missing in production", "not retry"
    MESSAGE_TOO_BIG = (
        1009,
        "a message over `WS_MAX_MESSAGE_SIZE` bytes, or in more than 256 fragments",
        "not retry",
    )
    INTERNAL_ERROR = 1011, "a bug of ours", "retry with back-off"
    SERVER_OVERLOADED = (
        1013,
        (
            "a limit is reached (in all, per user, session or address, clients being admitted), "
            "or what is needed to admit it is down"
        ),
        "retry with back-off",
    )
    AUTH_FAILED = (
        4001,
        "token missing, invalid, expired, revoked",
        "not retry with the same token",
    )
    FORBIDDEN = (
        4003,
        "role not admitted here, no branch in the token, a malformed Origin",
        "not retry",
    )
    HEARTBEAT_TIMEOUT = (
        4008,
        (
            "no heartbeat for `WS_HEARTBEAT_TIMEOUT`, nothing at all for `WS_RECEIVE_TIMEOUT`, or "
            "no answer to a ping within 2 s when room is made for a new connection"
        ),
        "reconnect",
    )
    SLOW_CONSUMER = (
        4009,
        "too slow: its outbox is full, or it accepted no byte for `WS_WRITE_TIMEOUT`",
        "reconnect",
    )
    RATE_LIMITED = (
        4029,
        (
            "over `WS_MESSAGE_RATE_LIMIT` messages in `WS_MESSAGE_RATE_WINDOW`; or, at connect, "
            "`WS_MAX_FAILED_LOGINS` of its address in a minute: then the credential was not "
            "looked at"
        ),
        "cool down",
    )

    @property
    def sent(self) -> bool:
        """Whether it goes over the wire; the others are what logs and metrics call an end."""
        return bool(self.when)


# Limits that one user, session, tenant or address has reached: the server has room for others.
_OWN_LIMITS: Final = frozenset({"user_limit", "session_limit", "tenant_limit", "address_limit"})


class Rejected(Exception):  # noqa: N818 - a decision, not an error of ours
    """This client is not let in.

    ``label`` is one of a fixed few, fit for a metric; the text goes to the client and must not
    hold anything that the client sent.
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


_STATUS: Final[Mapping[int, int]] = {
    Close.GOING_AWAY: 503,
    Close.POLICY_VIOLATION: 403,
    Close.INTERNAL_ERROR: 500,
    Close.SERVER_OVERLOADED: 503,
    Close.FORBIDDEN: 403,
    Close.RATE_LIMITED: 429,
}
RETRY_AFTER: Final[Mapping[int, int]] = {503: 1, 429: 60}  # seconds, where nothing else is known
_OWN_LIMIT_AGAIN: Final = 5  # seconds: connections that are dead are found in that time


def status_of(close: int) -> int:
    """The HTTP status that refuses a client as this close code would."""
    return _STATUS.get(close, 401)


def refusal_status(rejected: Rejected) -> tuple[int, int | None]:
    """The HTTP status of a refusal, and the seconds after which to try again, if that helps.

    Load balancers take a 503 for a server that fails. What one client alone has caused is none.
    """
    if rejected.own_limit:
        return 429, _OWN_LIMIT_AGAIN
    status = status_of(rejected.close)
    return status, RETRY_AFTER.get(status)
