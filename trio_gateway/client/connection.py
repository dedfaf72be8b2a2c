"""One connection to the gateway, over any number of sockets."""

import logging
import math
import random
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager
from inspect import isawaitable
from typing import Final, Self

import trio

from ..core.close_codes import parse_retry_hint
from ..core.newest import Newest
from ..core.resilience import Backoff
from .address import Dial, read_address
from .credential import Credential, NoToken
from .feed import Feed, Item, Missed, Repeated, Resumed
from .policy import Next, after_status
from .posting import post
from .presence import PresenceWatches
from .receipts import Receipts, Seen
from .session import Ending, Session, after, broken
from .transport import Ended, NoUpgrade, WebSocket
from .values import Event, Gap, Presence, Refused, Status, TokenProvider

CONNECT_TIMEOUT: Final = 15.0  # seconds, from asking for a token to admission
STABLE: Final = 10.0  # seconds; a longer connection restarts the back-off
COOL_DOWN: Final = 30.0  # seconds at least, and at most twice that
FIRST_BOUND: Final = 1.0  # seconds, of the back-off
LONGEST_BOUND: Final = 30.0

log = logging.getLogger("trio_gateway.client")


@asynccontextmanager
async def connect(
    url: str,
    token: str | TokenProvider,
    *,
    last_event_id: str = "",
    on_gap: Callable[[Gap], Awaitable[None] | None] | None = None,
    on_state: Callable[[Status], None] | None = None,
    origin: str | None = None,
    buffer: int = 100,
    confirm: bool = True,
    ssl_context: ssl.SSLContext | None = None,
    dial: Dial | None = None,
) -> AsyncIterator["Client"]:
    """Connect to an endpoint, and stay connected until the block is left.

    Arguments:
        url: the endpoint, for example ``wss://gateway.example/ws/waiter``, without a token.
        token: a token, or a function, sync or async, that returns one. It is called before every
            connect and before the token expires. Its argument is True if the last token was
            refused, so that it can skip a cached token.
        last_event_id: resume after this event; by default begin at the present.
        on_gap: called, sync or async, when events may be missing: fetch your state again. The
            iteration calls it at its place among the events.
        on_state: called with each new status, at once.
        origin: the ``Origin`` header.
        buffer: the number of events that wait here for a slow reader. Further events wait in the
            gateway. If they exceed its limit, it skips those that are not durable, which is a gap.
        confirm: tell the gateway which events the iteration has returned. False for a program that
            only watches, so that nobody takes it for somebody who has the events.
        ssl_context: for ``wss://``; by default the system's certificates.
        dial: opens the stream, for example through a proxy or to a Unix socket.

    Raises :exc:`ValueError` if the URL is invalid or contains a token. An exception of the block is
    raised unchanged, not in a group.
    """
    address = read_address(url, ssl_context)
    client = Client(
        Credential(token),
        Feed(last_event_id),
        host=address.host,
        target=address.target,
        dial=dial or address.dial,
        headers=[] if origin is None else [(b"Origin", origin.encode())],
        on_gap=on_gap,
        on_state=on_state,
        buffer=buffer,
        confirm=confirm,
    )
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(client._run)
            try:
                yield client
            finally:
                nursery.cancel_scope.cancel()
        return
    except BaseExceptionGroup as group:
        if len(group.exceptions) > 1:
            raise
        (only,) = group.exceptions
    finally:
        client._inbox.close()
    raise only  # what the block raised, without the group


