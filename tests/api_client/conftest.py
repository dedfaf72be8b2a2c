"""The client in its three forms, with one way to use them."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from typing import Any, TypeVar

import pytest
import trio

from trio_gateway.api_client import ApiClient, AsyncApiClient, HistoryPage

T = TypeVar("T")
Use = Callable[..., Awaitable[Any]]


class Awaitables:
    """A synchronous client with the methods of the asynchronous one."""

    def __init__(self, api: ApiClient) -> None:
        self._api = api

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._api, name)

        async def call(*arguments: Any, **options: Any) -> Any:
            return method(*arguments, **options)

        return call

    async def history(self, *arguments: Any) -> AsyncIterator[HistoryPage]:
        for page in self._api.history(*arguments):
            yield page


@pytest.fixture(params=["sync", "asyncio", "trio"])
def use(request: pytest.FixtureRequest) -> Use:
    """Runs a function with a client: ``await use(work, url, secret, …)``."""
    kind = request.param

    async def with_async(work: Any, *arguments: Any, **options: Any) -> Any:
        async with AsyncApiClient(*arguments, **options) as api:
            return await work(api)

    async def with_sync(work: Any, *arguments: Any, **options: Any) -> Any:
        with ApiClient(*arguments, **options) as api:
            return await work(Awaitables(api))

    async def run(work: Any, *arguments: Any, **options: Any) -> Any:
        if kind == "trio":
            return await with_async(work, *arguments, **options)
        chosen = with_async if kind == "asyncio" else with_sync
        here = partial(chosen, work, *arguments, **options)
        return await trio.to_thread.run_sync(lambda: asyncio.run(here()))

    return run
