"""Calls from Trio into an asyncio loop, which redis-py needs."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

import outcome
import trio
import trio_asyncio


class _Call:
    """A call on its way to the asyncio loop, and its outcome."""

    __slots__ = ("command", "done", "outcome", "scope")

    def __init__(self, command: Callable[[], Awaitable[Any]]) -> None:
        self.command = command
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.outcome: outcome.Outcome[Any] | None = None

    async def run(self, loop: Any) -> None:
        with self.scope:
            # Cancelled is of this task: raised in the caller's, it would end a nursery there
            # without an error.
            try:
                result = await trio_asyncio.aio_as_trio(self.command, loop=loop)
            except (Exception, asyncio.CancelledError) as error:
                self.outcome = outcome.Error(error)
            else:
                self.outcome = outcome.Value(result)
            self.done.set()


class AsyncioCalls:
    """An asyncio loop, and calls into it."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[_Call](0)

    async def run(self, close: Callable[[], Awaitable[None]], close_timeout: float) -> NoReturn:
        """Run the loop; returns only when cancelled.

        Then ``close`` is called in the loop, and may take that many seconds.
        """
        async with trio_asyncio.open_loop() as loop:
            try:
                async with trio.open_nursery() as nursery:
                    while True:
                        nursery.start_soon((await self._receive.receive()).run, loop)
            finally:
                deadline = trio.current_time() + close_timeout
                with trio.CancelScope(shield=True, deadline=deadline):
                    await trio_asyncio.aio_as_trio(close)()

    async def call(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Call in the loop and return the result; waits until the loop runs.

        If this is cancelled, the call is. If the loop ends first, there is no result: this waits
        until it is cancelled.
        """
        call = _Call(command)
        await self._send.send(call)
        try:
            await call.done.wait()
        finally:
            call.scope.cancel()
        assert call.outcome is not None
        return call.outcome.unwrap()
