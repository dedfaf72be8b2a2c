import pytest

from trio_gateway.core.close_codes import Close, Rejected

# The contract's table, section 1.
CODES = {
    "NORMAL": 1000,
    "GOING_AWAY": 1001,
    "PROTOCOL_ERROR": 1002,
    "INVALID_DATA": 1007,
    "UNSUPPORTED_DATA": 1003,
    "POLICY_VIOLATION": 1008,
    "MESSAGE_TOO_BIG": 1009,
    "INTERNAL_ERROR": 1011,
    "SERVER_OVERLOADED": 1013,
    "AUTH_FAILED": 4001,
    "FORBIDDEN": 4003,
    "HEARTBEAT_TIMEOUT": 4008,
    "SLOW_CONSUMER": 4009,
    "RATE_LIMITED": 4029,
}
NEVER_SENT = {"NO_STATUS": 1005, "ABNORMAL": 1006}  # RFC 6455, 7.4.1


def test_the_codes_are_the_contracts() -> None:
    assert {close.name: int(close) for close in Close} == CODES | NEVER_SENT


@pytest.mark.parametrize("close", [Close.AUTH_FAILED, Close.FORBIDDEN])
def test_a_refusal_has_a_code_for_the_client_and_a_label_for_the_metric(close: Close) -> None:
    refusal = Rejected(close, "token expired", "auth")

    assert (refusal.close, refusal.text, refusal.label) == (close, "token expired", "auth")
    assert str(refusal) == "token expired"
