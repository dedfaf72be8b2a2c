"""Run a function on Trio until it returns or a signal cancels it."""

import signal
from collections.abc import Awaitable, Callable

import trio

from ..core.exception_groups import first_leaf

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run(work: Callable[[], Awaitable[None]]) -> None:
    """Run ``work`` until it returns or the first signal cancels it; raise its first failure.

    Later signals are ignored: the process only has to exit, and a second Ctrl-C must not turn that
    into a traceback.
    """
    try:
        trio.run(_run, work)
    except BaseExceptionGroup as group:
        raise first_leaf(group) from None


async def _run(work: Callable[[], Awaitable[None]]) -> None:
    for number in SIGNALS:  # in force again when the receiver is closed
        signal.signal(number, signal.SIG_IGN)
    # Outside of the nursery: signals that arrive while the nursery exits have no effect.
    with trio.open_signal_receiver(*SIGNALS) as signals:
        async with trio.open_nursery() as nursery:

            async def cancel_at_signal() -> None:
                async for _ in signals:
                    nursery.cancel_scope.cancel()

            nursery.start_soon(cancel_at_signal)
            await work()
            nursery.cancel_scope.cancel()
