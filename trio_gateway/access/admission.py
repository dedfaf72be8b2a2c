"""Admission: who is let in, and as whom; at connect, at renewal, and over HTTP."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

from ..core.audiences import Endpoint, Principal
from ..core.client_request import ClientRequest
from ..core.close_codes import Close, Rejected
from ..core.origins import check_origin, is_own_page
from ..settings import Settings
from .auth import Auth, FirstOf, JwtAuth, LegacyTableAuth, TableAuth
from .jwks import KeySet
from .revocations import CredentialWatch, Revocations
from .tickets import Tickets

if TYPE_CHECKING:
    from .sectors import SectorAssignments


class PendingAdmission:
    """A client that is being admitted: who it is, and what is heard about it until it has joined.

    A context manager, to be left when it has joined or was refused.
    """

    def __init__(self, watch: CredentialWatch, ticket: str | None) -> None:
        self.watch = watch
        self.ticket = ticket  # not redeemed yet

    @property
    def principal(self) -> Principal:
        return self.watch.principal

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()


class Admission:
    """The one way to a :class:`Principal`: origin, ticket, credential, sectors, revocation.

    What is checked before an await is looked at again after it; a ticket is redeemed last.
    ``auth`` replaces the way to authenticate per endpoint. Without ``tickets`` every ticket is
    refused, without ``revocations`` none is looked up.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        tickets: Tickets | None = None,
        revocations: Revocations | None = None,
        auth: Mapping[Endpoint, Auth] | None = None,
        sector_assignments: "SectorAssignments | None" = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._origins = settings.allowed_origins
        self._needs_origin = settings.production
        self._auth = dict(auth) if auth is not None else default_auth(settings, clock)
        self._sector_assignments = sector_assignments
        self._clock = clock
        self._revocations = revocations
        self._tickets = tickets

    async def admit(self, request: ClientRequest) -> PendingAdmission:
        """Who this is, or :exc:`Rejected`. Its ticket, if it brings one, is still good then."""
        if request.endpoint.staff:
            required = self._needs_origin and not request.same_origin
            # The console, in development; in production its origin must be listed as any other.
            if self._needs_origin or not is_own_page(request.origin, request.host):
                check_origin(request.origin, self._origins, required=required)
        ticket = request.ticket
        credential = request.credential if ticket is None else await self.token_of(ticket)
        return PendingAdmission(await self._authenticate(credential, request.endpoint), ticket)

    async def recheck(self, pending: PendingAdmission) -> None:
        """Raise :exc:`Rejected` if its token was revoked meanwhile, or if nobody knows."""
        await pending.watch.check()

    def confirm(self, pending: PendingAdmission) -> Principal | None:
        """Who this is now, or :exc:`Rejected` for what has happened since it was looked at.

        None if it must be looked at again. What is returned holds until the next await.
        """
        if not pending.watch.is_current():
            return None
        if pending.principal.expires_at <= self._clock():
            raise Rejected(Close.AUTH_FAILED, "token expired", "auth")
        return self._latest(pending.principal)

    async def token_of(self, ticket: str) -> str:
        """The token that a ticket stands for, which is not redeemed by this."""
        return await self._accepted_tickets.peek(ticket)

    async def redeem(self, ticket: str) -> None:
        """Use a ticket up; raise :exc:`Rejected` if somebody else has."""
        await self._accepted_tickets.redeem(ticket)

    @property
    def _accepted_tickets(self) -> Tickets:
        if self._tickets is None:
            raise Rejected(Close.AUTH_FAILED, "tickets are not accepted here", "auth")
        return self._tickets

    def is_allowed(self, origin: str) -> bool:
        """Whether staff may come from a page on this origin."""
        try:
            check_origin(origin, self._origins, required=False)
        except Rejected:
            return False
        return True

    async def renew(self, principal: Principal, token: str | None) -> Principal:
        """Who this is by another token, on the same endpoint; it must be the same one.

        It holds until the next await.
        """
        if token is None:
            raise Rejected(Close.AUTH_FAILED, "token missing", "auth")
        with PendingAdmission(await self._authenticate(token, principal.endpoint), None) as pending:
            if pending.principal.owner != principal.owner:
                raise Rejected(Close.FORBIDDEN, "token of somebody else", "renewal")
            while (renewed := self.confirm(pending)) is None:
                await self.recheck(pending)
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
            try:
                found.append(await self._auth[endpoint].authenticate(token or "", endpoint))
            except Rejected as rejected:
                rejections.append(rejected)
        if not found:
            # FORBIDDEN says more than AUTH_FAILED: that token is valid, though not for this. And
            # where nobody could look, no other endpoint's word on the token is the last.
            raise max(rejections, key=lambda r: (r.close is Close.SERVER_OVERLOADED, r.close))
        with self._watch(found[0]) as watch:  # one token, however many endpoints
            assigned = [await self._assign(principal) for principal in found]
            await watch.check()
        return assigned

    async def _authenticate(self, credential: str, endpoint: Endpoint) -> CredentialWatch:
        """The principal with its sectors, watched already; its revocation is looked up last."""
        watch = self._watch(await self._auth[endpoint].authenticate(credential, endpoint))
        watch.start()
        try:
            watch.principal = await self._assign(watch.principal)
            await watch.check()
        except BaseException:
            watch.stop()
            raise
        return watch

    def _watch(self, principal: Principal) -> CredentialWatch:
        return CredentialWatch(self._revocations, principal)

    async def _assign(self, principal: Principal) -> Principal:
        return (
            principal
            if self._sector_assignments is None
            else await self._sector_assignments.assign(principal)
        )

    def _latest(self, principal: Principal) -> Principal:
        return (
            principal
            if self._sector_assignments is None
            else self._sector_assignments.latest(principal)
        )


def default_auth(
    settings: Settings, clock: Callable[[], float] = time.time
) -> dict[Endpoint, Auth]:
    """The way to authenticate on each endpoint that the settings say."""
    url = settings.jwt_jwks_url
    key_set = KeySet(url, settings.jwt_algorithms) if url is not None else None
    staff = JwtAuth(settings.staff_keys, settings.rules, clock, key_set)
    diner: Auth = TableAuth(settings.table_keys, settings.rules, clock)
    if settings.allow_legacy_table_tokens:
        diner = FirstOf(diner, LegacyTableAuth(settings.table_secret, clock))
    return {endpoint: staff if endpoint.staff else diner for endpoint in Endpoint}
