"""What all tests share: a profile for hypothesis, a Redis for each module, and both transports."""

import gc
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis
from hypothesis import HealthCheck, settings

from tests.support.gateways import Transport, valkey
from trio_gateway.redis_sets import Cluster, SentinelSet, cluster_set, sentinel_set

gc.disable()  # until everything is imported: a third of the CPU time of collecting
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# The same examples on every run, and few enough to be quick.
settings.register_profile(
    "gateway",
    derandomize=True,
    max_examples=50,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
# For nox -s examples: many more, and others on every run.
settings.register_profile(
    "thorough", settings.get_profile("gateway"), derandomize=False, max_examples=1000
)
settings.load_profile("gateway")


@pytest.fixture(scope="module")
def redis_server() -> Iterator[str]:
    """The URL of a Valkey that only this module uses."""
    with valkey() as server:
        yield server.connection_url


@pytest.fixture(scope="module")
def redis_url(redis_server: str) -> str:
    return redis_server


@pytest.fixture
def backend(redis_server: str) -> Iterator["redis.Redis"]:
    """What a backend publishes with; Redis is empty at first."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
        yield client


@pytest.fixture(scope="module")
def sentinels() -> Iterator[SentinelSet]:
    """A Sentinel set that only this module uses: 1 s to start."""
    with sentinel_set() as found:
        yield found


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A Cluster that only this module uses: 2.3 s to start."""
    with cluster_set() as found:
        yield found


@pytest.fixture(params=["direct", "asgi"])
def transport(request: pytest.FixtureRequest) -> Transport:
    found: Transport = request.param
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the folders whose files take longest, so that parallel workers end together."""
    root = Path(__file__).parent
    order = {"e2e/chaos": 0, "tests/real": 1, "tests/runtime": 3, "tests/core": 4}

    def place(item: pytest.Item) -> int:
        return order.get(item.path.parent.relative_to(root).as_posix(), 2)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """Exclude what is imported by now from garbage collection, as the gateway does at its start.

    A full collection of it takes 0.2 s, in which no gateway in this process answers.
    """
    gc.freeze()
    gc.enable()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect the browser's tests only for ``-m browser``: they need an extra of their own."""
    wanted = config.getoption("markexpr") == "browser"
    return True if collection_path.name == "browser" and not wanted else None


@pytest.fixture(autouse=True)
def _signal_handlers() -> Iterator[None]:
    """Restore the signal handlers: a command that ends ignores signals, which children inherit."""
    before = {number: signal.getsignal(number) for number in _SIGNALS}
    yield
    for number, handler in before.items():
        if signal.getsignal(number) is not handler:
            signal.signal(number, handler)
