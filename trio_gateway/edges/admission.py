"""Admission: who is let in, and as whom; at connect, at renewal, and over HTTP."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from ..core.audiences import Endpoint, Principal
from ..core.closing import Close, Rejected
from ..settings import Settings
from .auth import Auth, FirstOf, JwtAuth, LegacyTableAuth, TableAuth, check_origin, is_own_page
from .handshake import Handshake
from .jwks import KeySet
from .revocations import Revocations, Tickets

if TYPE_CHECKING:
    from .sectors import Roster


class Admission:
    """The one way to a :class:`Principal`: origin, ticket, credential, revocation, sectors.

    ``auth`` replaces the way to authenticate per endpoint, revocations included.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        auth: Mapping[Endpoint, Auth] | None = None,
        roster: "Roster | None" = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._origins = settings.allowed_origins
        self._needs_origin = settings.production
        self._auth = dict(auth) if auth is not None else _auth(settings, clock)
        self._checks_revocations = auth is None
        self._roster = roster
        # From the moment that there are commands to Redis:
        self.revocations: Revocations | None = None
        self.tickets: Tickets | None = None

    async def admit(self, handshake: Handshake) -> Principal:
        """Who this is, or :exc:`Rejected`. Its sectors are the last thing that is awaited."""
        if handshake.endpoint.staff:
            required = self._needs_origin and not handshake.same_origin
            # The console, in development; in production its origin must be listed as any other.
            if self._needs_origin or not is_own_page(handshake):
                check_origin(handshake.origin, self._origins, required=required)
        if handshake.ticket is not None:
            if self.tickets is None:
                raise Rejected(Close.SERVER_OVERLOADED, "not started", "dependency")
            handshake = handshake.with_credential(await self.tickets.redeem(handshake.ticket))
        return await self._authenticate(handshake)

    def is_allowed(self, origin: str) -> bool:
        """Whether staff may come from a page on this origin."""
        try:
            check_origin(origin, self._origins, required=False)
        except Rejected:
            return False
        return True

    async def renew(self, principal: Principal, token: str | None) -> Principal:
        """Who this is by another token, on the same endpoint; it must be the same one."""
        if token is None:
            raise Rejected(Close.AUTH_FAILED, "token missing", "auth")
        renewed = await self._authenticate(Handshake(principal.endpoint, {}, {}, renewed=token))
        if renewed.owner != principal.owner:
            raise Rejected(Close.FORBIDDEN, "token of somebody else", "renewal")
        return renewed

    async def identify(self, token: str | None, *, staff: bool | None = None) -> list[Principal]:
        """Who holds this token is, on each endpoint that lets it in: staff, diners, or any.

        Raises :exc:`Rejected` if there is none.
        """
        found: list[Principal] = []
        rejections: list[Rejected] = []
        for endpoint in Endpoint:
            if staff is not None and endpoint.staff is not staff:
                continue
            handshake = Handshake(endpoint, {}, {}, renewed=token or "")
            try:
                found.append(await self._auth[endpoint].authenticate(handshake))
            except Rejected as rejected:
                rejections.append(rejected)
        if not found:
            # FORBIDDEN says more than AUTH_FAILED: that token is valid, though not for this. And
            # where nobody could look, no other endpoint's word on the token is the last.
            raise max(rejections, key=lambda r: (r.close is Close.SERVER_OVERLOADED, r.close))
        await self._check_revocation(found[0])  # one token, however many endpoints
        return [await self._assign(principal) for principal in found]

    async def _authenticate(self, handshake: Handshake) -> Principal:
        principal = await self._auth[handshake.endpoint].authenticate(handshake)
        await self._check_revocation(principal)
        return await self._assign(principal)

    async def _check_revocation(self, principal: Principal) -> None:
        if self.revocations is not None and self._checks_revocations:
            await self.revocations.check(principal)

    async def _assign(self, principal: Principal) -> Principal:
        return principal if self._roster is None else await self._roster.assign(principal)


def _auth(settings: Settings, clock: Callable[[], float]) -> dict[Endpoint, Auth]:
    url = settings.jwt_jwks_url
    key_set = KeySet(url, settings.jwt_algorithms) if url is not None else None
    staff = JwtAuth(settings.staff_keys, settings.rules, clock, key_set)
    diner: Auth = TableAuth(settings.table_keys, settings.rules, clock)
    if settings.allow_legacy_table_tokens:
        diner = FirstOf(diner, LegacyTableAuth(settings.table_secret, clock))
    return {endpoint: staff if endpoint.staff else diner for endpoint in Endpoint}
