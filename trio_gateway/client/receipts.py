"""Receipts: what the gateway is to be told of the events that the application has."""

from typing import Final

import trio

from ..core.newest import Newest, is_event_id

_REMEMBERED: Final = 1000  # event ids
_FAILED: Final = -1  # in place of the number of pings
_MOST_ACKS: Final = 100  # more than one only if events were escalated


class Receipts:
    """The events of one connection that the application has taken.

    ``types`` are those that the gateway tracks; None until it has said so. Without ``confirm`` the
    gateway is told of none.
    """

    def __init__(self, *, confirm: bool) -> None:
        self.types: frozenset[str] | None = None
        self._confirm = confirm
        self._newest = Newest("")
        self._taken: dict[str, None] = {}
        self._acks: list[str] = []
        self._waiting = trio.Event()  # set while there are acks to be sent

    def begin(self, position: str) -> None:
        """Note the position at which the connection begins."""
        self._newest = Newest(position)

    @property
    def at_resume(self) -> dict[str, bool]:
        """What the message says that resumes, and by that confirms earlier events."""
        return {} if self._confirm else {"confirm": False}

    @property
    def last_event_id(self) -> str:
        """What a ping confirms: the newest event that was taken; empty for nothing."""
        return self._newest.event_id if self._confirm else ""

    def has(self, event_id: str) -> bool:
        """Whether this event came on this connection and was taken."""
        return event_id in self._taken

    def take(self, event_type: str, event_id: str) -> None:
        """Note that the application has this event.

        An ack is also for the events before it in the stream, and for those that the gateway sent
        before it. One that is older than others, because it was escalated, needs an ack of its own.
        """
        is_newer = self._newest.advance(event_id)
        self._taken[event_id] = None
        if len(self._taken) > _REMEMBERED:
            del self._taken[next(iter(self._taken))]
        if not (self._confirm and is_event_id(event_id)):
            return
        if self.types is not None and event_type not in self.types:
            return
        tag = event_id[-4:]
        others = [x for x in self._acks if x != event_id and not (is_newer and x[-4:] == tag)]
        self._acks = [*others, event_id][-_MOST_ACKS:]
        self._waiting.set()

    async def wait(self) -> None:
        """Wait until there are acks to be sent."""
        await self._waiting.wait()

    @property
    def acks(self) -> list[str]:
        """The event ids to be acknowledged now."""
        return list(self._acks) if self.types else []

    def acknowledged(self, event_id: str) -> None:
        """Note that an ack was sent."""
        self._acks = [each for each in self._acks if each != event_id]
        if not self._acks:
            self._waiting = trio.Event()


class Seen:
    """The events that the application has seen and that the gateway may not know of.

    A message has no answer, but a later pong shows that it was read. So what was told on a
    connection that is lost before that is told again on the next one.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, None] = {}
        self._told: dict[str, int] = {}  # how many pings had been sent before
        self._added = trio.Event()

    def add(self, event_id: str) -> None:
        """Note an event that the gateway is to be told of. The oldest of too many is forgotten."""
        self._waiting[event_id] = None
        if len(self._waiting) > _REMEMBERED:
            del self._waiting[next(iter(self._waiting))]
        self._added.set()

    def reconnected(self) -> None:
        """What was told on the connection before is to be told again."""
        self._waiting = dict.fromkeys([*self._told, *self._waiting])
        self._told.clear()

    @property
    def waiting(self) -> list[str]:
        """The events that are to be told."""
        return list(self._waiting)

    async def next_one(self) -> str:
        """Wait for an event that is to be told."""
        while not self._waiting:
            self._added = trio.Event()
            await self._added.wait()
        return next(iter(self._waiting))

    def told(self, event_id: str, pings: int) -> None:
        """Note that the gateway was told of an event, after this many pings."""
        self._waiting.pop(event_id, None)
        self._told[event_id] = pings

    def known(self, event_id: str) -> None:
        """Note that the gateway knows of an event."""
        self._waiting.pop(event_id, None)

    def failed(self, event_id: str) -> None:
        """Note that a request has failed; it is repeated after the next pong."""
        self.told(event_id, _FAILED)

    def answered(self, pings: int) -> None:
        """Note that the gateway has read everything that was sent before this ping."""
        failed = [each for each, before in self._told.items() if before == _FAILED]
        self._told = {each: before for each, before in self._told.items() if before >= pings}
        for event_id in failed:
            self.add(event_id)
