"""Presence: tells Redis who is connected here, ends graces, and answers who is present here."""

import random
import time
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, Final, NoReturn

import structlog
import trio

from ..broker.commands import Unavailable
from ..core.audiences import BranchId, Endpoint, Principal, TenantId
from ..core.presence import GONE, Items, Present, items_of, key_of, present, record_of, write_record
from ..runtime.connection import Connection
from ..runtime.throttled_log import ThrottledLog
from . import presence_scripts as scripts
from .presence_feed import PresenceFeed

log = structlog.get_logger()

SWEEP_EVERY: Final = 1.0  # seconds, about
_RETRY: Final = 0.5  # seconds
_PAUSE: Final = 0.1  # seconds between two writes: those who come meanwhile share the next one
_FLUSH: Final = 0.7  # seconds; at the end of a process, telling the others may take one in all
_MOST_GONE: Final = 10_000  # who left and are remembered until Redis is told
_PIECE: Final = 200  # connections that are described without a checkpoint, in about 2 ms


class _Here:
    """A user or session that is connected here, or that Redis may still believe to be."""

    __slots__ = ("came_at", "connections", "last", "left_at", "since")

    def __init__(self, since: float) -> None:
        self.connections: list[Connection] = []  # few, in the order in which they joined
        self.since = since  # Redis' own, when it has been told
        self.last: Principal | None = None  # of the last connection that has left
        # On Trio's clock: when it first connected since the last write, if it did; and when its
        # last connection ended.
        self.came_at: float | None = None
        self.left_at = 0.0

    @property
    def present(self) -> Present:
        """What it is now; it has a connection."""
        return present([each.principal for each in self.connections], self.since)

    @property
    def record(self) -> str:
        """What Redis is told of it."""
        if len(self.connections) > 1:
            return write_record(self.present)
        last = self.connections[0].principal if self.connections else self.last
        assert last is not None
        return record_of(last)


