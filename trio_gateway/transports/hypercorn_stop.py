"""Wait for Hypercorn's master to stop its workers, without asking ten times a second."""

from multiprocessing.synchronize import Event
from typing import Any

import hypercorn.trio.run
import trio


async def wait_until_set(event: Event, _sleep: Any = None) -> None:
    """Return once the event of another process is set.

    It waits in a thread for the semaphore in the event, and puts back at once what it took:
    the next one that waits finds it, too. ``Event.wait`` would wait as well, but a process that is
    killed there hangs the master in its ``Event.set``.
    """
    flag = event._flag  # type: ignore[attr-defined]

    def wait() -> None:
        flag.acquire()
        flag.release()

    await trio.to_thread.run_sync(wait, abandon_on_cancel=True)


def install() -> None:
    """Let Hypercorn's Trio worker wait by :func:`wait_until_set`."""
    vars(hypercorn.trio.run)["check_multiprocess_shutdown_event"] = wait_until_set
