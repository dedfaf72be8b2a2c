"""A session: what is said and heard on one socket, from the upgrade to its end."""

import json
import logging
import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import trio

from ..core.close_codes import Close
from .credential import Credential
from .feed import Feed, Intervals, Item, Pong, Renewed, Resumed, Sectors
from .policy import Next, after_close
from .transport import Ended, Wire

PING_INTERVAL: Final = 25.0  # seconds between two pings, or less if the gateway asks for it
MIN_PING_INTERVAL: Final = (
    0.5  # seconds, whatever the gateway says: pings count towards its rate limit
)
REPLY_TIMEOUT: Final = 10.0  # seconds without a byte after a ping, and for sending anything
CLOSE_TIMEOUT: Final = 0.5  # seconds for it to arrive

log = logging.getLogger("trio_gateway.client")


@dataclass(frozen=True, slots=True)
class Ending:
    """How a connection ended, or why there was none; ``error`` if no gateway was reached."""

    code: int
    reason: str
    next: Next
    error: Exception | None = None
    retry_after: float | None = None  # seconds, by the header of an HTTP answer


def broken(reason: str, error: Exception | None = None) -> Ending:
    return Ending(Close.ABNORMAL, reason, Next.BACK_OFF, error)


@dataclass(eq=False)
class _Question:
    answered: trio.Event = field(default_factory=trio.Event)
    sectors: tuple[int, ...] | None = None


class Session:
    """The session on one socket. ``hand_on`` passes an item to the reader; it waits for room."""

    def __init__(
        self,
        wire: Wire,
        feed: Feed,
        credential: Credential,
        hand_on: Callable[[Item], Awaitable[None]],
    ) -> None:
        self._wire = wire
        self._feed = feed
        self._credential = credential
        self._hand_on = hand_on
        self._early: list[Item] = []
        self._reading: trio.CancelScope | None = None  # while nothing is handed on
        # Only a pong for each ping shows that the gateway lives now: other messages may have been
        # on their way before the network went.
        self._unanswered = 0
        self._dead = False  # the stream: it is to be given up
        self._renewed = trio.Event()
        self._ping_every = PING_INTERVAL
        self._told_intervals = trio.Event()
        self._asked: list[_Question] = []

    async def get_in(self, host: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Connect, and wait until the reply to a resume says that we are admitted.

        Items that arrive meanwhile are kept for :meth:`run`: a slow reader must not use up the time
        for connecting. Raises :exc:`Ended` and :exc:`NoUpgrade`.
        """
        await self._wire.upgrade(host, target, headers)
        await self._wire.send(_message("resume", last_event_id=self._feed.place))
        while not any(isinstance(item, Resumed) for item in self._early):
            self._early += self._feed.read(await self._wire.receive())
        self._credential.held()

    async def run(self) -> Ending:
        """Pass on items until the connection ends; send pings and renewals meanwhile."""
        self._wire.on_data = self._moved
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            nursery.start_soon(self._renew)
            try:
                ending = await self._hear()
            except trio.Cancelled:
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await self._wire.say_goodbye()
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
        question = _Question()
        self._asked.append(question)
        try:
            with trio.move_on_after(REPLY_TIMEOUT):
                if await self._say(_message("refresh_sectors")):
                    await question.answered.wait()
                else:
                    raise ConnectionError("the connection has ended")
        finally:
            if question in self._asked:
                self._asked.remove(question)
        if not question.answered.is_set():
            raise TimeoutError("the gateway did not say the sectors")
        if question.sectors is None:
            raise ConnectionError("the connection has ended")
        return question.sectors

    async def _hear(self) -> Ending:
        """Pass on everything that was read: an event counts as seen once it was read, and a resume
        would not bring it again.
        """
        for item in self._early:
            await self._hand_on(item)
        try:
            while not self._dead:
                with trio.CancelScope() as self._reading:
                    if self._unanswered:
                        self._reading.deadline = trio.current_time() + REPLY_TIMEOUT
                    text = await self._wire.receive()
                reading, self._reading = self._reading, None
                if reading.cancelled_caught:
                    break
                for item in self._feed.read(text):
                    match item:
                        case Renewed(expires_at):
                            self._credential.renewed(expires_at)
                            self._renewed.set()
                        case Intervals(silence):
                            self._ping_every = min(
                                PING_INTERVAL, max(MIN_PING_INTERVAL, silence / 2)
                            )
                            self._told_intervals.set()
                        case Sectors(ids):
                            self._answer(ids)
                        case Pong():
                            self._unanswered = max(0, self._unanswered - 1)
                        case _:
                            await self._hand_on(item)
        except Ended as ended:
            return after(ended, self._credential)
        finally:
            self._reading = None
        return broken("no answer to a ping")

    def _moved(self) -> None:
        """Bytes have arrived: on a slow link, half a message is an answer to a ping, too."""
        if self._reading is not None and self._reading.deadline != math.inf:
            self._reading.deadline = trio.current_time() + REPLY_TIMEOUT

    def _answer(self, sectors: tuple[int, ...] | None) -> None:
        """Answer all requests for the sectors; None: the connection has ended."""
        for question in self._asked:
            question.sectors = sectors
            question.answered.set()
        self._asked.clear()

    async def _beat(self) -> None:
        """Send pings, and set a deadline for their answers."""
        began = trio.current_time()
        if not await self._say(_message("intervals")):
            return
        with trio.move_on_at(began + PING_INTERVAL):  # an older gateway does not answer
            await self._told_intervals.wait()
        await trio.sleep_until(began + self._ping_every)
        while await self._say("ping"):
            self._unanswered += 1
            # While the reader is slow nothing is read, and no answer can be missed.
            if self._reading is not None:
                self._reading.deadline = trio.current_time() + REPLY_TIMEOUT
            await trio.sleep(self._ping_every)

    async def _renew(self) -> None:
        """Renew the credential in place before it expires."""
        credential = self._credential
        while credential.renew_at is not None:
            await trio.sleep_until(credential.renew_at)
            credential.postpone()
            try:
                token = await credential.offer()
            except Exception as error:  # the present one holds for a while: again, later
                log.warning("the token provider failed", exc_info=error)
                continue
            if token is None:
                continue
            self._renewed = trio.Event()
            if not await self._say(_message("auth", token=token)):
                return
            with trio.move_on_after(REPLY_TIMEOUT):
                await self._renewed.wait()

    async def _say(self, text: str) -> bool:
        """Send a message; return whether that succeeded. After a timeout the stream is unusable."""
        with trio.move_on_after(REPLY_TIMEOUT):
            try:
                await self._wire.send(text)
            except Ended:
                return False  # receiving reports the reason
            return True
        self._dead = True
        if self._reading is not None:
            self._reading.cancel()
        return False


def after(ended: Ended, credential: Credential) -> Ending:
    """Decide what follows after the gateway, or the network, has ended a connection."""
    what = after_close(ended.code)
    if what is Next.RENEW:
        credential.refused(ended.code, ended.reason)
    return Ending(ended.code, ended.reason, what)


def _message(name: str, **keys: str) -> str:
    return json.dumps({"type": name, **keys})
