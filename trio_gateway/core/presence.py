"""Presence: who is connected to the service, and how that is told. Times are unix seconds.

A user on an endpoint, or a session of diners, is present while it has a connection, on whichever
process. What one process knows about it is combined with what the others know.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec

from .audiences import (
    BranchId,
    Endpoint,
    Principal,
    SectorId,
    SessionId,
    TableId,
    TenantId,
    UserId,
)

#: Without a connection: a reconnect within the grace is not a leave.
GONE: Final = 0


def key_of(principal: Principal) -> str:
    """The name in Redis of the user or session that a principal is. It begins with the tenant."""
    found = principal.session or principal.user or ""
    return f"{principal.tenant}:{principal.endpoint.label}:{found}"


class Who(NamedTuple):
    """A user on an endpoint, or a session of diners."""

    tenant: TenantId
    endpoint: Endpoint
    id: UserId | SessionId


def who_is(principal: Principal) -> Who:
    """The user or session that a principal is."""
    found = principal.session or principal.user or UserId("")
    return Who(principal.tenant, principal.endpoint, found)


class Present(NamedTuple):
    """One that is present. ``sectors`` has a key for each of its branches."""

    who: Who
    sectors: Mapping[BranchId, frozenset[SectorId]]
    table: TableId | None
    connections: int
    since: float


def present(principals: Sequence[Principal], since: float) -> Present:
    """What the connections of one user or session, at least one, make it."""
    last = principals[-1]
    sectors = {branch: last.sectors.get(branch, _NONE) for branch in last.branches}
    for principal in principals[:-1]:
        for branch in principal.branches:
            sectors[branch] = sectors.get(branch, _NONE) | principal.sectors.get(branch, _NONE)
    return Present(who_is(last), sectors, last.table, len(principals), since)


def combine(a: Present, b: Present) -> Present:
    """The same user or session, according to two processes."""
    sectors = dict(a.sectors)
    for branch, found in b.sectors.items():
        sectors[branch] = sectors.get(branch, _NONE) | found
    return Present(
        a.who, sectors, b.table or a.table, a.connections + b.connections, min(a.since, b.since)
    )


_NONE: Final = frozenset[SectorId]()


class UserItem(msgspec.Struct, frozen=True):
    """A present user as the contract shows it."""

    user_id: str
    endpoint: str
    sector_ids: list[int]
    connections: int
    since: float


class SessionItem(msgspec.Struct, frozen=True):
    """A present session as the contract shows it."""

    session_id: int
    table_id: int | None
    connections: int


Item = UserItem | SessionItem


def item(one: Present, branch: BranchId | None = None) -> Item:
    """Describe it to those who see this branch; None: all its branches."""
    who = one.who
    if who.endpoint is Endpoint.DINER:
        return SessionItem(int(who.id), one.table, one.connections)
    shown = one.sectors.values() if branch is None else [one.sectors.get(branch, _NONE)]
    sectors = sorted(_NONE.union(*shown))
    return UserItem(str(who.id), who.endpoint.label, list(sectors), one.connections, one.since)


class Items(msgspec.Struct):
    """Those who are present in a branch, or tenant."""

    users: list[UserItem] = []
    sessions: list[SessionItem] = []


def items_of(found: Iterable[Present], branch: BranchId | None = None) -> Items:
    """Describe those of them that are in this branch; None: all."""
    items = [item(each, branch) for each in found if branch is None or branch in each.sectors]
    return Items(
        sorted((each for each in items if isinstance(each, UserItem)), key=_order_of_users),
        sorted(
            (each for each in items if isinstance(each, SessionItem)), key=lambda s: s.session_id
        ),
    )


def merge(answers: Iterable[Items]) -> Items:
    """What several processes know of one branch, or tenant: each user and session once."""
    users: dict[tuple[str, str], UserItem] = {}
    sessions: dict[int, SessionItem] = {}
    for answer in answers:
        for user in answer.users:
            key = user.user_id, user.endpoint
            users[key] = _add_users(users[key], user) if key in users else user
        for session in answer.sessions:
            number = session.session_id
            sessions[number] = (
                _add_sessions(sessions[number], session) if number in sessions else session
            )
    return Items(
        sorted(users.values(), key=_order_of_users),
        sorted(sessions.values(), key=lambda session: session.session_id),
    )


def _order_of_users(user: UserItem) -> tuple[str, int, str]:
    return user.endpoint, len(user.user_id), user.user_id  # numbers by their value


def _add_users(a: UserItem, b: UserItem) -> UserItem:
    return UserItem(
        a.user_id,
        a.endpoint,
        sorted({*a.sector_ids, *b.sector_ids}),
        a.connections + b.connections,
        min(a.since, b.since),
    )


def _add_sessions(a: SessionItem, b: SessionItem) -> SessionItem:
    return SessionItem(a.session_id, a.table_id or b.table_id, a.connections + b.connections)


class Change(NamedTuple):
    """What those who watch a branch are told of one user or session."""

    joined: Item | None = None
    left: Item | None = None


def change(before: Present | None, after: Present | None, branch: BranchId) -> Change | None:
    """What has changed in this branch; None if nothing that is worth telling.

    Other sectors, or another table, count as a join: the new item replaces the old one. Another
    number of connections does not.
    """
    was = before if before is not None and branch in before.sectors else None
    now = after if after is not None and branch in after.sectors else None
    if now is None:
        return None if was is None else Change(left=item(was._replace(connections=GONE), branch))
    if was is not None and was.sectors[branch] == now.sectors[branch] and was.table == now.table:
        return None
    return Change(joined=item(now, branch))


# In Redis a user or session is two lines of JSON: its event, without type and time, and its
# sectors by branch. Scripts make events of the first line without reading the second.


class _Event(msgspec.Struct, omit_defaults=True):
    tenant_id: int
    branch_ids: list[int]
    user_id: str | None = None
    session_id: int | None = None
    table_id: int | None = None
    endpoint: str = ""


_LABELS: Final = {endpoint.label: endpoint for endpoint in Endpoint}
_decode_event: Final = msgspec.json.Decoder(_Event).decode
_decode_sectors: Final = msgspec.json.Decoder(dict[int, list[int]]).decode


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()


def record_of(principal: Principal) -> str:
    """As :func:`write_record`, of the user or session that has this connection alone."""
    # Without the values between them: it is made for every client that connects.
    found, branches = principal.session or principal.user or "", principal.branches
    sectors = {each: of for each, of in principal.sectors.items() if of and each in branches}
    return _record(principal.tenant, principal.endpoint, found, principal.table, branches, sectors)


def write_record(one: Present) -> str:
    """Everything but its connections and its time, as Redis keeps it."""
    who, branches = one.who, frozenset(one.sectors)
    sectors = {branch: found for branch, found in one.sectors.items() if found}
    return _record(who.tenant, who.endpoint, who.id, one.table, branches, sectors)


def _record(
    tenant: TenantId,
    endpoint: Endpoint,
    found: UserId | SessionId | str,
    table: TableId | None,
    branches: frozenset[BranchId],
    sectors: Mapping[BranchId, frozenset[SectorId]],
) -> str:
    if endpoint is Endpoint.DINER:
        at_table = "" if table is None else f',"table_id":{table}'
        subject = f'"session_id":{found}{at_table}'
    else:
        user = str(found)
        subject = f'"user_id":"{user}"' if user.isalnum() else f'"user_id":{_json(user)}'
    listed = ""
    if sectors:
        listed = ",".join(f'"{b}":[{_listed(sectors[b])}]' for b in sorted(sectors))
    return (
        f'{{"tenant_id":{tenant},"branch_ids":[{_listed(branches)}],{subject}'
        f',"endpoint":"{endpoint.label}"}}\n{{{listed}}}'
    )


@lru_cache(maxsize=4096)
def _listed(ids: frozenset[int]) -> str:
    return ",".join(map(str, sorted(ids)))


def read_record(text: str, connections: int, since: float) -> Present:
    """Read what :func:`write_record` has written. Raises :exc:`ValueError` for anything else."""
    first, _, second = text.partition("\n")
    try:
        event, sectors = _decode_event(first), _decode_sectors(second)
        endpoint = _LABELS[event.endpoint]
    except (msgspec.DecodeError, KeyError) as error:
        raise ValueError("no record of presence") from error
    if event.session_id is None:
        identity: UserId | SessionId = UserId(event.user_id or "")
    else:
        identity = SessionId(event.session_id)
    return Present(
        Who(TenantId(event.tenant_id), endpoint, identity),
        {BranchId(b): frozenset(map(SectorId, sectors.get(b, ()))) for b in event.branch_ids},
        None if event.table_id is None else TableId(event.table_id),
        connections,
        since,
    )
