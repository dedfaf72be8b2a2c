"""The hub: the connections of this process, and the audiences that they are in."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, KeysView, Sequence, Set
from typing import Any, Protocol, Self

import trio

from ..core.audiences import Audience, Endpoint, Principal, TenantId, audiences_of, diners
from ..core.capacity import CapacityLimits, Owner
from ..core.event_ids import Cursor
from ..core.events import Event
from .connection import Connection
from .members import Members, union
from .resume_state import Phase, Step


class Reservation:
    """A reserved place in the hub.

    A context manager that releases it at its end: without an exception, to the connection that
    joins next.
    """

    __slots__ = ("_hub", "owner")

    def __init__(self, hub: "Hub", owner: Owner) -> None:
        self._hub = hub
        self.owner = owner  # the user or session that it is for

    def __enter__(self) -> Self:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.release()
        else:
            self.give_up()

    def give_up(self) -> None:
        """Release it to nobody."""
        self.release()
        self._hub.tell_freed(self.owner)

    def release(self) -> None:
        """Give the place up, without telling anybody."""
        self._hub.release(self.owner)


class Observer(Protocol):
    """Is told of every connection in the hub. Its methods never wait."""

    def joined(self, connection: Connection) -> None:
        """It has joined."""

    def left(self, connection: Connection) -> None:
        """It has left; its principal is the last one."""

    def moved(self, connection: Connection) -> None:
        """It has another principal, of the same owner and endpoint."""


class Hub:
    """The connections, by audience and by owner.

    Every method but :meth:`wait_empty` is synchronous and therefore atomic: there are no locks.
    """

    def __init__(self, limits: CapacityLimits | None = None) -> None:
        self._limits = limits
        self._limits_tenants = limits is not None and limits.per_tenant > 0
        self._members: dict[Audience, Members] = {}
        # How many audiences with members each branch has, by tenant.
        self._branches: defaultdict[TenantId, Counter[int]] = defaultdict(Counter)
        self._owned: dict[Owner, list[Connection]] = {}
        self._reserved: Counter[Owner] = Counter()
        self._reserved_in_all = 0
        self._of_tenant: Counter[TenantId] = Counter()  # places, if their number is limited
        # Called with the owner of each place that has become free.
        self.on_freed: Callable[[Owner], None] | None = None
        self.observer: Observer | None = None
        self._connections: dict[Connection, None] = {}  # in the order they joined
        self._leaving: set[Connection] = set()
        self._emptied = trio.lowlevel.ParkingLot()
        self.last_number = 0  # of connections and lags, which are numbered as they begin
        self.deflate_count = 0  # connections that can read compressed messages
        self.held: set[Connection] = set()  # they get durable events from the history
        self.lagging: set[Connection] = set()  # of these, what lags: it gets no other events
        self.by_endpoint: dict[Endpoint, int] = dict.fromkeys(Endpoint, 0)
        self.closed: Counter[int] = Counter()  # by code, chosen by us or by the client
        self.closed_by_gateway: Counter[int] = Counter()
        self._messages = 0  # of connections that are closed

    def __len__(self) -> int:
        return len(self._connections)

    @property
    def taken(self) -> int:
        """The number of places that are taken, including reserved ones."""
        return len(self._connections) + self._reserved_in_all

    @property
    def connections(self) -> KeysView[Connection]:
        return self._connections.keys()

    @property
    def leaving(self) -> set[Connection]:
        """Connections that get no events any more, and whose close is under way."""
        return self._leaving

    @property
    def messages(self) -> int:
        """Messages from clients since the start, including those that have left."""
        here = sum(connection.messages for connection in self._connections)
        return self._messages + here + sum(connection.messages for connection in self._leaving)

    def admit(self, principal: Principal) -> None:
        """Raise :exc:`Rejected` if one more connection of this owner is over a limit.

        If anything is awaited between this and :meth:`join`, two could take the last place: then
        :meth:`reserve` it.
        """
        self._admit(principal.owner)

    def _admit(self, owner: Owner) -> None:
        if (limits := self._limits) is not None:
            limits.check(
                owner,
                owned=self.places_of(owner),
                of_tenant=self._of_tenant.get(owner[1], 0),
                taken=self.taken,
            )

    def owned_by(self, owner: Owner) -> Sequence[Connection]:
        """The connections of a user, or session, of a tenant."""
        return self._owned.get(owner, ())

    @property
    def owners(self) -> Set[Owner]:
        """The users and sessions that have a place, including a reserved one."""
        return self._owned.keys() | self._reserved.keys()

    @property
    def limited_tenants(self) -> Set[TenantId]:
        """The tenants that have a place; none if their places are not limited."""
        return self._of_tenant.keys()

    def places_of(self, owner: Owner) -> int:
        """The number of places of a user or session, including reserved ones."""
        return len(self._owned.get(owner, ())) + self._reserved.get(owner, 0)

    def places_of_tenant(self, tenant: TenantId) -> int:
        """The number of places of a tenant, including reserved ones; 0 if it is not limited."""
        return self._of_tenant.get(tenant, 0)

    def reserve(self, principal: Principal) -> Reservation:
        """As :meth:`admit`, and the place stays taken until it is released.

        :meth:`join` must follow the release without an await between them.
        """
        self._admit(owner := principal.owner)
        self._reserved[owner] += 1
        self._reserved_in_all += 1
        if self._limits_tenants:
            self._of_tenant[owner[1]] += 1
        return Reservation(self, owner)

    def release(self, owner: Owner) -> None:
        """Give up a reserved place."""
        _subtract(self._reserved, owner)
        self._reserved_in_all -= 1
        if self._limits_tenants:
            _subtract(self._of_tenant, owner[1])

    def tell_freed(self, owner: Owner) -> None:
        """A place that others may know of has become free."""
        if self.on_freed is not None:
            self.on_freed(owner)

    def join(self, connection: Connection) -> None:
        """Add a connection to the audiences of its principal."""
        principal = connection.principal
        self.last_number += 1
        connection.number = self.last_number
        self._connections[connection] = None
        self._owned.setdefault(principal.owner, []).append(connection)
        if self._limits_tenants:
            self._of_tenant[principal.tenant] += 1
        self.by_endpoint[principal.endpoint] += 1
        self.deflate_count += connection.supports_deflate
        connection.audiences = audiences_of(principal)
        for audience in connection.audiences:
            self._enter(audience, connection)
        if self.observer is not None:
            self.observer.joined(connection)

    def leave(self, connection: Connection) -> None:
        """Take it out of all audiences. :meth:`finish` follows when its close has gone through."""
        if connection not in self._connections:  # it was evicted
            return
        del self._connections[connection]
        self._leaving.add(connection)
        self.step(connection, Step.LEAVE)
        owner = connection.principal.owner
        self._owned[owner].remove(connection)
        if not self._owned[owner]:
            del self._owned[owner]
        if self._limits_tenants:
            _subtract(self._of_tenant, connection.principal.tenant)
        self.tell_freed(owner)
        self.by_endpoint[connection.principal.endpoint] -= 1
        self.deflate_count -= connection.supports_deflate
        for audience in connection.audiences:
            self._exit(audience, connection)
        if self.observer is not None:
            self.observer.left(connection)

    def step(self, connection: Connection, step: Step, cursor: Cursor | None = None) -> None:
        """Take a step of its resume state. It is :attr:`held` exactly while it has a cursor."""
        state = connection.resume_state
        state.step(step, cursor)
        if state.cursor is None:
            self.held.discard(connection)
        else:
            self.held.add(connection)
        if state.phase is not Phase.LAGGING:
            self.lagging.discard(connection)
        elif connection not in self.lagging:
            self.lagging.add(connection)
            self.last_number += 1
            state.lagged_at = self.last_number

    def evict(self, connection: Connection, code: int, reason: str) -> None:
        """Close a connection, and free its place at once."""
        connection.close(code, reason)
        self.leave(connection)

    def finish(self, connection: Connection) -> None:
        """Forget a connection whose close has gone through, and count it."""
        self._leaving.discard(connection)
        self._messages += connection.messages
        self.count_close(connection.code, by_gateway=not connection.chose_its_code)
        if not self._connections and not self._leaving:
            self._emptied.unpark_all()

    def count_close(self, code: int, *, by_gateway: bool = True) -> None:
        """Count a close code, also of a client that never joined."""
        self.closed[code] += 1
        if by_gateway:
            self.closed_by_gateway[code] += 1

    def move(self, connection: Connection, principal: Principal) -> None:
        """Give a connection another principal, of the same owner and endpoint."""
        if connection not in self._connections:  # it has left meanwhile
            return
        assert principal.owner == connection.principal.owner
        assert principal.endpoint is connection.principal.endpoint
        before, after = connection.audiences, audiences_of(principal)
        connection.principal, connection.audiences = principal, after
        for audience in after - before:
            self._enter(audience, connection)
        for audience in before - after:
            self._exit(audience, connection)
        if self.observer is not None:
            self.observer.moved(connection)

    def groups(self, audiences: Iterable[Audience]) -> list[Members]:
        """The members of each of these audiences that has any."""
        members = self._members
        return [found for audience in audiences if (found := members.get(audience)) is not None]

    def members(self, audiences: Iterable[Audience]) -> list[Connection]:
        """A snapshot of the connections in any of these audiences, each of them once."""
        return union(self.groups(audiences))

    def hears(self, audiences: Iterable[Audience]) -> bool:
        """Whether any connection is in one of these audiences."""
        return not self._members.keys().isdisjoint(audiences)

    async def wait_empty(self) -> None:
        """Wait until every connection has left and its close has gone through."""
        while self._connections or self._leaving:
            await self._emptied.park()

    def concerns(self, event: Event) -> bool:
        """Whether an event can be for a connection here, whatever its type and sector are."""
        return self.concern([event])[0]

    def concern(self, events: Iterable[Event]) -> list[bool]:
        """As :meth:`concerns`, for each of these events.

        An event of branch 0 is for admins of the tenant: they are in a branch 0, too.
        """
        found = []
        for event in events:
            if (branches := self._branches.get(event.tenant)) is None:
                found.append(False)
            elif event.branch in branches:
                found.append(True)
            else:
                session = event.session
                found.append(session is not None and diners(event.tenant, session) in self._members)
        return found

    def _enter(self, audience: Audience, connection: Connection) -> None:
        if (members := self._members.get(audience)) is None:
            members = self._members[audience] = Members()
            self._branches[audience[1]][_branch_of(audience)] += 1
        members.add(connection)

    def _exit(self, audience: Audience, connection: Connection) -> None:
        members = self._members[audience]
        members.remove(connection)
        if not members:
            del self._members[audience]
            tenant, branch = audience[1], _branch_of(audience)
            branches = self._branches[tenant]
            branches[branch] -= 1
            if not branches[branch]:
                del branches[branch]
            if not branches:
                del self._branches[tenant]


def _subtract(counter: Counter[Any], key: Any) -> None:
    """Count one less, and forget what is 0."""
    if counter[key] == 1:
        del counter[key]
    else:
        counter[key] -= 1


def _branch_of(audience: Audience) -> int:
    """The branch of an audience; one that does not exist for a session, which is of the tenant."""
    return -1 if audience[0] == "diners" else audience[2]
