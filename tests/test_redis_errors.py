"""What is logged of a command that failed."""

import pytest
from redis.exceptions import InvalidResponse, NoPermissionError, RedisError, ResponseError

from trio_gateway.redis_errors import describe


@pytest.mark.parametrize(
    ("error", "found"),
    [
        (
            NoPermissionError("User few has no permissions to run the 'eval' command"),
            "NoPermissionError: User few has no permissions to run the 'eval' command",
        ),
        (
            ResponseError("unknown command 'GETDEL', with args beginning with: 'secret' "),
            "ResponseError: unknown command 'GETDEL'",
        ),
        (
            ResponseError("Command # 2 (GET secret) of pipeline caused error: OOM no memory"),
            "ResponseError: OOM no memory",
        ),
        (InvalidResponse("Protocol Error: b'secret'"), "InvalidResponse"),
        (TimeoutError("no answer in 2 s"), "TimeoutError: no answer in 2 s"),
        (RedisError(), "RedisError"),
    ],
)
def test_reason_is_logged_without_arguments(error: Exception, found: str) -> None:
    assert describe(error) == found
