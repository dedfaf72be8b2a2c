"""Clients and a backend of gateways whose Redis fails over, and what each failover costs them."""

import json
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final, Literal, NamedTuple

import trio

from trio_gateway.publisher import Publisher, PublishFailed

from .durable import Client

Confirm = int | Literal["all"]  # of a publisher
LIVE_AGAIN: Final = 2.0  # seconds after the new primary accepts writes
_STUCK: Final = 30  # seconds; no claim
EVENT: Final = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "session_id": 456}


class Watcher(Client):
    """A client that notes when each probe came, and which event was the last before each gap."""

    def __init__(self, port: int, path: str, patience: float, others: Sequence[int]) -> None:
        super().__init__(port, path, patience, others)
        self.probed: list[tuple[int, float]] = []
        self.gaps_after: list[int] = []
        self.seen_on: list[tuple[int, int]] = []  # with the number of the connection

    @property
    def last_probe(self) -> int:
        """The number of the last probe that came."""
        return self.probed[-1][0] if self.probed else 0

    def first_since(self, number: int) -> float:
        """When the first one came that is not before this one."""
        return next(at for probe, at in self.probed if probe >= number)

    def _receive(self, message: bytes) -> None:
        if b'"probe":' in message:
            said = json.loads(message)
            self.probed.append((said["probe"], time.monotonic()))
            self.last_event_id = said["event_id"]
            return
        losses, events = self.losses, len(self.seen)
        super()._receive(message)
        self.seen_on.extend((self.connects, number) for number in self.seen[events:])
        if self.losses > losses:
            self.gaps_after.append(self.seen[-1] if self.seen else 0)


class Backend:
    """Publishes numbers at a rate, each with its ``id`` until Redis has confirmed it."""

    def __init__(self, url: str, rate: float, confirm: Confirm) -> None:
        self.url = url
        self.rate = rate
        self.published = 0
        self.again = 0
        self.confirmed_at = 0.0  # time of the last one
        self.longest_pause = 0.0
        self._options: dict[str, Any] = {"confirm": confirm} if confirm else {}
        self._stop = threading.Event()

    async def run(self) -> None:
        await trio.to_thread.run_sync(self._run)

    def stop(self) -> None:
        self._stop.set()

    def _run(self) -> None:
        with Publisher(self.url, **self._options) as publisher:
            due = time.monotonic()
            while not self._stop.is_set():
                self._publish(publisher, self.published + 1)
                due = max(due + 1 / self.rate, time.monotonic() - 0.1)
                time.sleep(max(0.0, due - time.monotonic()))

    def _publish(self, publisher: Publisher, number: int) -> None:
        event = {"seq": number, **EVENT}
        while not self._stop.is_set():
            try:
                publisher.publish(event, id=f"event-{number}")
            except PublishFailed:
                self.again += 1
                time.sleep(0.02)
            else:
                now = time.monotonic()
                if self.published:
                    self.longest_pause = max(self.longest_pause, now - self.confirmed_at)
                self.published, self.confirmed_at = number, now
                return


class Took(NamedTuple):
    """Seconds in all, and without the delays of the machine."""

    elapsed: float
    net: float


@dataclass
class Figures:
    """What a run was, and what became of its events. Times are seconds, at their longest."""

    what: str
    confirm: Confirm
    clients: int
    times: int = 0
    events: int = 0
    missing: int = 0  # events that a client which stayed did not receive
    not_replayed: int = 0  # events that one which came back did not receive
    untold: int = 0  # of both, without being told
    doubled: int = 0  # on one connection
    out_of_order: int = 0
    gaps: int = 0  # of a client that stayed and was told most often
    published_again: int = 0
    reconnects: int = 0  # that no client wanted
    closes: list[bytes] = field(default_factory=list)  # codes and reasons of those
    writable_after: list[float] = field(default_factory=list)
    live_after: list[Took] = field(default_factory=list)
    ready_after: list[Took] = field(default_factory=list)
    tickets_after: list[Took] = field(default_factory=list)
    published_after: list[float] = field(default_factory=list)
    log_lines: int = 0  # of one gateway

    def count(self, clients: Sequence[Watcher], backend: Backend) -> None:
        """Compare what each client has seen with what was published."""
        self.events, self.published_again = backend.published, backend.again
        for client in clients:
            distinct = set(client.seen)
            missing = set(range(client.seen[0], self.events + 1)) - distinct
            stays = client.patience == math.inf
            self.missing += len(missing) if stays else 0
            self.not_replayed += 0 if stays else len(missing)
            self.untold += _untold(client, missing)
            self.doubled += len(client.seen_on) - len(set(client.seen_on))
            self.out_of_order += sum(a > b for a, b in pairwise(client.seen))
            if stays:
                self.gaps = max(self.gaps, client.losses)
                self.reconnects += client.connects - 1
                self.closes += client.closes

    def check(self) -> None:
        """What must hold, whatever the failover was."""
        assert self.events
        assert (self.untold, self.doubled, self.out_of_order, self.reconnects) == (0, 0, 0, 0), self
        assert self.gaps <= self.times, self
        if self.confirm == "all":  # a replica that need not confirm can be the next primary
            assert self.missing == 0, self
        all_after = self.live_after + self.ready_after + self.tickets_after
        assert max((took.net for took in all_after), default=0.0) <= LIVE_AGAIN, self

    def row(self) -> str:
        """A row of the table in docs/reliability.md."""

        def most(times: Sequence[float]) -> str:
            return f"{max(times):.2f}" if times else ""

        live, ready, tickets = (
            [took.elapsed for took in times]
            for times in (self.live_after, self.ready_after, self.tickets_after)
        )

        cells = [
            self.what, self.confirm or "no", self.times, self.events,
            f"{self.missing}, {self.doubled}, {self.out_of_order}", self.gaps, self.not_replayed,
            most(self.writable_after), most(live), most(ready), most(tickets),
            most(self.published_after),
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


def _untold(client: Watcher, missing: set[int]) -> int:
    """The missing events that no gap announced before the client could have seen two later ones.

    A gap may come just behind the first event of the new primary.
    """
    told = 0
    for number in missing:
        later = sorted({n for n in client.seen if n > number})[:2]
        earlier = [n for n in client.seen if n < number]
        first = max(earlier, default=0)
        last = later[-1] if later else math.inf
        told += any(first <= at <= last for at in client.gaps_after)
    return len(missing) - told
