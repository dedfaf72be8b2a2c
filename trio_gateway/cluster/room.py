"""Room over all processes: dead connections anywhere give way to new ones of the same owner."""

from collections.abc import Callable
from typing import Final, NamedTuple, NoReturn

import trio

from ..broker.commands import Unavailable
from ..core.audiences import Principal
from ..core.capacity import OWNER_LIMITS, Owner
from ..core.close_codes import Rejected
from ..core.control_messages import Evict, Probe, Silent
from ..runtime.connection import Connection
from ..runtime.hub import Hub, Reservation
from ..runtime.room import ANSWER_TIME, Room, evict
from .control import Control
from .limits import ClusterLimits

_ANSWER_DELAY: Final = 0.5  # seconds that an answer may take, besides what it is about
_EVICT_TIME: Final = 1.0  # seconds
_LOOK: Final = 0.25  # seconds between two looks for a place that has become free


class _Candidate(NamedTuple):
    """A connection that has not answered."""

    seconds: float  # for which it has been silent
    process: str
    connection: int


class _Search:
    """A search for the connections of one owner that have not answered."""

    def __init__(self) -> None:
        self.newcomers = 0
        self.found: list[_Candidate] = []  # the longest silent last
        self.done = trio.Event()
        self.scope = trio.CancelScope()


class ClusterRoom:
    """Finds places over all processes, as :class:`Room` does in one.

    At the limit of a user or session all its connections are pinged, by the processes that have
    them. Of those that do not answer one is closed for each newcomer, the longest silent first.
    A process that does not answer keeps its connections. Without Redis a process looks among its
    own.
    """

    def __init__(
        self,
        hub: Hub,
        room: Room,
        limits: ClusterLimits,
        control: Control,
        name: str,
    ) -> None:
        self._hub = hub
        self._room = room
        self._limits = limits
        self._control = control
        self._name = name
        self._searches: dict[Owner, _Search] = {}
        self._nursery: trio.Nursery | None = None
        control.handle("probe", Probe, self._answer_probe)
        control.handle("evict", Evict, self._answer_evict)

    async def run(self) -> NoReturn:
        """Search for those who need room; returns only when cancelled."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            await trio.sleep_forever()
        raise AssertionError("it sleeps for ever")

    async def find(
        self, principal: Principal, has_left: Callable[[], bool] = lambda: False
    ) -> tuple[Reservation, bool]:
        """Reserve a place; return it, and whether dead connections had to be looked for.

        Newcomers of one owner share a search; there are at most as many as its limit. For one that
        ``has_left`` nobody is closed. Raises :exc:`Rejected` if there is no room.
        """
        try:
            return await self._limits.reserve(principal), False
        except Rejected as full:
            if full.label not in OWNER_LIMITS or self._nursery is None:
                raise
            refusal = full
        owner = principal.owner
        if (search := self._searches.get(owner)) is None:
            search = self._searches[owner] = _Search()
            self._nursery.start_soon(self._search, owner, search)
        if search.newcomers >= self._limits.most(owner):
            raise refusal
        search.newcomers += 1
        try:
            return await self._wait(principal, has_left, search), True
        finally:
            search.newcomers -= 1
            if not search.newcomers:
                search.scope.cancel()
                del self._searches[owner]

    async def _wait(
        self, principal: Principal, has_left: Callable[[], bool], search: _Search
    ) -> Reservation:
        while True:
            with trio.move_on_after(_LOOK):
                await search.done.wait()
            is_last = search.done.is_set() and not search.found
            is_gone = has_left()
            if search.found and not is_gone:
                await self._evict(principal.owner, search.found.pop())
            try:
                return await self._limits.reserve(principal)
            except Rejected:
                if is_last or is_gone or self._room.given_up():
                    raise

    async def _search(self, owner: Owner, search: _Search) -> None:
        found: list[_Candidate] = []
        with search.scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._search_here, owner, found)
                if not self._limits.alone:
                    nursery.start_soon(self._search_elsewhere, owner, found)
        search.found = sorted(found)
        search.done.set()

    async def _search_here(self, owner: Owner, found: list[_Candidate]) -> None:
        silent = await self._room.silent(owner)
        found += [_Candidate(_seconds(each), self._name, each.number) for each in silent]

    async def _search_elsewhere(self, owner: Owner, found: list[_Candidate]) -> None:
        timeout = ANSWER_TIME + _ANSWER_DELAY
        try:
            answers = await self._control.ask("probe", Probe(owner), timeout=timeout)
        except Unavailable:
            return
        for name, silent in answers.decoded(list[Silent]):
            if name != self._name:
                found += [_Candidate(each.seconds, name, each.connection) for each in silent]

    async def _evict(self, owner: Owner, candidate: _Candidate) -> None:
        """Close a connection, unless it has answered by now or is closed."""
        request = Evict(owner, candidate.connection)
        if candidate.process == self._name:
            self._evict_here(request)
            return
        try:
            await self._control.ask("evict", request, timeout=_EVICT_TIME, only=candidate.process)
        except Unavailable:
            return

    async def _answer_probe(self, request: Probe) -> list[Silent]:
        silent = await self._room.silent(request.owner)
        return [Silent(each.number, _seconds(each)) for each in silent]

    async def _answer_evict(self, request: Evict) -> bool:
        """Answers when the place is free for others."""
        if evicted := self._evict_here(request):
            await self._limits.settle()
        return evicted

    def _evict_here(self, request: Evict) -> bool:
        for connection in self._hub.owned_by(request.owner):
            if connection.number == request.connection and not connection.is_there:
                evict(self._hub, connection)
                return True
        return False


def _seconds(connection: Connection) -> float:
    return trio.current_time() - connection.received_at
