"""What receipts of one type cost the events of others: ``python -m bench.untracked``.

In one process, in turns: the same events with a receipt log that tracks another type, and without
one. Nothing is written to the kernel, so the share is larger than in a real delivery.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Container, Sequence
from typing import Final

import trio
from trio.testing import wait_all_tasks_blocked

from trio_gateway.core.event_ids import Position, tag
from trio_gateway.core.events import Event
from trio_gateway.core.routes_file import read_routes
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.past_routing import PastRouting
from trio_gateway.runtime.receipt_writing import ReceiptWriting
from trio_gateway.runtime.receipts import ReceiptLog
from trio_gateway.runtime.tracked_events import TrackedEvents
from trio_gateway.testing import FakeSocket, make_event, make_principal

_PAIRS: Final = 400
_BATCHES: Final = 20  # of each half of a pair
_CLOCK: Final = 1e9  # unix time when Trio's clock was 0
_ROUTES: Final = read_routes('[routes.SERVICE_CALL_CREATED]\nmust_reach = "waiters"\nwithin = 10\n')
_STREAM: Final = tag("events:critical")


class _Socket(FakeSocket):
    def try_write(self, data: bytes | memoryview) -> int:
        return len(data)


def _tracked(events: Sequence[Event], types: Container[str]) -> list[Event]:
    """As the inlet of a stream looks for them."""
    return [each for each in events if each.type in types or each.escalation is not None]


async def _measure(tenants: int, clients: int, pairs: int) -> list[float]:
    """CPU time with the log, divided by that without.

    A batch has an event for each tenant, which has this many clients.
    """
    hub, history = Hub(), History(routing=PastRouting(_ROUTES))
    dispatch = Dispatch(hub, _ROUTES, history=history)

    def clock() -> float:
        return _CLOCK + trio.current_time()

    tracked_events = TrackedEvents(_ROUTES, clock, 3600)
    log = ReceiptLog(tracked_events, history, clock, ReceiptWriting())
    limits = ConnectionLimits(stale_after=math.inf, receive_timeout=math.inf)
    at = int(clock() * 1000)
    ratios: list[float] = []
    async with trio.open_nursery() as nursery:
        for number in range(tenants * clients):
            principal = make_principal(tenant=1 + number % tenants, user=number + 1)
            nursery.start_soon(Connection(principal, limits).run, _Socket(), hub)
        await wait_all_tasks_blocked()
        tracked = make_event(
            "SERVICE_CALL_CREATED", tenant_id=1, stream=_STREAM, position=Position((at, 0))
        )
        tracked_events.note([tracked])
        sequence = 0

        def batch() -> list[Event]:
            nonlocal sequence
            sequence += tenants
            return [
                make_event(
                    "ROUND_READY",
                    tenant_id=1 + tenant,
                    stream=_STREAM,
                    position=Position((at, sequence + tenant)),
                )
                for tenant in range(tenants)
            ]

        gc.disable()
        for number in range(pairs):
            took: dict[bool, float] = {}
            for is_on in (True, False) if number % 2 else (False, True):
                batches = [batch() for _ in range(_BATCHES)]
                dispatch.receipts = log if is_on else None
                began = time.process_time()
                for events in batches:
                    if is_on and (found := _tracked(events, tracked_events.types)):
                        tracked_events.note(found)
                    await dispatch.deliver(events)
                took[is_on] = time.process_time() - began
            ratios.append(took[True] / took[False])
            if number % 50 == 0:
                gc.collect()
        gc.enable()
        nursery.cancel_scope.cancel()
    return ratios


def main(pairs: int = _PAIRS) -> None:
    for tenants, clients in ((1, 400), (50, 2)):
        ratios = trio.run(_measure, tenants, clients, pairs)
        first, middle, third = statistics.quantiles(ratios)
        what = f"batches of {tenants}, each event for {clients} clients"
        print(f"{what}: {middle:.3f} × (quartiles {first:.3f} and {third:.3f})")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
