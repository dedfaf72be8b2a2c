"""The client for synchronous code."""

import ssl
import time
from collections.abc import Iterable, Iterator
from typing import Self, TypeVar

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


class ApiClient:
    """Calls the HTTP API of a gateway, see docs/backends.md. Threads may share a client.

    A call is tried up to three times, within a few seconds, where that is safe: if the gateway was
    not reached, or did nothing because Redis did not answer or the key is over its rate; and if an
    answer was lost, unless events without an ``id`` were published.

    Arguments:
        url: the address of the gateways, such as ``https://gateway.example``.
        secret: the secret of an API key. It is in no error and no ``repr``.
        confirm: as of :class:`Publisher`.
        timeout: seconds to wait for an answer.
        ssl_context: for ``https``; by default the certificates that httpx trusts.

    Raises :exc:`ValueError` for an invalid URL, secret or ``confirm``.
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
        self._http = httpx.Client(**options(url, secret, timeout, ssl_context))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. No call is possible after that."""
        self._http.close()

    def publish(
        self,
        event: EventToPublish,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
    ) -> str | None:
        """Publish one event; ``event`` and ``id`` are those of :meth:`Publisher.publish`.

        Returns the event id that clients get with it, or None if its type is not durable. Raises
        the exceptions of :meth:`Publisher.publish`.
        """
        payload, has_id = check(event, id)
        try:
            (found,) = self._run(calls.publish([payload], self._confirm, repeatable=has_id))
        except CallFailed as failed:
            raise not_published(failed) from None
        return event_id_of(found)

    def publish_many(self, events: Iterable[EventToPublish]) -> list[Published]:
        """Publish events in order, up to 1,000 with each request; return what became of each.

        Of two requests the second is sent if the first was answered. A failure is the ``error`` of
        its event, and is not raised.
        """
        outcomes = Outcomes(events)
        for batch in outcomes.batches:
            call = calls.publish(batch.payloads, self._confirm, repeatable=batch.repeatable)
            try:
                found = self._run(call)
            except CallFailed as failed:
                outcomes.failed(batch, failed)
                break
            outcomes.answered(batch, found)
        return outcomes.published

    def disconnect(
        self,
        tenant_id: int,
        *,
        user_id: str | int | None = None,
        session_id: int | None = None,
        jti: str | None = None,
        reason: str = "",
    ) -> Disconnected:
        """Close the connections of a user, of a session, or with one token, with 4001.

        It does not revoke a token. If its answer is lost it is sent again: then who has come back
        meanwhile is closed, too, and ``closed`` counts the second time alone. Raises
        :exc:`CallFailed`.
        """
        return self._run(calls.disconnect(tenant_id, user_id, session_id, jti, reason))

    def refresh(self, tenant_id: int, waiter_id: str | int) -> Refreshed:
        """Load the sectors of a waiter again. Raises :exc:`CallFailed`."""
        return self._run(calls.refresh(tenant_id, waiter_id))

    def presence(self, tenant_id: int, branch_id: int, *, node: str | None = None) -> Presence:
        """Who is present in a branch, on one process or on all. Raises :exc:`CallFailed`."""
        return self._run(calls.presence(tenant_id, branch_id, node))

    def nodes(self) -> list[Node]:
        """The processes of the service. Raises :exc:`CallFailed`."""
        return self._run(calls.nodes())

    def receipts(self, event_id: str) -> EventReceipts:
        """Who has received an event, of a type that has receipts. Raises :exc:`CallFailed`."""
        return self._run(calls.receipts(event_id))

    def why(self, event_id: str) -> EventPath:
        """What became of an event, of any type. Raises :exc:`CallFailed`."""
        return self._run(calls.why(event_id))

    def slo(self, tenant_id: int | None = None, *, limit: int = 100) -> Slo:
        """How long the events of tenants take to their clients. Raises :exc:`CallFailed`."""
        return self._run(calls.slo(tenant_id, limit))

    def history(self, tenant_id: int, branch_id: int, since: float | str) -> Iterator[HistoryPage]:
        """The durable events of a branch, page by page, until the present.

        ``since`` is a unix time in seconds, or an event id. Raises :exc:`CallFailed` from the
        iteration.
        """
        following: Call[calls.Page] | None = calls.history(tenant_id, branch_id, since)
        while following is not None:
            found = self._run(following)
            yield found.page
            following = found.following

    def _run(self, call: Call[T]) -> T:
        attempts = Attempts(call)
        while True:
            request = self._http.build_request(
                call.method, call.path, params=call.params, content=call.body
            )
            try:
                return read_answer(call, self._http.send(request))
            except httpx.HTTPError as error:
                failed = not_answered(error, request.url)
            except CallFailed as error:
                failed = error
            time.sleep(attempts.pause_after(failed))
