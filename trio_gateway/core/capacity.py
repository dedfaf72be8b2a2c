"""Capacity: how many connections there may be, and how one too many is refused."""

from dataclasses import dataclass
from typing import Final

from .audiences import SessionId, TenantId, UserId
from .close_codes import Close, Rejected

#: A user of a tenant, or a session of a tenant: :attr:`Principal.owner`. Or a whole tenant.
Owner = tuple[str, TenantId, UserId | SessionId | None]
#: Refusals for which dead connections may give way.
OWNER_LIMITS: Final = frozenset({"user_limit", "session_limit"})


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityLimits:
    """The most connections: in total, per user, per diner session, per tenant (0: no limit)."""

    total: int
    per_user: int
    per_session: int
    per_tenant: int = 0

    def of(self, owner: Owner) -> int:
        """The limit of a user, of a session, or of a tenant as a whole."""
        match owner[0]:
            case "user":
                return self.per_user
            case "session":
                return self.per_session
        return self.per_tenant

    def check(self, owner: Owner, *, owned: int, of_tenant: int, taken: int) -> None:
        """Raise :exc:`Rejected` if one more connection of a user or session is over a limit.

        ``owned`` are those that it has. That limit is first: room can be made there, which makes
        room in the others, too.
        """
        if owned >= self.of(owner):
            raise owner_is_full(owner)
        if self.per_tenant and of_tenant >= self.per_tenant:
            raise tenant_is_full()
        if taken >= self.total:
            raise Rejected(Close.SERVER_OVERLOADED, "too many connections", "total_limit")


def owner_is_full(owner: Owner) -> Rejected:
    """The refusal of a user or session at its limit."""
    kind = owner[0]
    text = f"too many connections of this {kind}"
    return Rejected(Close.SERVER_OVERLOADED, text, f"{kind}_limit")


def of_tenant(tenant: TenantId) -> Owner:
    """The key under which all connections of a tenant are counted."""
    return ("tenant", tenant, None)


def tenant_is_full() -> Rejected:
    """The refusal of a tenant at its limit."""
    text = "too many connections of this tenant"
    return Rejected(Close.SERVER_OVERLOADED, text, "tenant_limit")
