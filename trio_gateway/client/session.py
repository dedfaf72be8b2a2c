"""A session: the messages on one WebSocket, from the upgrade to its end."""

import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from ..core.close_codes import Close
from .confirming import Confirming
from .credential import Credential
from .feed import Feed, Intervals, Item, Pong, Renewed, Resumed, Sectors
from .messages import message
from .policy import Next, after_close
from .presence import Presences, PresenceWatch, PresenceWatches
from .receipts import Receipts, Seen
from .transport import Ended, WebSocket

PING_INTERVAL: Final = 25.0  # seconds between two pings; less if the gateway requires it
MIN_PING_INTERVAL: Final = 0.5  # seconds, because pings count towards the gateway's rate limit
REPLY_TIMEOUT: Final = 10.0  # seconds without a byte after a ping; also for sending a message
CLOSE_TIMEOUT: Final = 0.5  # seconds for the close handshake

log = logging.getLogger("trio_gateway.client")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended, or why there was none; ``error`` if no gateway was reached."""

    code: int
    reason: str
    next: Next
    error: Exception | None = None
    retry_after: float | None = None  # seconds, from the header of an HTTP response


def broken(reason: str, error: Exception | None = None) -> Ending:
    """The ending of a connection that broke or could not be made."""
    return Ending(Close.ABNORMAL, reason, Next.BACK_OFF, error)


@dataclass(eq=False)
class _SectorRequest:
    answered: trio.Event = field(default_factory=trio.Event)
    sectors: tuple[int, ...] | None = None


class Session:
    """The session on one WebSocket.

    ``pass_on`` gives an item to the reader, waiting for room. ``post_seen`` tells the gateway in a
    request that an event was seen, and returns whether that succeeded.
    """

    def __init__(
        self,
        websocket: WebSocket,
        feed: Feed,
        credential: Credential,
        watches: PresenceWatches,
        receipts: Receipts,
        seen: Seen,
        pass_on: Callable[[Item], Awaitable[None]],
        post_seen: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._websocket = websocket
        self._feed = feed
        self._credential = credential
        self._watches = watches
        self._receipts = receipts
        self._confirming = Confirming(receipts, seen, self._send, post_seen)
        self._pass_on = pass_on
        self._early: list[Item] = []
        self._reading: trio.CancelScope | None = None  # around a receive
        # Only a pong for each ping shows that the gateway is alive: other messages may have been
        # sent before the network failed.
        self._unanswered = 0  # pings
        self._broken = False  # sending timed out: the stream is unusable
        self._renewed = trio.Event()
        self._ping_every = PING_INTERVAL
        self._intervals_known = trio.Event()
        self._requests: list[_SectorRequest] = []

    async def open(self, host: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Connect, and wait for the reply to a resume, which means that the client is admitted.

        Earlier items wait for :meth:`run`: a slow reader must not use up the time for connecting.
        Raises :exc:`Ended` and :exc:`NoUpgrade`.
        """
        await self._websocket.upgrade(host, target, headers)
        await self._websocket.send(
            message("resume", last_event_id=self._feed.last_event_id, **self._receipts.at_resume)
        )
        while not any(isinstance(item, Resumed) for item in self._early):
            self._early += self._feed.read(await self._websocket.receive())
        for item in self._early:
            if isinstance(item, Resumed):
                self._confirming.begin(item.last_event_id)
        self._credential.admitted()

    async def run(self) -> Ending:
        """Pass on items until the connection ends; send pings and renewals meanwhile."""
        self._websocket.on_data = self._on_data
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._send_pings)
            nursery.start_soon(self._renew)
            nursery.start_soon(self._watch_presence)
            nursery.start_soon(self._confirming.run)
            try:
                ending = await self._receive()
            except trio.Cancelled:
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await self._confirming.send_rest()
                    await self._websocket.close()
                raise
            finally:
                self._answer(None)
            nursery.cancel_scope.cancel()
        return ending

    async def refresh_sectors(self) -> tuple[int, ...]:
        """Ask the gateway to look up the sectors, and wait for the answer.

        Raises :exc:`ConnectionError` if the connection ends first, :exc:`TimeoutError` after
        ``REPLY_TIMEOUT``.
        """
        request = _SectorRequest()
        self._requests.append(request)
        try:
            with trio.move_on_after(REPLY_TIMEOUT):
                if await self._send(message("refresh_sectors")):
                    await request.answered.wait()
                else:
                    raise ConnectionError("the connection has ended")
        finally:
            if request in self._requests:
                self._requests.remove(request)
        if not request.answered.is_set():
            raise TimeoutError("the gateway did not answer with the sectors")
        if request.sectors is None:
            raise ConnectionError("the connection has ended")
        return request.sectors

    async def _receive(self) -> Ending:
        """Receive, and pass on everything that was read, until the connection ends.

        An event that was read counts as received, so a resume would not repeat it.
        """
        for item in self._early:
            await self._pass_on(item)
        try:
            while not self._broken:
                with trio.CancelScope() as self._reading:
                    if self._unanswered:
                        self._reading.deadline = trio.current_time() + REPLY_TIMEOUT
                    text = await self._websocket.receive()
                reading, self._reading = self._reading, None
                if reading.cancelled_caught:
                    break
                for item in self._feed.read(text):
                    match item:
                        case Renewed(expires_at):
                            self._credential.renewed(expires_at)
                            self._renewed.set()
                        case Intervals(silence, types):
                            self._confirming.track(types)
                            self._ping_every = min(
                                PING_INTERVAL, max(MIN_PING_INTERVAL, silence / 2)
                            )
                            self._intervals_known.set()
                        case Sectors(ids):
                            self._answer(ids)
                        case Presences():
                            self._watches.receive(item)
                        case Pong():
                            self._unanswered = max(0, self._unanswered - 1)
                            if not self._unanswered:
                                self._confirming.answered()
                        case _:
                            await self._pass_on(item)
        except Ended as ended:
            return after(ended, self._credential)
        finally:
            self._reading = None
        return broken("no answer to a ping")

    def _on_data(self) -> None:
        """Extend the deadline: on a slow link, half a message also shows that the link works."""
        if self._reading is not None and self._reading.deadline != math.inf:
            self._reading.deadline = trio.current_time() + REPLY_TIMEOUT

    def _answer(self, sectors: tuple[int, ...] | None) -> None:
        """Answer all requests for the sectors; None means that the connection has ended."""
        for request in self._requests:
            request.sectors = sectors
            request.answered.set()
        self._requests.clear()

    async def _send_pings(self) -> None:
        """Send pings, and set a deadline for their answers."""
        began = trio.current_time()
        if not await self._send(message("intervals")):
            return
        # A gateway of an older version does not answer.
        with trio.move_on_at(began + PING_INTERVAL):
            await self._intervals_known.wait()
        await trio.sleep_until(began + self._ping_every)
        while await self._send(self._ping()):
            self._confirming.pings += 1
            self._unanswered += 1
            # While the reader is slow nothing is received, so no deadline is set.
            if self._reading is not None:
                self._reading.deadline = trio.current_time() + REPLY_TIMEOUT
            await trio.sleep(self._ping_every)

    def _ping(self) -> str:
        last = self._receipts.last_event_id
        return message("ping", last_event_id=last) if last else "ping"

    async def _renew(self) -> None:
        """Renew the credential in place before it expires."""
        credential = self._credential
        while credential.renew_at is not None:
            await trio.sleep_until(credential.renew_at)
            credential.postpone()
            try:
                token = await credential.offer()
            except Exception as error:  # the present token is still valid: try again later
                log.warning("the token provider failed", exc_info=error)
                continue
            if token is None:
                continue
            self._renewed = trio.Event()
            if not await self._send(message("auth", token=token)):
                return
            with trio.move_on_after(REPLY_TIMEOUT):
                await self._renewed.wait()

    async def _watch_presence(self) -> None:
        """Watch the branches that the application watches, and no others."""
        asked: dict[int, PresenceWatch] = {}
        while True:
            wanted, changed = dict(self._watches.by_branch), self._watches.changed
            # A branch whose watch is another one is asked for again, to receive its whole state.
            ended = [branch for branch, watch in asked.items() if wanted.get(branch) is not watch]
            begun = [branch for branch, watch in wanted.items() if asked.get(branch) is not watch]
            names = [("unwatch_presence", each) for each in ended]
            names += [("watch_presence", each) for each in begun]
            for name, branch_id in names:
                if not await self._send(message(name, branch_id=branch_id)):
                    return
            asked = wanted
            await changed.wait()

    async def _send(self, text: str) -> bool:
        """Send a message; return whether that succeeded. After a timeout the stream is unusable."""
        with trio.move_on_after(REPLY_TIMEOUT):
            try:
                await self._websocket.send(text)
            except Ended:
                return False  # receiving reports the reason
            return True
        self._broken = True
        if self._reading is not None:
            self._reading.cancel()
        return False


def after(ended: Ended, credential: Credential) -> Ending:
    """Decide what to do after the gateway, or the network, has ended a connection."""
    following = after_close(ended.code)
    if following is Next.RENEW:
        credential.refused(ended.code, ended.reason)
    return Ending(ended.code, ended.reason, following)
