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
from .revocations import Revocations, Watch
from .tickets import Tickets

if TYPE_CHECKING:
    from .sectors import SectorAssignments


class Candidate:
    """A client that is being admitted: who it is, and what is heard about it until it has joined.

    A context manager, to be left when it has joined or was refused.
    """

    def __init__(self, watch: Watch, ticket: str | None) -> None:
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

    async def admit(self, request: ClientRequest) -> Candidate:
        """Who this is, or :exc:`Rejected`. Its ticket, if it brings one, is still good then."""
        if request.endpoint.staff:
            required = self._needs_origin and not request.same_origin
            # The console, in development; in production its origin must be listed as any other.
            if self._needs_origin or not is_own_page(request.origin, request.host):
                check_origin(request.origin, self._origins, required=required)
        ticket = request.ticket
        credential = request.credential if ticket is None else await self.token_of(ticket)
        return Candidate(await self._authenticate(credential, request.endpoint), ticket)

    async def look_again(self, candidate: Candidate) -> None:
        """Raise :exc:`Rejected` if its token was revoked meanwhile, or if nobody knows."""
        await candidate.watch.check()

    def confirm(self, candidate: Candidate) -> Principal | None:
        """Who this is now, or :exc:`Rejected` for what has happened since it was looked at.

        None if it must be looked at again. What is returned holds until the next await.
        """
        if not candidate.watch.is_settled():
            return None
        if candidate.principal.expires_at <= self._clock():
            raise Rejected(Close.AUTH_FAILED, "token expired", "auth")
        return self._latest(candidate.principal)

    async def token_of(self, ticket: str) -> str:
        """The token that a ticket stands for, which is not redeemed by this."""
        return await self._accepted_tickets.look_at(ticket)

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
        with Candidate(await self._authenticate(token, principal.endpoint), None) as candidate:
            if candidate.principal.owner != principal.owner:
                raise Rejected(Close.FORBIDDEN, "token of somebody else", "renewal")
            while (renewed := self.confirm(candidate)) is None:
                await self.look_again(candidate)
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

    async def _authenticate(self, credential: str, endpoint: Endpoint) -> Watch:
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

    def _watch(self, principal: Principal) -> Watch:
        return Watch(self._revocations, principal)

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
