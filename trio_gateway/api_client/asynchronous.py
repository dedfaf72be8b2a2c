"""The client for asyncio and Trio."""

import ssl
from collections.abc import AsyncIterator, Iterable
from typing import Self, TypeVar

import anyio
import httpx

from ..publisher.adding import check_confirm
from ..publisher.payload import EventToPublish
from . import calls
from .attempts import Attempts, not_answered, read_answer
from .batches import Outcomes, check, event_id_of, not_published
from .calls import Call, Confirm
from .connecting import TIMEOUT, options
from .errors import CallFailed
from .values import (
    Disconnected,
    EventPath,
    EventReceipts,
    HistoryPage,
    Node,
    Presence,
    Published,
    Refreshed,
    Slo,
)

T = TypeVar("T")


class AsyncApiClient:
    """An :class:`ApiClient` for asyncio and Trio: ``async with AsyncApiClient(…) as api``.

    Tasks may share a client, and then their calls run at the same time. A cancelled call may still
    have had its effect. It belongs to the event loop in which it was entered.

    Takes the arguments of :class:`ApiClient`; its methods raise the same exceptions.
    """

    def __init__(
        self,
        url: str,
        secret: str,
        *,
        confirm: Confirm = 0,
        timeout: float = TIMEOUT,
        ssl_context: ssl.SSLContext | None = None,
    ) -> None:
        check_confirm(confirm)
        self._confirm = confirm
        self._http = httpx.AsyncClient(**options(url, secret, timeout, ssl_context))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections. No call is possible after that."""
        await self._http.aclose()

    async def publish(
        self,
        event: EventToPublish,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
    ) -> str | None:
        """Publish one event, as :meth:`ApiClient.publish` does."""
        payload, has_id = check(event, id)
        try:
            (found,) = await self._run(calls.publish([payload], self._confirm, repeatable=has_id))
        except CallFailed as failed:
            raise not_published(failed) from None
        return event_id_of(found)

    async def publish_many(self, events: Iterable[EventToPublish]) -> list[Published]:
        """Publish events in order, as :meth:`ApiClient.publish_many` does."""
        outcomes = Outcomes(events)
        for batch in outcomes.batches:
            call = calls.publish(batch.payloads, self._confirm, repeatable=batch.repeatable)
            try:
                found = await self._run(call)
            except CallFailed as failed:
                outcomes.failed(batch, failed)
                break
            outcomes.answered(batch, found)
        return outcomes.published

    async def disconnect(
        self,
        tenant_id: int,
        *,
        user_id: str | int | None = None,
        session_id: int | None = None,
        jti: str | None = None,
        reason: str = "",
    ) -> Disconnected:
        """Close connections, as :meth:`ApiClient.disconnect` does."""
        return await self._run(calls.disconnect(tenant_id, user_id, session_id, jti, reason))

    async def refresh(self, tenant_id: int, waiter_id: str | int) -> Refreshed:
        """Load the sectors of a waiter again. Raises :exc:`CallFailed`."""
        return await self._run(calls.refresh(tenant_id, waiter_id))

    async def presence(
        self, tenant_id: int, branch_id: int, *, node: str | None = None
    ) -> Presence:
        """Who is present in a branch, on one process or on all. Raises :exc:`CallFailed`."""
        return await self._run(calls.presence(tenant_id, branch_id, node))

    async def nodes(self) -> list[Node]:
        """The processes of the service. Raises :exc:`CallFailed`."""
        return await self._run(calls.nodes())

    async def receipts(self, event_id: str) -> EventReceipts:
        """Who has received an event, of a type that has receipts. Raises :exc:`CallFailed`."""
        return await self._run(calls.receipts(event_id))

    async def why(self, event_id: str) -> EventPath:
        """What became of an event, of any type. Raises :exc:`CallFailed`."""
        return await self._run(calls.why(event_id))

    async def slo(self, tenant_id: int | None = None, *, limit: int = 100) -> Slo:
        """How long the events of tenants take to their clients. Raises :exc:`CallFailed`."""
        return await self._run(calls.slo(tenant_id, limit))

    async def history(
        self, tenant_id: int, branch_id: int, since: float | str
    ) -> AsyncIterator[HistoryPage]:
        """The durable events of a branch, as :meth:`ApiClient.history` gives them."""
        following: Call[calls.Page] | None = calls.history(tenant_id, branch_id, since)
        while following is not None:
            found = await self._run(following)
            yield found.page
            following = found.following

    async def _run(self, call: Call[T]) -> T:
        attempts = Attempts(call)
        while True:
            request = self._http.build_request(
                call.method, call.path, params=call.params, content=call.body
            )
            try:
                return read_answer(call, await self._http.send(request))
            except httpx.HTTPError as error:
                failed = not_answered(error, request.url)
            except CallFailed as error:
                failed = error
            await anyio.sleep(attempts.pause_after(failed))
