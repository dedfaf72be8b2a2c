"""Raw events: durable events that could concern no connection, by branch, not routed yet."""

from collections import deque
from collections.abc import Iterable
from typing import Final

import msgspec

from ..core.audiences import Audience, BranchId, SessionId, TenantId
from ..core.event_ids import Position, Stream
from ..core.events import Event

_FEW: Final = 64


class StoredEvent(msgspec.Struct, gc=False, eq=False):
    """A durable event as clients get it, and its position.

    While it is raw, ``raw_of`` is its branch, ``frame`` is its payload, and it has no audiences.
    """

    stream: Stream
    position: Position
    received_at: float  # on the runtime's clock: positions are by Redis', and wall clocks are set
    frame: bytes
    audiences: tuple[Audience, ...]
    delivered_up_to: int  # connections up to this number were sent a Pub/Sub copy of it live
    raw_of: "RawBranch | None" = None
    unless: frozenset[Audience] = frozenset()  # it went to these before: their members may have it
    is_tracked: bool = False  # there are receipts of it


class RawBranch:
    """The raw events of one branch in one stream, the oldest first."""

    __slots__ = ("branch", "entries", "removed", "sessions", "stream", "tenant")

    def __init__(self, stream: Stream, tenant: TenantId, branch: BranchId) -> None:
        self.stream = stream
        self.tenant = tenant
        self.branch = branch
        self.entries: deque[StoredEvent] = deque()
        self.sessions: dict[SessionId, Position] = {}  # the last event that names each session
        self.removed = 0  # entries, since the sessions were last tidied


class RawEvents:
    """The raw events of all branches. False if there are none."""

    def __init__(self) -> None:
        self._branches: dict[Stream, dict[TenantId, dict[BranchId, RawBranch]]] = {}

    def __bool__(self) -> bool:
        return bool(self._branches)

    def add(self, events: Iterable[tuple[Event, int]]) -> list[StoredEvent]:
        """Add the newest events of their streams, each with its ``delivered_up_to``."""
        found: list[StoredEvent] = []
        for event, delivered_up_to in events:
            stream, position = event.stream, event.position
            assert stream is not None
            assert position is not None
            try:
                raw = self._branches[stream][event.tenant][event.branch]
            except KeyError:
                raw = self._add_branch(stream, event.tenant, event.branch)
            stored = StoredEvent(
                stream, position, event.received_at, event.payload, (), delivered_up_to, raw
            )
            raw.entries.append(stored)
            found.append(stored)
            if (session := event.session) is not None:
                raw.sessions[session] = position
        return found

    def _add_branch(self, stream: Stream, tenant: TenantId, branch: BranchId) -> RawBranch:
        raw = RawBranch(stream, tenant, branch)
        self._branches.setdefault(stream, {}).setdefault(tenant, {})[branch] = raw
        return raw

    def branches_of(self, stream: Stream, audience: Audience) -> list[RawBranch]:
        """The branches in which there may be raw events for this audience."""
        kind, tenant, place, _ = audience
        if (branches := self._branches.get(stream, {}).get(tenant)) is None:
            return []
        if kind == "diners":  # a session is of the tenant: any branch may name it
            return [raw for raw in branches.values() if SessionId(place) in raw.sessions]
        raw = branches.get(BranchId(place))
        return [] if raw is None else [raw]

    def take_newest(self, raw: RawBranch, seen: Position) -> StoredEvent | None:
        """Remove and return the newest event of a branch if it is after a position."""
        if not raw.entries or raw.entries[-1].position <= seen:
            return None
        stored = raw.entries.pop()
        stored.raw_of = None
        self._tidy(raw)
        return stored

    def forget_oldest(self, raw: RawBranch) -> None:
        """Remove the oldest event of a branch."""
        raw.entries.popleft()
        self._tidy(raw)

    def drop(self, stream: Stream) -> None:
        """Remove all events of a stream."""
        for branches in self._branches.pop(stream, {}).values():
            for raw in branches.values():
                raw.entries.clear()  # its events name it, and the garbage collector ignores them

    def _tidy(self, raw: RawBranch) -> None:
        raw.removed += 1
        if not raw.entries:
            tenants = self._branches[raw.stream]
            branches = tenants[raw.tenant]
            del branches[raw.branch]
            if not branches:
                del tenants[raw.tenant]
            if not tenants:
                del self._branches[raw.stream]
        elif raw.removed > len(raw.sessions) + _FEW:  # so each entry pays for one session
            raw.removed = 0
            first = raw.entries[0].position
            raw.sessions = {s: last for s, last in raw.sessions.items() if last >= first}
