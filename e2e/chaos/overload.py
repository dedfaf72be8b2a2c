"""A gateway process that is given more than it can deliver, and what others see of that."""

import json
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import trio

from tests.support.gateways import JWT_SECRET, admitted, connect, metrics
from tests.support.processes import GatewayProcess
from trio_gateway.testing import make_jwt, make_payload

CLIENTS: Final = 200  # of the tenant that floods
# So that little can be delivered: three times that is then no load for the rest of the machine,
# and what waits at the end is delivered as soon as 5000 would be at the usual rate.
SMALL: Final = {
    "REDIS_EVENT_BATCH_SIZE": "2",
    "REDIS_EVENT_QUEUE_SIZE": "2000",
    "REDIS_EVENT_MAX_WAIT": "0",
}
_FLOOD: Final = Path(__file__).with_name("flood.py")

Measured = list[tuple[float, float]]  # when, and how many milliseconds it took


def percentile(measured: Measured, percent: float, began: float, ended: float) -> float:
    found = [ms for when, ms in measured if began <= when < ended]
    return round(float(np.percentile(found, percent)), 2)


class Bystander:
    """Another tenant: one client that receives an event of its own many times a second, one that
    pings twice a second, and one that comes each second.
    """

    def __init__(self, gateway: GatewayProcess, redis_port: int, rate: float) -> None:
        token = make_jwt(JWT_SECRET, tenant_id=2, sub="7", life=36_000)
        self._url = f"ws://127.0.0.1:{gateway.port}/ws/waiter?token={token}"
        self._redis_port = redis_port
        self._pause = 1 / rate
        self.events: Measured = []
        self.pongs: Measured = []
        self.accepts: Measured = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._receive)
            nursery.start_soon(self._ping)
            nursery.start_soon(self._come)

    async def _receive(self) -> None:
        redis = await trio.open_tcp_stream("127.0.0.1", self._redis_port)
        async with redis, admitted(self._url) as client:
            heartbeat = 0.0
            while True:
                if (sent := time.monotonic()) > heartbeat + 20:
                    heartbeat = sent
                    await client.send_message("ping")
                payload = make_payload(tenant_id=2, n=len(self.events))
                await redis.send_all(
                    b"*3\r\n$7\r\nPUBLISH\r\n$24\r\nchannel:branch:2:waiters\r\n$%d\r\n%b\r\n"
                    % (len(payload), payload)
                )
                while f'"n": {len(self.events)}}}' not in await client.get_message():
                    pass  # a pong
                _note(self.events, sent)
                await redis.receive_some()
                await trio.sleep(self._pause)

    async def _ping(self) -> None:
        async with admitted(self._url) as client:
            while True:
                sent = time.monotonic()
                await client.send_message("ping")
                while await client.get_message() != '{"type":"pong"}':
                    pass  # an event
                _note(self.pongs, sent)
                await trio.sleep(0.5)

    async def _come(self) -> None:
        while True:
            sent = time.monotonic()
            async with admitted_at_once(self._url):
                _note(self.accepts, sent)
            await trio.sleep(1)


@asynccontextmanager
async def admitted_at_once(url: str) -> AsyncIterator[None]:
    async with connect(url) as client:
        await client.send_message("ping")
        while await client.get_message() != '{"type":"pong"}':
            pass  # an event
        yield


def _note(measured: Measured, since: float) -> None:
    measured.append((since, (time.monotonic() - since) * 1000))


class Flood:
    """The flooding tenant in its own process."""

    def __init__(self, process: "subprocess.Popen[bytes]", gateway: GatewayProcess) -> None:
        self._process = process
        self.gateway = gateway

    async def say(self) -> bytes:
        assert self._process.stdout is not None
        return await trio.to_thread.run_sync(self._process.stdout.readline, abandon_on_cancel=True)

    async def pour(self, rate: float, seconds: float) -> dict[str, Any]:
        """Publish at this rate; what became of it."""
        assert self._process.stdin is not None
        before = await metrics(self.gateway.port)
        self._process.stdin.write(b"%f %f\n" % (rate, seconds))
        self._process.stdin.flush()
        poured: dict[str, Any] = json.loads(await self.say())
        after = await metrics(self.gateway.port)
        for what in ("processed", "dropped"):
            name = f"events_{what}_total"
            poured[what] = int(after[name] - before[name])
        return poured


@asynccontextmanager
async def flooding(gateway: GatewayProcess, redis_port: int) -> AsyncIterator[Flood]:
    here = Path(__file__).parents[1]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])}
    process = subprocess.Popen(
        [sys.executable, str(_FLOOD), str(gateway.port), str(redis_port), str(CLIENTS)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env,
    )  # fmt: skip
    try:
        flood = Flood(process, gateway)
        with trio.fail_after(30):
            assert await flood.say() == b"ready\n"
        yield flood
    finally:
        process.kill()
        process.communicate()


async def deliverable(flood: Flood) -> float:
    """How many events a second get through when more than enough are published."""
    rate = 4000.0
    while True:
        poured = await flood.pour(rate, 3)
        await quiet(flood.gateway, 10)  # what waits
        if poured["processed"] < poured["published"] * 3 / 4:  # the rest waits, or is dropped
            return float(poured["processed"]) / 3
        rate *= 2


async def quiet(gateway: GatewayProcess, seconds: float) -> float:
    """Wait until nothing waits to be delivered; how long that took."""
    began = time.monotonic()
    with trio.fail_after(seconds):
        while (await metrics(gateway.port))["event_queue_depth"]:
            await trio.sleep(0.02)
    return time.monotonic() - began


def memory(gateway: GatewayProcess) -> float:
    """Megabytes that the process holds."""
    assert gateway.process is not None
    pages = int(Path(f"/proc/{gateway.process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def lines(gateway: GatewayProcess, event: str) -> list[dict[str, Any]]:
    """What the gateway has logged of this."""
    logged = (line for line in gateway.log.read_text().splitlines() if line.startswith("{"))
    return [line for line in map(json.loads, logged) if line["event"] == event]


def median(figures: Sequence[float]) -> float:
    return round(float(np.median(figures)), 2)
