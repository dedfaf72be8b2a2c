"""Supervision: a lost source is opened again, for ever."""

from collections.abc import Awaitable, Callable
from typing import NoReturn

import structlog
import trio

from ..core.exception_groups import first_leaf
from ..core.resilience import SOON, Backoff, Breaker, State

log = structlog.get_logger()


class ConnectionLost(Exception):  # noqa: N818 - an outcome
    """The server of a source is absent, went away or sent nonsense; it may come back."""


class Demoted(ConnectionLost):
    """The server answers, but is not the one to read from; a new connection may reach that."""


async def keep_running(
    name: str,
    work: Callable[[], Awaitable[None]],
    breaker: Breaker,
    backoff: Backoff | None = None,
    wait_changed: Callable[[], Awaitable[None]] | None = None,
) -> NoReturn:
    """Run ``work`` again whenever it raises :exc:`ConnectionLost`; return only when cancelled.

    After :exc:`Demoted` it runs again within a second: a failover may be over by then. With
    ``wait_changed``, which returns when another server is to be tried, it runs again at once when
    that returns, and within a second in any case; of failures in a row only the first is logged.

    ``work`` calls ``breaker.succeeded()`` once it is connected. Any other exception is a bug and
    propagates.
    """
    backoff = backoff or Backoff()
    soon = False
    while True:
        pause = backoff.after(breaker.failures) if breaker.failures else 0.0
        if soon:
            pause = min(pause, SOON)
        pause = max(breaker.wait(trio.current_time()), pause)
        if pause and wait_changed is not None:
            with trio.move_on_after(pause):
                await wait_changed()
                breaker.retry(trio.current_time())
        else:
            await trio.sleep(pause)
        if not breaker.try_now(trio.current_time()):
            continue
        closed = breaker.state is State.CLOSED
        error: BaseException | str = "ended"
        try:
            await work()
        except* ConnectionLost as group:  # of one of its tasks, or of several
            error = first_leaf(group)
        soon = isinstance(error, Demoted) or wait_changed is not None
        breaker.failed(trio.current_time(), soon=soon)
        opened = closed and breaker.state is State.OPEN
        note = log.warning if wait_changed is None or breaker.failures == 1 else log.debug
        note(
            "source lost",
            source=name,
            error=str(error),
            failures=breaker.failures,
            breaker=breaker.state.name.lower(),
        )
        if opened:
            log.error("breaker opened", source=name, error=str(error), failures=breaker.failures)
