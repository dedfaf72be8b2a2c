"""How a connection ends: the contract's close codes, and the refusal that carries one."""

from enum import IntEnum


class Close(IntEnum):
    """Close codes (RFC 6455, 7.4; 4000 and up are the gateway's own)."""

    NORMAL = 1000
    GOING_AWAY = 1001
    PROTOCOL_ERROR = 1002
    UNSUPPORTED_DATA = 1003
    NO_STATUS = 1005  # never sent: the client's close frame carried no code
    ABNORMAL = 1006  # never sent: the client went without a close frame
    INVALID_DATA = 1007
    POLICY_VIOLATION = 1008
    MESSAGE_TOO_BIG = 1009
    INTERNAL_ERROR = 1011
    SERVER_OVERLOADED = 1013
    AUTH_FAILED = 4001
    FORBIDDEN = 4003
    HEARTBEAT_TIMEOUT = 4008
    SLOW_CONSUMER = 4009
    RATE_LIMITED = 4029


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
