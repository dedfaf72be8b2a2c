"""Watchers of a gateway during a fault: a client that pings, and an operator."""

import json
import time
from typing import Any, Final

import trio

from tests.support.gateways import http, metrics

from .durable import Client

_PING: Final = b"\x81\x84\x00\x00\x00\x00ping"  # masked with zeroes


class Live(Client):
    """A client that pings all the time, and notes how long each answer takes."""

    lull = 0

    def __init__(self, port: int, path: str) -> None:
        super().__init__(port, path)
        self.pings: list[float] = []
        self.pubsub_events: list[Any] = []  # on Pub/Sub
        self.gaps = 0
        self._pinged_at: float | None = None

    async def _beat(self, stream: trio.SocketStream) -> None:
        await self.ready.wait()  # it is live from here on
        while True:
            self._pinged_at = time.perf_counter()
            await stream.send_all(_PING)
            await trio.sleep(0.1)  # within the rate limit
            while self._pinged_at is not None:
                await trio.sleep(0.002)

    def _receive(self, message: bytes) -> None:
        if message == b'{"type":"pong"}':
            assert self._pinged_at is not None
            self.pings.append(time.perf_counter() - self._pinged_at)
            self._pinged_at = None
        elif message == b'{"type":"gap"}':
            self.gaps += 1
        elif b'"event_id"' in message or b'"seq"' not in message:
            super()._receive(message)
        else:
            self.pubsub_events.append(json.loads(message)["seq"])


class Operator:
    """Polls readiness and the breakers' metric, as a load balancer would."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.readiness: list[tuple[float, int]] = []
        self.walks: dict[str, list[int]] = {}

    async def poll_readiness(self) -> None:
        while True:
            status = (await http(self._port, "/ws/health/ready")).status
            self.readiness.append((trio.current_time(), status))
            await trio.sleep(0.1)

    async def poll_breakers(self) -> None:
        while True:
            states = (await metrics(self._port)).by_label("circuit_breaker_state")
            for name, value in states.items():
                walk = self.walks.setdefault(name, [])
                if not walk or walk[-1] != value:
                    walk.append(int(value))
            await trio.sleep(0.02)

    async def first(self, status: int, since: float, within: float) -> float:
        """Seconds from then until this was answered the first time."""

        def times() -> list[float]:
            return [at - since for at, said in self.readiness if at > since and said == status]

        with trio.move_on_after(within):
            while not times():
                await trio.sleep(0.02)
        assert times(), f"no {status} within {within} s"
        return times()[0]
