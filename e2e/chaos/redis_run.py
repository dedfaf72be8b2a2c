"""A gateway process whose Redis gets into trouble, and what its clients and its operator see."""

import json
import tempfile
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Literal

import trio
from trio_websocket import ConnectionClosed

from tests.support.gateways import (
    JWT_SECRET,
    TABLE_SECRET,
    connect,
    http,
    until,
    valkey,
)
from tests.support.processes import GatewayProcess
from trio_gateway.broker.commands import TIMEOUT
from trio_gateway.broker.connection import CONNECT_TIMEOUT
from trio_gateway.broker.pubsub import LIVENESS
from trio_gateway.broker.stream_reader import BLOCK, REPLY_TIMEOUT
from trio_gateway.core.resilience import Backoff
from trio_gateway.testing import make_jwt, make_table_token

from .durable import FOR_CROWDS, STREAM, Backend
from .redis_faults import PASSWORD, USER, Fault, Stage
from .relay import open_relay
from .watchers import Live, Operator

When = Literal["at start", "while running"]
THRESHOLD: Final = 2  # failures
RECOVERY: Final = 1.0  # seconds
FAR: Final = 0.03  # seconds to Redis, one way: so that a half-open breaker can be seen
NOTICED: Final = 5.0  # seconds until readiness must say so
WORST_PING: Final = 1.0  # seconds; the machine may be busy with other tests
# The longest that a try which hangs takes to give up.
HANG: Final = max(2 * CONNECT_TIMEOUT + REPLY_TIMEOUT, 2 * LIVENESS, BLOCK + REPLY_TIMEOUT, TIMEOUT)
# The longest time between two tries.
PAUSE: Final = max(RECOVERY, Backoff().most)
TRY: Final = 2.0  # seconds for one that succeeds, this far away and on a busy machine


def bound(fault: Fault) -> float:
    """Seconds that a recovery may take, by the settings."""
    return PAUSE + TRY + (HANG if fault.hangs else 0)


@dataclass
class Figures:
    """What a run was, and what was seen. Times are seconds."""

    fault: str
    when: str
    noticed: float | None = None
    recovered: float = 0.0
    may_take: float = 0.0
    ping_p99: float = 0.0
    ping_worst: float = 0.0
    pings: int = 0
    events: int = 0
    missing: int = 0
    doubled: int = 0
    out_of_order: int = 0
    gaps: int = 0  # that clients received
    reconnects: int = 0
    walks: dict[str, list[int]] = field(default_factory=dict)

    def count(self, clients: list[Live], backend: Backend) -> None:
        self.events = backend.published
        for client in clients:
            distinct = set(client.seen)
            missing = set(range(1, self.events + 1)) - distinct
            assert client.gaps or not missing, "lost without a word"
            self.missing += len(missing)
            self.doubled += len(client.seen) - len(distinct)
            self.out_of_order += sum(a > b for a, b in pairwise(client.seen))
            self.gaps += client.gaps
            self.reconnects += client.connects - 1
        pings = sorted(ping for client in clients for ping in client.pings)
        self.pings = len(pings)
        self.ping_p99, self.ping_worst = pings[int(len(pings) * 0.99)], pings[-1]

    def __str__(self) -> str:
        noticed = "-" if self.noticed is None else f"{self.noticed:.2f}"
        walks = "; ".join(f"{n} {''.join(map(str, w))}" for n, w in sorted(self.walks.items()))
        return (
            f"{self.fault} {self.when}: 503 after {noticed} s, ready after {self.recovered:.2f} s"
            f" (may take {self.may_take:.1f}), {self.pings} pings: p99 {self.ping_p99 * 1e3:.1f} ms"
            f" worst {self.ping_worst * 1e3:.1f} ms, {self.events} events: {self.missing} missing"
            f" {self.doubled} doubled {self.out_of_order} out of order, {self.gaps} gaps,"
            f" {self.reconnects} reconnects; {walks}"
        )


async def run(fault: Fault, when: When) -> Figures:
    """Begin the fault, look, end it, look again; asserts what holds for every fault."""
    figures = Figures(str(fault), when, may_take=bound(fault))
    with (
        valkey(appendonly="yes", appendfsync="always") as server,
        tempfile.TemporaryDirectory() as folder,
    ):
        async with open_relay(server.port, delay=FAR) as relay, trio.open_nursery() as nursery:
            stage = Stage(server, relay)
            await stage.add_user()
            gateway = GatewayProcess(
                f"redis://{USER}:{PASSWORD}@127.0.0.1:{relay.port}",
                Path(folder),
                **FOR_CROWDS
                | {
                    "CIRCUIT_FAILURE_THRESHOLD": str(THRESHOLD),
                    "CIRCUIT_RECOVERY_TIMEOUT": str(RECOVERY),
                },
            )
            try:
                await _Run(fault, when, figures, stage, gateway, nursery).go()
            finally:
                gateway.kill()
                nursery.cancel_scope.cancel()
    return figures


