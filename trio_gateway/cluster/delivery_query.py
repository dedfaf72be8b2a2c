"""Asks all processes for their delivery times, and adds them up."""

from collections.abc import Collection
from typing import Final

import msgspec
import trio

from ..core.delivery_times import DeliveryTimes, TenantFigures
from ..core.time_counts import Window, summary
from .control import Control
from .questions import Answers

PATIENCE: Final = 1.5  # seconds, so that the client has its answer within 2
_KIND: Final = "delivery_times"
_PER_CHECKPOINT: Final = 20  # tenants


class DeliveryTimesRequest(msgspec.Struct, omit_defaults=True):
    """Asks a process for the figures of these tenants, or of all."""

    tenants: list[int] | None = None


class ProcessFigures(msgspec.Struct):
    """What a process answers. ``others`` are the tenants without figures of their own.

    ``seconds`` is its WS_SLO_SECONDS.
    """

    seconds: float
    tenants: dict[int, TenantFigures]
    others: TenantFigures


class OthersReport(msgspec.Struct):
    """The delivery times of several tenants together."""

    last_5_minutes: Window
    last_hour: Window


class TenantTimesReport(msgspec.Struct):
    """The delivery times of one tenant."""

    tenant_id: int
    last_5_minutes: Window
    last_hour: Window


class SloReport(msgspec.Struct):
    """The delivery times of tenants, the slowest first; ``seconds`` is the limit of ``over``.

    ``more`` tenants were left out. ``others`` are those that processes count together only; null
    unless all tenants were asked for. Processes in ``missing`` did not answer.
    """

    seconds: float
    tenants: list[TenantTimesReport]
    more: int
    others: OthersReport | None
    complete: bool
    missing: list[str]


def answer_delivery_times(control: Control, times: DeliveryTimes) -> None:
    """Let this process answer the question of :func:`delivery_times`."""

    async def answer(request: DeliveryTimesRequest) -> ProcessFigures:
        wanted = list(times.tenants) if request.tenants is None else request.tenants
        now, found = trio.current_time(), dict[int, TenantFigures]()
        for n, tenant in enumerate(wanted):
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            if not (figures := times.figures(tenant, now)).is_empty:
                found[tenant] = figures
        others = TenantFigures() if request.tenants is not None else times.figures(None, now)
        return ProcessFigures(times.slo, found, others)

    control.handle(_KIND, DeliveryTimesRequest, answer)


async def delivery_times(
    control: Control, tenants: Collection[int] | None, *, most: int
) -> SloReport:
    """The delivery times of these tenants, or of all, on all processes; ``most`` of them.

    Answers within :data:`PATIENCE`. Raises :exc:`~..broker.commands.Unavailable` if Redis is.
    """
    request = DeliveryTimesRequest(None if tenants is None else sorted(tenants))
    answers = await control.ask(_KIND, request, timeout=PATIENCE)
    found = await _merge(answers)
    reports: list[TenantTimesReport] = []
    for n, (tenant, figures) in enumerate(found.tenants.items()):
        if n % _PER_CHECKPOINT == 0:
            await trio.lowlevel.checkpoint()
        if tenants is None or tenant in tenants:
            windows = summary(figures.last_5_minutes), summary(figures.last_hour)
            reports.append(TenantTimesReport(tenant, *windows))
    reports.sort(key=_order)
    others = OthersReport(summary(found.others.last_5_minutes), summary(found.others.last_hour))
    return SloReport(
        found.seconds,
        reports[:most],
        max(0, len(reports) - most),
        others if tenants is None else None,
        answers.complete,
        answers.missing,
    )


async def _merge(answers: Answers) -> ProcessFigures:
    """The sum of the answers."""
    total = ProcessFigures(0.0, {}, TenantFigures())
    for _, one in answers.decoded(ProcessFigures):
        await trio.lowlevel.checkpoint()
        total.seconds = max(total.seconds, one.seconds)
        total.others.merge(one.others)
        for n, (tenant, figures) in enumerate(one.tenants.items()):
            if n % _PER_CHECKPOINT == 0:
                await trio.lowlevel.checkpoint()
            total.tenants.setdefault(tenant, TenantFigures()).merge(figures)
    return total


def _order(report: TenantTimesReport) -> tuple[float, float, int]:
    """The slowest in the last five minutes first, then those of the hour."""
    return -report.last_5_minutes.slowness, -report.last_hour.slowness, report.tenant_id
