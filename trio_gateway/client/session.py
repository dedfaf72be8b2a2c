"""A session: what is said and heard on one socket, from the upgrade to its end."""

import json
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Final

import trio

from ..core.closing import Close
from .credential import Credential
from .feed import Feed, Item, Renewed, Resumed
from .policy import Next, after_close, life_left
from .wire import Ended, Wire

PING_EVERY: Final = 25.0  # seconds: the gateway wants a word from us every 60
PATIENCE: Final = 10.0  # seconds for the answer to a ping, and to send anything
RENEW_AT: Final = 0.8  # of what is left of a token's life
GOODBYE: Final = 0.5  # seconds for it to arrive

log = logging.getLogger("trio_gateway.client")


@dataclass(frozen=True, slots=True)
class Ending:
    """How it ended, or why it never began; ``error`` if there was no gateway to say so."""

    code: int
    reason: str
    next: Next
    error: Exception | None = None


def broken(reason: str, error: Exception | None = None) -> Ending:
    return Ending(Close.ABNORMAL, reason, Next.BACK_OFF, error)


class Session:
    """One socket's. ``hand_on`` gives an item to the reader, and waits while he has too many."""

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
        self._dead = False  # the stream: it is to be given up
        self._renewed = trio.Event()

    async def get_in(self, host: str, target: str, headers: Sequence[tuple[bytes, bytes]]) -> None:
        """Connect, and wait until the answer to a resume says that we are let in.

        What comes meanwhile is kept for later: the reader may be slow, and the time for connecting
        is not his. Raises :exc:`Ended` and :exc:`NoUpgrade`.
        """
        await self._wire.upgrade(host, target, headers)
        await self._wire.send(_message("resume", last_event_id=self._feed.place))
        while not any(isinstance(item, Resumed) for item in self._early):
            self._early += self._feed.read(await self._wire.receive())
        self._credential.held()

    async def run(self) -> Ending:
        """Hand on what comes until it has ended, with a word from us now and then."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._beat)
            nursery.start_soon(self._renew)
            try:
                ending = await self._hear()
            except trio.Cancelled:
                with trio.move_on_after(GOODBYE, shield=True):
                    await self._wire.say_goodbye()
                raise
            nursery.cancel_scope.cancel()
        return ending

    async def _hear(self) -> Ending:
        """What was taken off the wire is always handed on: an event counts as seen once it was
        read, and a resume would not bring it again.
        """
        for item in self._early:
            await self._hand_on(item)
        try:
            while not self._dead:
                with trio.CancelScope() as self._reading:
                    text = await self._wire.receive()
                reading, self._reading = self._reading, None
                if reading.cancelled_caught:
                    break
                for item in self._feed.read(text):
                    if isinstance(item, Renewed):
                        self._credential.renewed(item.expires_at)
                        self._renewed.set()
                    else:
                        await self._hand_on(item)
        except Ended as ended:
            return after(ended, self._credential)
        finally:
            self._reading = None
        return broken("no answer to a ping")

    async def _beat(self) -> None:
        """Say something now and then, and look whether it is answered."""
        await trio.sleep(PING_EVERY)
        while await self._say("ping"):
            # While the reader is slow nothing is read, and no answer can be missed.
            if self._reading is not None:
                self._reading.deadline = trio.current_time() + PATIENCE
            await trio.sleep(PING_EVERY)

    async def _renew(self) -> None:
        """Renew the credential in place before it expires."""
        credential = self._credential
        while credential.renewable and credential.expires_at is not None:
            left = life_left(credential.token, credential.expires_at, time.time())
            await trio.sleep(max(1.0, RENEW_AT * left))
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
            with trio.move_on_after(PATIENCE):
                await self._renewed.wait()

    async def _say(self, text: str) -> bool:
        """Whether it could be sent. What is stuck half-way has spoilt the stream."""
        with trio.move_on_after(PATIENCE):
            try:
                await self._wire.send(text)
            except Ended:
                return False  # whoever receives finds out how
            return True
        self._dead = True
        if self._reading is not None:
            self._reading.cancel()
        return False


def after(ended: Ended, credential: Credential) -> Ending:
    """What comes after the gateway, or the network, has ended a socket."""
    what = after_close(ended.code)
    if what is Next.RENEW:
        credential.refused(ended.reason)
    return Ending(ended.code, ended.reason, what)


def _message(name: str, **keys: str) -> str:
    return json.dumps({"type": name, **keys})
