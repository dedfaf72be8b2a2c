"""One profile for hypothesis: the same examples on every run, and not too many."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile(
    "gateway",
    derandomize=True,
    max_examples=150,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("gateway")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The browser's tests need an extra of their own: who wants them says ``-m browser``."""
    wanted = config.getoption("markexpr") == "browser"
    return True if collection_path.name == "browser" and not wanted else None
