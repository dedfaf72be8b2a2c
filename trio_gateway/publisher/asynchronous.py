"""The publisher for asyncio and Trio."""

from collections.abc import Callable
from functools import partial
from typing import Any, Self, TypeVar

import sniffio

from .payload import EventToPublish
from .sync import Publisher

T = TypeVar("T")


class AsyncPublisher:
    """A :class:`Publisher` for asyncio and Trio: ``async with AsyncPublisher(url) as publisher``.

    It runs the synchronous publisher in a worker thread, one event at a time and in the order of
    the calls. A cancelled call may still have published its event. It belongs to the event
    loop in which it was entered.

    Takes the arguments of :class:`Publisher`, and raises the same exceptions.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._publisher = Publisher(url, **options)
        self._in_thread: _InThread | None = None

    async def __aenter__(self) -> Self:
        library = sniffio.current_async_library()
        if library == "trio":
            self._in_thread = _TrioThread()
        elif library == "asyncio":
            self._in_thread = _AsyncioThread()
        else:
            raise RuntimeError(f"AsyncPublisher runs on asyncio and Trio, not on {library}")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._in_thread = None
        self._publisher.close()

    async def publish(
        self,
        event: EventToPublish,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
        stream: str | None = None,
        channel: str | None = None,
    ) -> str | int:
        """Publish one event, as :meth:`Publisher.publish` does.

        Also raises :exc:`RuntimeError` outside of the ``async with`` block.
        """
        if self._in_thread is None:
            raise RuntimeError("not entered: use async with AsyncPublisher(url) as publisher")
        return await self._in_thread.run(
            partial(self._publisher.publish, event, id=id, stream=stream, channel=channel)
        )


class _TrioThread:
    def __init__(self) -> None:
        import trio

        self._one = trio.CapacityLimiter(1)  # first come, first served
        self._run_sync = trio.to_thread.run_sync

    async def run(self, work: Callable[[], T]) -> T:
        return await self._run_sync(work, limiter=self._one)


class _AsyncioThread:
    def __init__(self) -> None:
        import asyncio

        self._one = asyncio.Lock()  # first come, first served
        self._to_thread = asyncio.to_thread

    async def run(self, work: Callable[[], T]) -> T:
        async with self._one:
            return await self._to_thread(work)


_InThread = _TrioThread | _AsyncioThread
