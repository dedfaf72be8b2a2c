"""Receipt writing: what changes of the receipts of this process is written to Redis a moment later.

In a Cluster the streams are on several servers. Each stream has a writer of its own there: a server
that does not answer must not delay the receipts that others take. Elsewhere all share one.
"""

from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, NoReturn

import trio

from ..core.event_ids import Stream
from ..core.receipts import Place, Receipt, ReceiptChange, Recipient
from .tracked import Tracked

_PAUSE: Final = 0.1  # seconds between a change and its writing: many share a script
RETRY: Final = 0.5  # seconds
# What a server has taken may be lost when another one takes its place.
_KEPT: Final = 30.0  # seconds for which it is kept, to be written again
_MOST_KEPT: Final = 10_000

#: Writes changes to Redis; False if Redis is unavailable.
Write = Callable[[Mapping[Place, ReceiptChange]], Awaitable[bool]]


class ReceiptWriting:
    """What is to be written. ``by_stream``: the streams are on several servers."""

    def __init__(self, *, by_stream: bool = False) -> None:
        self._by_stream = by_stream
        self._writers: dict[Stream | None, _Writer] = {}
        self._opened = trio.lowlevel.ParkingLot()

    @property
    def is_idle(self) -> bool:
        """Whether all is written."""
        return not any(writer.changed or writer.lock.locked() for writer in self._writers.values())

    def changed(self, tracked: Tracked, who: Recipient, receipt: Receipt) -> None:
        """A receipt has changed."""
        name = tracked.place.stream if self._by_stream else None
        if (writer := self._writers.get(name)) is None:
            writer = self._writers[name] = _Writer()
            self._opened.unpark_all()
        writer.add(tracked, {who: receipt})

    async def run(self, write: Write) -> NoReturn:
        """Write what changes; returns only when cancelled."""
        running: set[_Writer] = set()
        async with trio.open_nursery() as nursery:
            while True:
                for writer in set(self._writers.values()) - running:
                    running.add(writer)
                    nursery.start_soon(writer.run, write)
                await self._opened.park()

    async def flush(self, write: Write) -> bool:
        """Write what has changed until now; return False, and lose nothing, if that fails."""
        done: list[bool] = []

        async def flush_one(writer: _Writer) -> None:
            done.append(await writer.flush(write))

        async with trio.open_nursery() as nursery:
            for writer in self._writers.values():
                nursery.start_soon(flush_one, writer)
        return all(done)

    def write_again(self) -> None:
        """Redis may have lost what it had: write again what was written in the last seconds."""
        for writer in self._writers.values():
            writer.write_again()


class _Writer:
    """What is to be written to one server."""

    def __init__(self) -> None:
        self.changed: dict[Place, Tracked] = {}
        self.lock = trio.Lock()  # who waits for it finds all written that had changed before
        self._wake = trio.lowlevel.ParkingLot()
        self._written: deque[tuple[float, Tracked, Mapping[Recipient, Receipt]]] = deque(
            maxlen=_MOST_KEPT
        )

    def add(self, tracked: Tracked, by: Mapping[Recipient, Receipt]) -> None:
        changed = tracked.changed
        for who, receipt in by.items():  # two objects if it was sent the event by another process
            other = changed.get(who, receipt)
            changed[who] = receipt if other is receipt else receipt.joined(other)
        if tracked.place not in self.changed:
            self.changed[tracked.place] = tracked
            self._wake.unpark_all()

    async def run(self, write: Write) -> NoReturn:
        while True:
            while not self.changed:
                await self._wake.park()
            await trio.sleep(_PAUSE)
            if not await self.flush(write):
                await trio.sleep(RETRY)

    async def flush(self, write: Write) -> bool:
        async with self.lock:
            if not (taken := list(self.changed.values())):
                return True
            self.changed.clear()
            changes: dict[Place, ReceiptChange] = {}
            for tracked in taken:
                changes[tracked.place] = ReceiptChange(
                    tracked.event, tracked.expires, tracked.changed
                )
                tracked.changed = {}
            is_written = False
            try:
                is_written = await write(changes)
            finally:
                for tracked in taken:
                    if is_written:
                        self._keep(tracked, changes[tracked.place].by)
                    else:
                        self.add(tracked, changes[tracked.place].by)
            return is_written

    def _keep(self, tracked: Tracked, by: Mapping[Recipient, Receipt]) -> None:
        now = trio.current_time()
        while self._written and self._written[0][0] < now - _KEPT:
            self._written.popleft()
        self._written.append((now, tracked, by))

    def write_again(self) -> None:
        since = trio.current_time() - _KEPT
        written, self._written = self._written, deque(maxlen=_MOST_KEPT)
        for at, tracked, by in written:
            if at >= since:
                self.add(tracked, by)
