"""Raw events: durable events that could concern no connection, by branch, not routed yet."""

from collections import deque
from typing import Final

import msgspec

from ..core.audiences import Audience, BranchId, SessionId, TenantId
from ..core.event_ids import Position, Stream
from ..core.events import Event

_FEW: Final = 64


class StoredEvent(msgspec.Struct, gc=False, eq=False):
    """A durable event as clients get it, and its position.

    While it is raw, ``raw_of`` is its tenant and branch, ``frame`` is its payload, and it has no
    audiences.
    """

    stream: Stream
    position: Position
    received_at: float  # on the runtime's clock: positions are by Redis', and wall clocks are set
    frame: bytes
    audiences: tuple[Audience, ...]
    delivered_up_to: int  # connections up to this number were sent a Pub/Sub copy of it live
    raw_of: tuple[TenantId, BranchId] | None = None


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
        self._branches: dict[tuple[Stream, TenantId], dict[BranchId, RawBranch]] = {}

    def __bool__(self) -> bool:
        return bool(self._branches)

    def add(self, event: Event, delivered_up_to: int) -> StoredEvent:
        """Add the newest event of its stream."""
        stream, position, tenant, branch = event.stream, event.position, event.tenant, event.branch
        assert stream is not None
        assert position is not None
        if (branches := self._branches.get((stream, tenant))) is None:
            branches = self._branches[stream, tenant] = {}
        if (raw := branches.get(branch)) is None:
            raw = branches[branch] = RawBranch(stream, tenant, branch)
        stored = StoredEvent(
            stream, position, event.received_at, event.payload, (), delivered_up_to,
            (tenant, branch),
        )  # fmt: skip
        raw.entries.append(stored)
        if event.session is not None:
            raw.sessions[event.session] = position
        return stored

    def branches_of(self, stream: Stream, audience: Audience) -> list[RawBranch]:
        """The branches in which there may be raw events for this audience."""
        kind, tenant, place, _ = audience
        if (branches := self._branches.get((stream, tenant))) is None:
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

    def forget(self, stored: StoredEvent) -> None:
        """Remove the oldest event of all, which is also the oldest of its branch."""
        assert stored.raw_of is not None
        tenant, branch = stored.raw_of
        raw = self._branches[stored.stream, tenant][branch]
        raw.entries.popleft()
        self._tidy(raw)

    def drop(self, stream: Stream) -> None:
        """Remove all events of a stream."""
        for key in [key for key in self._branches if key[0] == stream]:
            del self._branches[key]

    def _tidy(self, raw: RawBranch) -> None:
        raw.removed += 1
        if not raw.entries:
            branches = self._branches[raw.stream, raw.tenant]
            del branches[raw.branch]
            if not branches:
                del self._branches[raw.stream, raw.tenant]
        elif raw.removed > len(raw.sessions) + _FEW:  # so each entry pays for one session
            raw.removed = 0
            first = raw.entries[0].position
            raw.sessions = {s: last for s, last in raw.sessions.items() if last >= first}
