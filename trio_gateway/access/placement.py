"""Placement: reports which tenants have clients here, and sends clients to another process.

A proxy chooses the process of a client by its tenant, and only when the client connects. When
processes have come or gone, ``trio-gateway rebalance`` asks the proxy where each tenant belongs
now, and this sends the clients away that are elsewhere. They resume where the proxy puts them.
"""

import random
import secrets
from collections import Counter
from typing import Final, NoReturn

import msgspec
import structlog
import trio

from ..broker.commands import Commands, Unavailable
from ..core.close_codes import Close, format_retry_hint
from ..core.control_messages import PlacementReport, PlacementRequest, read_control_message
from ..runtime.connection import Connection
from ..runtime.hub import Hub
from ..runtime.throttled_log import ThrottledLog

log = structlog.get_logger()

CLOSES_PER_SECOND: Final = 100
_SLICE: Final = 10  # connections that are closed together
_WINDOW: Final = 1.0  # seconds over which the retry hints of a slice are spread
_REPORTS: Final = 10  # requests for a report that may wait; more are dropped


class Placement:
    """Answers the requests of ``trio-gateway rebalance``.

    Connections are closed with 1001, at most :data:`CLOSES_PER_SECOND`. One that has left
    meanwhile is skipped; one that connects later is not closed.
    """

    def __init__(self, hub: Hub, commands: Commands) -> None:
        self.process = secrets.token_hex(4)  # identifies this process while it runs
        self._hub = hub
        self._commands = commands
        self._send_report, self._reports = trio.open_memory_channel[str](_REPORTS)
        self._leaving: dict[Connection, None] = {}  # in the order in which they are closed
        self._requested = trio.Event()
        self._throttled_log = ThrottledLog(log)

    def receive(self, payload: bytes) -> None:
        """Accept a request; log one that is invalid."""
        try:
            request = read_control_message(payload, PlacementRequest)
        except ValueError:
            self._throttled_log.warning("placement request is invalid")
            return
        if request.report_to is not None:
            try:
                self._send_report.send_nowait(request.report_to)
            except trio.WouldBlock:
                self._throttled_log.warning("placement request dropped: too many")
        elsewhere = {
            tenant for tenant, process in request.places.items() if process != self.process
        }
        if elsewhere:
            for connection in self._hub.connections:
                if connection.principal.tenant in elsewhere:
                    self._leaving[connection] = None
            self._requested.set()

    def on_subscribed(self) -> None:
        """Nothing to do: a sender whose request was lost misses our report."""

    async def run(self) -> NoReturn:
        """Report, and send clients away; returns only when cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._report)
            nursery.start_soon(self._send_away)
        raise AssertionError("both run for ever")

    async def _report(self) -> None:
        async for channel in self._reports:
            tenants = Counter(int(each.principal.tenant) for each in self._hub.connections)
            report = PlacementReport(self.process, dict(tenants))
            try:
                await self._commands.publish(channel, msgspec.json.encode(report))
            except Unavailable as error:
                log.warning("placement not reported", error=str(error))

    async def _send_away(self) -> None:
        while True:
            await self._requested.wait()
            self._requested = trio.Event()
            sent_away = 0
            while self._leaving:
                for connection in list(self._leaving)[:_SLICE]:
                    del self._leaving[connection]
                    if connection in self._hub.connections:
                        hint = format_retry_hint(random.random() * _WINDOW)  # noqa: S311
                        connection.close(Close.GOING_AWAY, hint)
                        sent_away += 1
                await trio.sleep(_SLICE / CLOSES_PER_SECOND)
            log.info("clients sent to another process", clients=sent_away)
