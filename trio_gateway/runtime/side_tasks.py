"""Side tasks: what runs next to the task that serves a client, and ends before it."""

from collections.abc import Awaitable, Callable

import trio


class SideTasks:
    """Tasks in the nursery of the task that serves a client: its siblings.

    A nursery of its own would cost each client that is slow as much as a task does. So that none
    outlives the client, its task must :meth:`wait` for them. ``on_bug`` is called when one has
    raised; the exception is then in ``bug``, and does not reach the nursery.
    """

    __slots__ = ("_ended", "_nursery", "_on_bug", "_running", "_scopes", "bug")

    def __init__(self, nursery: trio.Nursery, on_bug: Callable[[], None]) -> None:
        self._nursery = nursery
        self._on_bug = on_bug
        self._running = 0
        self._scopes: set[trio.CancelScope] = set()
        self._ended: trio.Event | None = None
        self.bug: Exception | None = None

    def start(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task until it is done, or until :meth:`cancel`."""
        scope = trio.CancelScope()
        self._scopes.add(scope)

        async def run() -> None:
            with scope:
                await task()
            self._scopes.discard(scope)

        self.start_unscoped(run)

    def start_unscoped(self, task: Callable[[], Awaitable[None]]) -> None:
        """Run a task that is ended in another way."""
        self._running += 1
        self._nursery.start_soon(self._run, task)

    async def _run(self, task: Callable[[], Awaitable[None]]) -> None:
        try:
            await task()
        except Exception as bug:
            self.bug = bug
            self._on_bug()
        finally:
            self._running -= 1
            if not self._running and self._ended is not None:
                self._ended.set()

    def cancel(self) -> None:
        """Cancel those that have a scope."""
        for scope in self._scopes:
            scope.cancel()

    async def wait(self) -> None:
        """Wait until all have ended."""
        while self._running:
            self._ended = trio.Event()
            await self._ended.wait()
