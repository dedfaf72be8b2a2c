import pytest

from trio_gateway.core.close_codes import Close, Rejected, format_retry_hint, parse_retry_hint

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


def test_codes_are_those_of_the_contract() -> None:
    assert {close.name: int(close) for close in Close} == CODES | NEVER_SENT


@pytest.mark.parametrize("close", [Close.AUTH_FAILED, Close.FORBIDDEN])
def test_a_refusal_has_a_code_for_the_client_and_a_label_for_the_metric(close: Close) -> None:
    refusal = Rejected(close, "token expired", "auth")

    assert (refusal.close, refusal.text, refusal.label) == (close, "token expired", "auth")
    assert str(refusal) == "token expired"


@pytest.mark.parametrize(
    ("reason", "seconds"),
    [("retry in 3.2s", 3.2), ("retry in 0.0s", 0), ("busy, retry in 10s", 10), ("", None),
     ("retry in -1s", None)],
)  # fmt: skip
def test_hint_is_read_from_the_reason(reason: str, seconds: float | None) -> None:
    assert parse_retry_hint(reason) == seconds


@pytest.mark.parametrize("seconds", [0.0, 3.2, 120.0])
def test_hint_is_read_as_it_was_written(seconds: float) -> None:
    assert parse_retry_hint(format_retry_hint(seconds)) == seconds