class Client:
    """A connection made by :func:`connect`. Iterate over it for events, in one task at a time."""

    def __init__(
        self,
        credential: Credential,
        feed: Feed,
        *,
        host: str,
        target: str,
        dial: Dial,
        headers: list[tuple[bytes, bytes]],
        on_gap: Callable[[Gap], Awaitable[None] | None] | None,
        on_state: Callable[[Status], None] | None,
        buffer: int,
        confirm: bool,
    ) -> None:
        self._credential, self._feed = credential, feed
        self._host, self._target, self._dial, self._headers = host, target, dial, headers
        self._on_gap, self._on_state = on_gap, on_state
        # Each item with the receipts of the connection that it came on.
        self._inbox_in, self._inbox = trio.open_memory_channel[tuple[Receipts, Item]](buffer)
        self._newest = Newest(feed.last_event_id)
        self._confirm, self._seen = confirm, Seen()
        self._refusal: Refused | None = None
        self._watches = PresenceWatches()
        self._settled = trio.Event()  # set when first admitted, or refused
        self._opened_at = math.inf
        self._session: Session | None = None  # while open
        self.status = Status("connecting")

    @property
    def last_event_id(self) -> str:
        """The id to resume after, of the newest event returned so far. Store it for restarts."""
        return self._newest.event_id

    def seen(self, event: Event | str) -> None:
        """Tell the gateway that the application, or its user, has seen this durable event, or the
        one with this id; at the latest when the gateway can be reached again.

        Raises :exc:`ValueError` for an event without an ``event_id``.
        """
        event_id = event if isinstance(event, str) else event.event_id
        if event_id is None:
            raise ValueError("an event without event_id cannot be confirmed")
        self._seen.add(event_id)

    async def wait_open(self) -> None:
        """Wait until the gateway has admitted this client for the first time.

        From then on no durable event is missed without a call of ``on_gap``. Raises :exc:`Refused`.
        """
        await self._settled.wait()
        if self._refusal is not None:
            raise self._refusal

    async def refresh_sectors(self) -> tuple[int, ...]:
        """Ask the gateway to look up this waiter's sectors now; return their ids.

        Another task must iterate meanwhile if events arrive. Raises :exc:`ConnectionError` without
        a connection, :exc:`TimeoutError` without a reply.
        """
        if self._session is None:
            raise ConnectionError(f"not connected: {self.status.state}")
        return await self._session.refresh_sectors()

    def watch_presence(self, branch_id: int) -> AbstractContextManager[AsyncIterator[Presence]]:
        """Watch who is present in a branch of this admin, until the block is left.

        Iterate for everybody who is present, now and after each change and reconnect; a slow reader
        gets the newest state. The gateways need ``WS_CLUSTER``. Another task must iterate over the
        client meanwhile if events arrive. Raises :exc:`ValueError` if it is watched already.
        """
        return self._watches.watching(branch_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        """Return the next event.

        Raises :exc:`Refused` when the gateway has refused this client for good, and
        :exc:`trio.ClosedResourceError` after the block of :func:`connect` was left.
        """
        while True:
            try:
                receipts, item = await self._inbox.receive()
            except trio.EndOfChannel:
                assert self._refusal is not None
                raise self._refusal from None
            match item:
                case Event():
                    if item.event_id is not None:
                        self._newest.advance(item.event_id)
                        receipts.take(item.type, item.event_id)
                    return item
                case Repeated(name, event_id):
                    receipts.take(name, event_id)
                case Resumed(last_event_id):
                    self._newest = Newest(last_event_id)
                case Missed(reason):
                    if self._on_gap is not None and isawaitable(called := self._on_gap(reason)):
                        await called

    async def _run(self) -> None:
        """Connect again and again, until refused or cancelled."""
        failures, backoff = 0, Backoff(FIRST_BOUND, LONGEST_BOUND)
        while True:
            self._opened_at = math.inf
            ending = await self._attempt()
            if trio.current_time() - self._opened_at >= STABLE:
                failures = 0
            if ending.next is Next.STOP:
                self._set_status(Status("refused", ending.code, ending.reason, None, ending.error))
                self._refusal = Refused(ending.code, ending.reason)
                self._watches.refuse(self._refusal)
                self._settled.set()
                self._inbox_in.close()
                return
            if (hint := parse_retry_hint(ending.reason)) is not None:
                wait = hint  # the gateway has already spread its clients over time
            elif ending.retry_after is not None:
                wait = ending.retry_after + backoff.after(failures)
                failures += 1
            elif ending.next is Next.COOL_DOWN:
                wait = COOL_DOWN * (1 + random.random())  # noqa: S311 - spreads load
            elif ending.next is Next.RENEW and not failures:
                wait, failures = 0.0, 1
            else:
                wait, failures = backoff.after(failures), failures + 1
            self._set_status(Status("waiting", ending.code, ending.reason, wait, ending.error))
            await trio.sleep(wait)

    async def _attempt(self) -> Ending:
        """Connect, and receive until the connection ends."""
        self._set_status(Status("connecting"))
        stream: trio.abc.Stream | None = None
        receipts = Receipts(confirm=self._confirm)

        async def pass_on(item: Item) -> None:
            await self._inbox_in.send((receipts, item))

        try:
            with trio.move_on_after(CONNECT_TIMEOUT) as connecting:
                if (ending := await self._get_token()) is not None:
                    return ending
                stream = await self._dial()
                session = Session(
                    WebSocket(stream),
                    self._feed,
                    self._credential,
                    self._watches,
                    receipts,
                    self._seen,
                    pass_on,
                    self._post_seen,
                )
                token = (b"Authorization", b"Bearer " + self._credential.token.encode())
                await session.open(self._host, self._target, [token, *self._headers])
            if connecting.cancelled_caught:
                return broken(f"not connected in {CONNECT_TIMEOUT:g} s", TimeoutError())
            self._opened_at = trio.current_time()
            self._settled.set()
            self._set_status(Status("open"))
            self._session = session
            return await session.run()
        except Ended as ended:
            return after(ended, self._credential)
        except NoUpgrade as refused:
            if refused.status is None:
                return broken("the server there does not speak WebSocket", refused)
            following, reason = after_status(refused.status), f"HTTP {refused.status}"
            if following is Next.RENEW:
                self._credential.refused(refused.status, reason)
            return Ending(refused.status, reason, following, refused, refused.retry_after)
        except (OSError, trio.BrokenResourceError) as error:
            return broken("can't connect", error)
        finally:
            self._session = None
            if stream is not None:
                await trio.aclose_forcefully(stream)

    async def _post_seen(self, event_id: str) -> bool:
        path = self._target.partition("?")[0].rpartition("/")[0] + "/receipts"
        headers = [(b"Authorization", b"Bearer " + self._credential.token.encode()), *self._headers]
        status = await post(self._dial, self._host, path, headers, {"event_id": event_id})
        return status is not None and status < 429 and status != 401

    async def _get_token(self) -> Ending | None:
        try:
            await self._credential.get()
        except NoToken as none:
            return Ending(none.code, str(none), Next.STOP)
        except Exception as error:
            log.warning("the token provider failed", exc_info=error)
            return broken("the token provider failed", error)
        return None

    def _set_status(self, status: Status) -> None:
        self.status = status
        if self._on_state is not None:
            self._on_state(status)
