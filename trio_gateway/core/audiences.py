"""Audiences: the keys by which an event finds the clients that may receive it."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum, StrEnum
from types import MappingProxyType
from typing import Any, NewType

TenantId = NewType("TenantId", int)
BranchId = NewType("BranchId", int)
SectorId = NewType("SectorId", int)
SessionId = NewType("SessionId", int)
TableId = NewType("TableId", int)
UserId = NewType("UserId", str)

# (kind, tenant, branch or session, sector). Every audience contains its tenant, so there is no
# key under which two tenants could meet. A plain tuple, since routing makes a handful per event.
Audience = NewType("Audience", tuple[str, TenantId, int, int])


def of_branch(kinds: Iterable[str], tenant: TenantId, branch: BranchId) -> list[Audience]:
    """The audiences of these kinds, each of which is of the branch as a whole."""
    # Without a call of NewType for each: routing does this for every event.
    found: list[Any] = [(kind, tenant, branch, 0) for kind in kinds]
    return found


def waiters(tenant: TenantId, branch: BranchId, sector: SectorId) -> Audience:
    """The waiters of one sector of the branch."""
    return Audience(("waiters", tenant, branch, sector))


def floor(tenant: TenantId, branch: BranchId) -> Audience:
    """All waiters of the branch, in every sector."""
    return Audience(("floor", tenant, branch, 0))


def kitchen(tenant: TenantId, branch: BranchId) -> Audience:
    """The kitchen of the branch."""
    return Audience(("kitchen", tenant, branch, 0))


def admins(tenant: TenantId, branch: BranchId) -> Audience:
    """The admins of the branch."""
    return Audience(("admins", tenant, branch, 0))


def tenant_admins(tenant: TenantId) -> Audience:
    """The admins of all branches of the tenant."""
    return Audience(("tenant_admins", tenant, 0, 0))


def diners(tenant: TenantId, session: SessionId) -> Audience:
    """The diners of one table session."""
    return Audience(("diners", tenant, session, 0))


def branch_diners(tenant: TenantId, branch: BranchId) -> Audience:
    """The diners of all table sessions of the branch."""
    return Audience(("branch_diners", tenant, branch, 0))


def record(tenant: TenantId, branch: BranchId) -> Audience:
    """Of no client: by it a backend finds the durable events that go to no admin."""
    return Audience(("record", tenant, branch, 0))


def everything_at(tenant: TenantId, branch: BranchId) -> frozenset[Audience]:
    """By which all durable events of a branch are found, and those of the whole tenant.

    With branch 0 it is the latter alone.
    """
    found = {tenant_admins(tenant), record(tenant, BranchId(0))}
    if branch:
        found |= {admins(tenant, branch), record(tenant, branch)}
    return frozenset(found)


class Role(StrEnum):
    """The roles that the endpoints know. A staff token may name others, which have no effect."""

    WAITER = "WAITER"
    KITCHEN = "KITCHEN"
    MANAGER = "MANAGER"
    ADMIN = "ADMIN"


_HEADS = frozenset({Role.MANAGER, Role.ADMIN})


class Endpoint(Enum):
    """A WebSocket path and the roles that it admits. Those of staff check a browser's Origin."""

    __hash__ = object.__hash__  # Enum's own is in Python

    WAITER = ("waiter", _HEADS | {Role.WAITER})
    KITCHEN = ("kitchen", _HEADS | {Role.KITCHEN})
    ADMIN = ("admin", _HEADS)
    DINER = ("diner", frozenset[Role]())

    def __init__(self, label: str, roles: frozenset[Role]) -> None:
        self.label = label
        self.path = f"/ws/{label}"
        self.roles = roles
        self.staff = bool(roles)


ENDPOINTS: Mapping[str, Endpoint] = MappingProxyType({e.path: e for e in Endpoint})

Sectors = Mapping[BranchId, frozenset[SectorId]]
NO_SECTORS: Sectors = MappingProxyType({})


@dataclass(frozen=True, slots=True, kw_only=True)
class Principal:
    """Who a client is, on one endpoint. Times are unix seconds."""

    endpoint: Endpoint
    tenant: TenantId
    branches: frozenset[BranchId]
    expires_at: float
    user: UserId | None = None
    roles: frozenset[str] = field(default_factory=frozenset)
    sectors: Sectors = field(default_factory=lambda: NO_SECTORS)
    session: SessionId | None = None
    table: TableId | None = None  # of the session
    issued_at: float | None = None
    token_id: str | None = None

    @property
    def owner(self) -> tuple[str, TenantId, UserId | SessionId | None]:
        """The key of limits on connections: a user of the tenant, or a session of the tenant."""
        if self.session is not None:
            return ("session", self.tenant, self.session)
        return ("user", self.tenant, self.user)


def audiences_of(principal: Principal) -> frozenset[Audience]:
    """The audiences that a principal is a member of, on the endpoint it is connected to."""
    tenant = principal.tenant
    match principal.endpoint:
        case Endpoint.DINER:
            assert principal.session is not None
            mine = {branch_diners(tenant, branch) for branch in principal.branches}
            return frozenset(mine | {diners(tenant, principal.session)})
        case Endpoint.KITCHEN:
            return frozenset(kitchen(tenant, branch) for branch in principal.branches)
        case Endpoint.ADMIN:
            return _admin_audiences(tenant, principal.branches)
        case Endpoint.WAITER:
            found = {floor(tenant, branch) for branch in principal.branches}
            for branch in principal.branches:
                for sector in principal.sectors.get(branch, ()):
                    found.add(waiters(tenant, branch, sector))
            if principal.roles & _HEADS:
                found |= _admin_audiences(tenant, principal.branches)
            return frozenset(found)


def _admin_audiences(tenant: TenantId, branches: frozenset[BranchId]) -> frozenset[Audience]:
    return frozenset({tenant_admins(tenant)} | {admins(tenant, branch) for branch in branches})
