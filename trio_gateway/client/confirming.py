"""Tell the gateway, on one connection, which events the application has taken and seen."""

from collections.abc import Awaitable, Callable
from typing import Final

import trio

from .messages import message
from .receipts import Receipts, Seen

ACK_DELAY: Final = 0.15  # seconds in which events are collected for one ack; it is due after 0.2
SEEN_INTERVAL: Final = 0.1  # seconds between two messages, which count towards the rate limit
_SEEN_AT_END: Final = 10  # such messages that are sent at once when the connection is closed


class Confirming:
    """Sends what is in ``receipts`` and ``seen``; ``pings`` is how many pings have been sent.

    ``send`` sends a message, ``post_seen`` tells in a request that an event was seen; both return
    whether that succeeded.
    """

    def __init__(
        self,
        receipts: Receipts,
        seen: Seen,
        send: Callable[[str], Awaitable[bool]],
        post_seen: Callable[[str], Awaitable[bool]],
    ) -> None:
        self._receipts, self._seen = receipts, seen
        self._send, self._post_seen = send, post_seen
        self._known = trio.Event()  # set when the gateway has said what it tracks
        self.pings = 0

    def begin(self, position: str) -> None:
        """The connection begins at this position."""
        self._receipts.begin(position)
        self._seen.reconnected()

    def track(self, types: frozenset[str]) -> None:
        """The gateway tracks the events of these types."""
        self._receipts.types = types
        self._known.set()

    def answered(self) -> None:
        """All pings have an answer."""
        self._seen.answered(self.pings)

    async def run(self) -> None:
        """Send what there is; return if the gateway tracks nothing or cannot be reached."""
        await self._known.wait()
        if self._receipts.types:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._send_acks)
                nursery.start_soon(self._send_seen)

    async def send_rest(self) -> None:
        """Send what waits, before the connection is closed."""
        for event_id in self._receipts.acks:
            await self._acknowledge(event_id)
        if self._receipts.types:
            here = [each for each in self._seen.waiting if self._receipts.has(each)]
            for event_id in here[:_SEEN_AT_END]:
                await self._tell_seen(event_id)

    async def _send_acks(self) -> None:
        while True:
            await self._receipts.wait()
            await trio.sleep(ACK_DELAY)
            for event_id in self._receipts.acks:
                if not await self._acknowledge(event_id):
                    return

    async def _acknowledge(self, event_id: str) -> bool:
        sent = await self._send(message("ack", last_event_id=event_id))
        self._receipts.acknowledged(event_id)
        return sent

    async def _send_seen(self) -> None:
        while True:
            event_id = await self._seen.next_one()
            if self._receipts.has(event_id):
                if not await self._tell_seen(event_id):
                    return
            elif await self._post_seen(event_id):  # a message would be ignored
                self._seen.known(event_id)
            else:
                self._seen.failed(event_id)
            await trio.sleep(SEEN_INTERVAL)

    async def _tell_seen(self, event_id: str) -> bool:
        sent = await self._send(message("seen", event_id=event_id))
        self._seen.told(event_id, self.pings)
        return sent
