"""What tests of both doors share."""

from collections.abc import Iterator

import pytest

from tests.support.gateways import Transport, valkey


@pytest.fixture(scope="module")
def redis_url() -> Iterator[str]:
    with valkey() as server:
        yield server.connection_url


@pytest.fixture(params=["line", "asgi"])
def transport(request: pytest.FixtureRequest) -> Transport:
    found: Transport = request.param
    return found