class Presence:
    """Who is connected to this process, and the truth of all processes in Redis.

    The hub tells it of each connection that joins, leaves or moves; that never waits. One task
    writes what has changed, as absolute state: a write may be repeated, and while one is on its
    way the next collects. ``name`` is that of this process in the registry, whose beats say that
    it lives. It writes after the first call of :meth:`rewrite`. ``run_write`` runs the script that
    writes, ``run_script`` the others.
    """

    def __init__(
        self,
        name: str,
        run_script: scripts.Run,
        run_write: scripts.Run,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._name = name
        self._run = run_script
        self._run_write = run_write
        self.feed = PresenceFeed(self._run_when_written)
        self._clock = clock
        self._here: dict[str, _Here] = {}  # by key in Redis
        self._tenants: dict[TenantId, dict[str, _Here]] = {}
        self._dirty: dict[str, None] = {}  # to be written, in the order of their changes
        self._gone = 0  # how many of those here have no connection any more
        self._registered = trio.Event()
        self._compares = False  # with what Redis holds: it may be more than we do
        self._number = 0  # of the last write that was tried
        self._acknowledged = -1  # of the last write that Redis has answered
        self._changed = trio.Event()
        self._is_writing = False
        self._flushing = 0  # how many wait until all is written
        self._hurry = trio.Event()  # set when one of them comes
        self._idle = trio.lowlevel.ParkingLot()
        self._throttled_log = ThrottledLog(log)
        #: How many are present in the whole service, by the last sweep.
        self.present = {endpoint.label: 0 for endpoint in Endpoint}

    def joined(self, connection: Connection) -> None:
        """A connection has joined the hub."""
        principal = connection.principal
        key = key_of(principal)
        if (here := self._here.get(key)) is None:
            here = self._here[key] = _Here(self._clock())
            self._tenants.setdefault(principal.tenant, {})[key] = here
        elif not here.connections:
            here.since = self._clock()
            self._gone -= 1
        here.connections.append(connection)
        if here.came_at is None:
            here.came_at = connection.joined_at
        self._mark(key)

    def left(self, connection: Connection) -> None:
        """A connection has left the hub."""
        self.feed.unwatch(connection)
        key = key_of(connection.principal)
        here = self._here[key]
        here.connections.remove(connection)
        here.last, here.left_at = connection.principal, trio.current_time()
        self._gone += not here.connections
        if self._gone <= _MOST_GONE:
            self._mark(key)
        else:  # Redis is away; if it has this one, that is found when they are compared
            self._dirty.pop(key, None)
            self._forget(key, connection.principal.tenant)
            self._compares = True
            self._changed.set()

    def moved(self, connection: Connection) -> None:
        """A connection has another principal, of the same user or session."""
        self.feed.moved(connection)
        self._mark(key_of(connection.principal))

    def rewrite(self) -> None:
        """Redis may have lost what it was told, or may know this process for the first time:
        write all again.
        """
        self._registered.set()
        self._compares = True
        self._acknowledged = -1
        self._dirty |= dict.fromkeys(self._here)
        self._changed.set()

    async def here(self, tenant: TenantId, branch: BranchId | None) -> Items:
        """Who of a branch, or of a whole tenant, is connected to this process, from memory."""
        found: list[Present] = []
        for number, here in enumerate(list(self._tenants.get(tenant, {}).values()), 1):
            if here.connections:
                found.append(here.present)
            if not number % _PIECE:
                await trio.lowlevel.checkpoint()
        return items_of(found, branch)

    async def run(self) -> NoReturn:
        """Write, sweep and feed; returns only when cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_writing)
            nursery.start_soon(self._keep_sweeping)
            nursery.start_soon(self.feed.run)
        raise AssertionError("they run for ever")

    async def flush(self) -> None:
        """Wait until all is written, for at most :data:`_FLUSH` seconds."""
        self._flushing += 1
        self._hurry.set()
        try:
            with trio.move_on_after(_FLUSH):
                while self._registered.is_set() and (
                    self._dirty or self._compares or self._is_writing
                ):
                    await self._idle.park()
        finally:
            self._flushing -= 1

    async def _run_when_written(self, script: str, arguments: Sequence[str | int]) -> Any:
        # Who watches sees at least the clients of this process, also when it has just started.
        with trio.move_on_after(_FLUSH):
            await self._registered.wait()
        await self.flush()
        return await self._run(script, arguments)

    def _mark(self, key: str) -> None:
        if not self._dirty:
            self._changed.set()
        self._dirty[key] = None

    def _forget(self, key: str, tenant: TenantId) -> None:
        self._gone -= 1
        del self._here[key]
        del self._tenants[tenant][key]
        if not self._tenants[tenant]:
            del self._tenants[tenant]

    async def _keep_writing(self) -> None:
        await self._registered.wait()
        while True:
            try:
                if not (self._dirty or self._compares):
                    self._idle.unpark_all()
                    self._changed = trio.Event()
                    await self._changed.wait()
                elif self._compares:
                    self._compares = False
                    await self._compare()
                else:
                    await self._write()
                    if len(self._dirty) < scripts.WRITTEN and not self._flushing:
                        await self._pause()
            except Unavailable:
                await trio.sleep(_RETRY)

    async def _pause(self) -> None:
        """Let a crowd share the next write, unless somebody waits for it."""
        self._hurry = trio.Event()
        with trio.move_on_after(_PAUSE):
            await self._hurry.wait()

    async def _compare(self) -> None:
        """Also write that those are gone that only Redis holds."""
        try:
            held = await self._run(scripts.HELD, [self._name])
        except BaseException:
            self._compares = True
            raise
        self._dirty |= {key.decode(): None for key in held}

    async def _write(self) -> None:
        keys = list(islice(self._dirty, scripts.WRITTEN))
        batch: list[_Here | None] = []
        came_before: list[float | None] = []
        self._number += 1
        now = trio.current_time()
        arguments: list[str | int] = [self._name, self._number]
        for key in keys:
            del self._dirty[key]
            came_at, connections, record, left = None, GONE, "", 0
            came: int | str = "-"
            if (here := self._here.get(key)) is not None:
                connections, came_at = len(here.connections), here.came_at
                # Of one that is gone and was told, Redis has the record.
                if connections or came_at is not None:
                    record, came = here.record, 0 if came_at is None else _ago(now, came_at)
                if not connections:
                    left = _ago(now, here.left_at)
                here.came_at = None
            arguments += (key, f"{connections} {came} {left}\n{record}")
            batch.append(here)
            came_before.append(came_at)
        self._is_writing = True
        try:
            last, error, since = await self._run_write(scripts.WRITE, arguments)
            if last == b"late":
                raise Unavailable("a later write was faster")
        except BaseException:
            self._restore(keys, batch, came_before)
            raise
        finally:
            self._is_writing = False
        self._report(error)
        for key, here, moment in zip(keys, batch, since, strict=True):
            if here is None:
                continue
            if here.connections:
                here.since = float(moment or here.since)
            elif key not in self._dirty and self._here.get(key) is here:
                assert here.last is not None
                self._forget(key, here.last.tenant)
        lost = int(last) < self._acknowledged
        self._acknowledged = self._number
        if lost:
            self.rewrite()

    def _restore(
        self,
        keys: Sequence[str],
        batch: Sequence[_Here | None],
        came_before: Sequence[float | None],
    ) -> None:
        """It is unknown whether Redis has got this."""
        for key, here, came_at in zip(keys, batch, came_before, strict=True):
            self._dirty[key] = None
            if here is not None:
                here.came_at = here.came_at if came_at is None else came_at

    async def _keep_sweeping(self) -> None:
        await self._registered.wait()
        more = False
        while True:
            acknowledged = self._acknowledged
            try:
                reply = await self._run(scripts.SWEEP, [self._name, "1" if more else "0"])
            except Unavailable:
                more = False
            else:
                number, error, more, numbers = reply
                self._report(error)
                state = dict(zip(numbers[::2], numbers[1::2], strict=True))
                self.present = {label: int(state.get(label.encode(), 0)) for label in self.present}
                if int(number) < acknowledged == self._acknowledged:
                    self.rewrite()
            if not more:
                await trio.sleep(SWEEP_EVERY * random.uniform(0.8, 1.2))  # noqa: S311 - spreads load

    def _report(self, error: bytes) -> None:
        if error:
            text = error.decode(errors="replace").split(" ", 1)[0]
            self._throttled_log.error("joins and leaves not added to the stream", error=text)


def _ago(now: float, moment: float) -> int:
    """How long ago this was on Trio's clock, in ms: Redis knows when that was on its own."""
    return round((now - moment) * 1000)
