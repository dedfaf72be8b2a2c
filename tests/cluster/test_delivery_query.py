"""Delivery times of all processes: sums are exact, the slowest is first, tenants stay apart."""

from typing import Any

import msgspec
import trio
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs
from trio.testing import MockClock

from trio_gateway.cluster.delivery_query import (
    SloReport,
    answer_delivery_times,
    delivery_times,
)
from trio_gateway.cluster.questions import Answers
from trio_gateway.core.delivery_times import DeliveryTimes
from trio_gateway.core.event_ids import Position, tag
from trio_gateway.testing import make_event

STREAM = tag("events:critical")
NOW = 1_000_000.0
# By process: the tenants of its events, and how many seconds each took.
Events = list[list[tuple[int, float]]]
SECONDS = st.integers(0, 100_000).map(lambda ms: ms / 1000)
EVENTS = st.lists(st.lists(st.tuples(st.integers(1, 5), SECONDS)), min_size=1, max_size=3)


class FakeControl:
    """Control whose processes have counted these events; messages are those of real ones."""

    def __init__(self, events: Events, *, most: int = 1000) -> None:
        self.handlers: list[Any] = []
        self.request: bytes | None = None  # that processes get instead
        self.answers = Answers()
        for one in events:
            times = DeliveryTimes(1.0, most=most)
            times.set_clock([STREAM], NOW)
            for tenant, seconds in one:
                position = Position((round((NOW - seconds) * 1000), 0))
                event = make_event(tenant_id=tenant, stream=STREAM, position=position)
                times.written([(event, None, None)], 1, 0.0)
            answer_delivery_times(self, times)  # type: ignore[arg-type]

    def handle(self, _kind: str, request: type, handler: Any) -> None:
        self.handlers.append((request, handler))

    async def ask(self, _kind: str, request: msgspec.Struct, *, timeout: float) -> Answers:
        assert timeout < 2
        for n, (kind, handler) in enumerate(self.handlers):
            message = self.request or msgspec.json.encode(request)
            answer = await handler(msgspec.json.decode(message, type=kind))
            self.answers.by_node[f"node-{n}"] = msgspec.Raw(msgspec.json.encode(answer))
        return self.answers

    def report(self, tenants: Any = None, most: int = 1000) -> SloReport:
        async def ask() -> SloReport:
            return await delivery_times(self, tenants, most=most)  # type: ignore[arg-type]

        # The processes' clock begins when the test asks.
        return trio.run(ask, clock=MockClock())


def counts(report: SloReport) -> dict[int, tuple[int, int]]:
    return {
        each.tenant_id: (each.last_hour.written.count, each.last_hour.written.over)
        for each in report.tenants
    }


@given(EVENTS)
def test_sums_over_processes_are_exact_and_the_slowest_is_first(events: Events) -> None:
    """Events that entered Redis at the same time are one, on whatever process."""
    report = FakeControl(events).report()
    together = [each for one in events for each in one]
    assert counts(report) == {
        tenant: (
            sum(each == tenant for each, _ in together),
            len({s for each, s in together if each == tenant and round(s * 1000) > 1000}),
        )
        for tenant in {tenant for tenant, _ in together}
    }
    slowness = [each.last_5_minutes.slowness for each in report.tenants]
    assert slowness == sorted(slowness, reverse=True)
    assert (report.seconds, report.complete, report.missing) == (1.0, True, [])


@given(EVENTS, st.frozensets(st.integers(1, 6)), st.booleans())
def test_a_key_of_some_tenants_never_gets_a_figure_of_another(
    events: Events, mine: frozenset[int], processes_tell_all: bool
) -> None:
    control = FakeControl(events, most=3)
    if processes_tell_all:  # whatever processes answer
        control.request = b"{}"
    report = control.report(mine)
    assert {each.tenant_id for each in report.tenants} <= mine
    assert report.others is None
    own = [[each for each in one if each[0] in mine] for one in events]
    if len({tenant for one in events for tenant, _ in one}) <= 3:
        assert report.tenants == FakeControl(own).report().tenants


def test_an_answer_is_limited_and_says_how_many_tenants_are_left_out() -> None:
    control = FakeControl([[(tenant, tenant / 10) for tenant in range(1, 8)]], most=5)
    report = control.report(most=2)
    assert [each.tenant_id for each in report.tenants] == [5, 4]
    assert report.more == 3
    assert report.others is not None
    assert report.others.last_hour.written.count == 2


def test_a_process_with_another_answer_is_missing() -> None:
    control = FakeControl([[(1, 0.1)]])
    control.answers.by_node["node-9"] = msgspec.Raw(b"[]")
    control.answers.missing.append("node-8")
    with capture_logs():
        report = control.report()
    assert counts(report) == {1: (1, 0)}
    assert (report.complete, report.missing) == (False, ["node-8", "node-9"])
