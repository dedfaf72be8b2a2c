"""One Valkey for the whole ring; every test starts with it empty."""

from collections.abc import Iterator

import pytest
import redis

from tests.support.gateways import valkey


@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    with valkey() as server:
        yield server.connection_url


@pytest.fixture
def redis_url(redis_server: str, backend: "redis.Redis") -> str:
    return redis_server
