"""What tests of both doors share."""

from collections.abc import Iterator

import pytest

from tests.support.gateways import Door, valkey


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with valkey() as server:
        yield server.connection_url


@pytest.fixture(params=["line", "asgi"])
def door(request: pytest.FixtureRequest) -> Door:
    found: Door = request.param
    return found
