"""Running something on Trio until it is done or a signal says that it is enough."""

import signal
from collections.abc import Awaitable, Callable

import trio

from ..core.exception_groups import first_leaf

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work``, cancelled by the first signal; raise its first failure, out of its group.

    Signals are ignored from then on: what is left is to exit, and a second Ctrl-C must not turn
    that into a traceback.
    """
    try:
        trio.run(_run, work)
    except BaseExceptionGroup as group:
        raise first_leaf(group) from None


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    for number in SIGNALS:  # this holds again when the receiver is closed
        signal.signal(number, signal.SIG_IGN)
    # Outside of the nursery: signals are heard, and change nothing, while it is being left.
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def heed_signals() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(heed_signals)
            await work()
            nursery.cancel_scope.cancel()
