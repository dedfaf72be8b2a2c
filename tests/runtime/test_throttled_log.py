from typing import Any

import pytest
import structlog
import trio
from trio.testing import MockClock

from trio_gateway.runtime.throttled_log import ThrottledLog


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def logged(interval: float, *calls: tuple[float, str]) -> list[Any]:
    """What is logged of warnings of these kinds at these times."""
    clock = Clock()
    with structlog.testing.capture_logs() as logs:
        log = ThrottledLog(structlog.get_logger(), interval, clock=clock)
        for clock.now, kind in calls:
            log.warning("invalid", kind=kind, at=clock.now)
    return [(each["at"], each["held_back"]) for each in logs]


def test_one_line_of_a_kind_is_logged_a_second_and_the_others_are_counted() -> None:
    times = [0.0, 0.25, 0.5, 1.0, 1.5, 2.5, 9.0]

    assert logged(1.0, *((t, "a") for t in times)) == [(0.0, 0), (1.0, 2), (2.5, 1), (9.0, 0)]


def test_one_kind_of_line_does_not_hold_back_another() -> None:
    calls = [(5.0, "a"), (5.0, "b"), (6.0, "a"), (6.0, "b"), (15.0, "a"), (15.0, "b")]

    assert logged(10.0, *calls) == [(5.0, 0), (5.0, 0), (15.0, 1), (15.0, 1)]


def test_the_kind_of_a_line_is_its_event_unless_another_is_given() -> None:
    with structlog.testing.capture_logs() as logs:
        log = ThrottledLog(structlog.get_logger(), clock=Clock())
        log.info("one")
        log.info("other")
        log.info("one")
        log.info("one", kind="third", field=3)

    assert [each["event"] for each in logs] == ["one", "other", "one"]
    assert logs[-1] == {"event": "one", "log_level": "info", "field": 3, "held_back": 0}


@pytest.mark.parametrize("level", ["info", "warning", "error"])
def test_a_line_keeps_its_level(level: str) -> None:
    with structlog.testing.capture_logs() as logs:
        getattr(ThrottledLog(structlog.get_logger(), clock=Clock()), level)("said")

    assert [each["log_level"] for each in logs] == [level]


def test_an_exception_is_logged_with_its_traceback() -> None:
    with structlog.testing.capture_logs() as logs:
        try:
            raise ValueError
        except ValueError:
            ThrottledLog(structlog.get_logger(), clock=Clock()).exception("bug")

    assert logs == [{"event": "bug", "log_level": "error", "exc_info": True, "held_back": 0}]


async def test_time_is_trios(autojump_clock: MockClock) -> None:
    with structlog.testing.capture_logs() as logs:
        log = ThrottledLog(structlog.get_logger())
        for _ in range(5):
            log.warning("invalid")
            await trio.sleep(0.3)

    assert [each["held_back"] for each in logs] == [0, 3]
