"""Limits of the system that the process can do without."""

import resource

import pytest
import structlog

from trio_gateway.gateway import _raise_fd_limit


@pytest.mark.parametrize("error", [ValueError("not allowed to raise maximum limit"), OSError(1)])
@pytest.mark.parametrize("most", [10_240, 0])
def test_limit_of_open_files_that_cannot_be_raised_stays(
    monkeypatch: pytest.MonkeyPatch, error: Exception, most: int
) -> None:
    """As on macOS, whose hard limit is infinity: the system grants less, or nothing."""
    limit = [(256, 2**63 - 1)]

    def setrlimit(_which: int, wanted: tuple[int, int]) -> None:
        if wanted[0] > most:
            raise error
        limit[0] = wanted

    monkeypatch.setattr(resource, "getrlimit", lambda _which: limit[0])
    monkeypatch.setattr(resource, "setrlimit", setrlimit)
    with structlog.testing.capture_logs() as logs:
        _raise_fd_limit()

    assert limit[0][0] == max(most, 256)
    assert [line["event"] for line in logs] == ([] if most else ["limit of open files not raised"])
