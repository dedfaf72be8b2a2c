"""A gateway process for tests without Trio."""

import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

from tests.support.processes import GatewayProcess


@contextmanager
def serving(redis_url: str, **settings: str) -> Iterator[GatewayProcess]:
    """A gateway process that is ready; killed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        gateway = GatewayProcess(redis_url, Path(folder), **settings)
        try:
            gateway.start_sync()
            until(lambda: is_ready(gateway))
            yield gateway
        finally:
            gateway.kill()


def is_ready(gateway: GatewayProcess) -> bool:
    try:
        with urlopen(f"{gateway.url}/ws/health/ready", timeout=2) as reply:
            return bool(reply.status == 200)
    except (URLError, ConnectionError):
        return False


def until(true: Callable[[], bool], seconds: float = 15) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it took too long"
        time.sleep(0.05)