class _Run:
    def __init__(
        self,
        fault: Fault,
        when: When,
        figures: Figures,
        stage: Stage,
        gateway: GatewayProcess,
        nursery: trio.Nursery,
    ) -> None:
        self.fault = fault
        self.when = when
        self.figures = figures
        self.stage = stage
        self.gateway = gateway
        self.nursery = nursery
        self.operator = Operator(gateway.port)
        self.backend = Backend(stage.server.port, 50)
        self.clients: list[Live] = []
        self.ticket: str | None = None

    async def go(self) -> None:
        try:
            if self.when == "at start":
                await self._start_into_it()
            else:
                await self._run_into_it()
            await self._look_at_it()
            await self._recover()
            await self._count()
        finally:
            self.backend.stop()

    async def _start_into_it(self) -> None:
        """A diner connects during the fault: a table token needs no command of Redis."""
        if self.fault.kills:  # in the middle of the reading of what is there
            self.stage.relay.slow(20_000)
            with self.stage.admin() as admin:
                for n in range(500):
                    admin.xadd(STREAM, {"data": json.dumps({"old": n, "x": "x" * 500})})
            await self.gateway.start()
            await trio.sleep(0.5)
            await self.fault.begin(self.stage)
            self.stage.relay.forward()
        else:
            await self.fault.begin(self.stage)
            await self.gateway.start()
        self.began = trio.current_time()
        self._watch()
        await self._live(_diner())
        self.nursery.start_soon(self.backend.run)

    async def _run_into_it(self) -> None:
        await self.gateway.start()
        self._watch()
        await self.operator.first(200, 0, 10)
        for path in (_diner(), _waiter()):
            await self._live(path)
        self.ticket = await self._issue_ticket(200)
        self.nursery.start_soon(self.backend.run)
        await self._progress(5)
        await self.fault.begin(self.stage)
        self.began = trio.current_time()

    def _watch(self) -> None:
        self.nursery.start_soon(self.operator.poll_readiness)
        self.nursery.start_soon(self.operator.poll_breakers)

    async def _live(self, path: str) -> None:
        client = Live(self.gateway.port, path)
        self.clients.append(client)
        self.nursery.start_soon(client.run)
        with trio.fail_after(5):
            await client.ready.wait()

    async def _look_at_it(self) -> None:
        """The operator sees it; live clients stay; new ones are asked to retry."""
        self.figures.noticed = await self.operator.first(503, self.began, NOTICED)
        assert (await http(self.gateway.port, "/ws/health")).status == 200
        with trio.fail_after(60):
            while not all(1 in self.operator.walks[name] for name in self.fault.opens):
                await self._come()
                await trio.sleep(0.1)
        await self._come()
        noticed = self.began + NOTICED
        assert {status for at, status in self.operator.readiness if at > noticed} <= {503}

    async def _come(self) -> None:
        code = await self._code(_waiter())
        assert code == (None if self.fault.admits else 1013), self.gateway.log.read_text()
        await self._issue_ticket(503)
        if self.ticket is not None:
            code = await self._code(f"/ws/waiter?ticket={self.ticket}")
            assert code in {1013, None}, self.gateway.log.read_text()
            if code is None:  # Redis is full, and takes it away
                self.ticket = None

    async def _code(self, path: str) -> int | None:
        """The code that a new client is refused with, None if it is let in."""
        async with connect(f"ws://127.0.0.1:{self.gateway.port}{path}") as client:
            with trio.fail_after(8):
                try:
                    await client.send_message("ping")
                    await client.get_message()
                except ConnectionClosed as error:
                    assert error.reason is not None
                    return int(error.reason.code)
        return None

    async def _issue_ticket(self, status: int) -> str:
        authorization = {"Authorization": f"Bearer {_token()}"}
        reply = await http(self.gateway.port, "/ws/ticket", method="POST", headers=authorization)
        assert reply.status == status
        return str(reply.json.get("ticket"))

    async def _recover(self) -> None:
        await self.fault.end(self.stage)
        ended = trio.current_time()
        figures, operator = self.figures, self.operator
        figures.recovered = await operator.first(200, ended, figures.may_take)
        # No client asks for tickets while clients are sent elsewhere: the operator's request is
        # the try that closes that breaker.
        await until(lambda: not any(walk[-1] for walk in operator.walks.values()), 10)
        figures.walks = {name: walk for name, walk in operator.walks.items() if len(walk) > 1}
        for name in self.fault.opens:
            walk = figures.walks[name]
            assert walk[:2] == [0, 1], figures
            assert walk[-3:] == [1, 2, 0], figures
        assert await self._code(_waiter()) is None
        await self._issue_ticket(200)

    async def _count(self) -> None:
        await self._progress(10)
        with self.stage.admin() as admin:
            admin.publish("branch:1:waiters", event(seq=-1))
        await until(lambda: all(client.pubsub_events == [-1] for client in self.clients))
        self.backend.stop()
        await trio.sleep(0.5)
        last = self.backend.published
        await until(lambda: all(client.seen[-1] == last for client in self.clients), 10)
        self.figures.count(self.clients, self.backend)
        assert self.gateway.process is not None
        assert self.gateway.process.poll() is None
        assert "Traceback" not in self.gateway.log.read_text(), self.gateway.log.read_text()
        assert '"critical"' not in self.gateway.log.read_text(), self.gateway.log.read_text()

    async def _progress(self, seconds: float) -> None:
        """Every client has seen something that is published from now on."""
        last = self.backend.published + 1
        await until(lambda: all(c.seen and c.seen[-1] >= last for c in self.clients), seconds)


def event(**keys: Any) -> str:
    return json.dumps(
        {**keys, "type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "session_id": 456},
        separators=(",", ":"),
    )


def _token() -> str:
    return make_jwt(JWT_SECRET, roles=["WAITER"])


def _waiter() -> str:
    return f"/ws/waiter?token={_token()}"


def _diner() -> str:
    return f"/ws/diner?table_token={make_table_token(TABLE_SECRET, session_id=456)}"
