"""Admission: decide who a client is, when it connects, renews its token or calls by HTTP."""

import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Self

from ..core.audiences import Endpoint, Principal
from ..core.client_request import ClientRequest
from ..core.close_codes import Close, Rejected, auth_failed
from ..core.origins import check_origin, is_own_page
from ..runtime.hub import Reservation
from ..settings import Settings
from .auth import Auth, FirstOf, ImmediateAuth, JwtAuth, LegacyTableAuth, TableAuth
from .jwks import KeySet
from .revocations import CredentialWatch, Revocations
from .tickets import Tickets

if TYPE_CHECKING:
    from .sectors import SectorAssignments


class PendingAdmission:
    """A client that was authenticated and has not joined the hub yet.

    A context manager; leave it when the client has joined or was rejected.
    """

    def __init__(
        self, watch: CredentialWatch, ticket: str | None, place: Reservation | None = None
    ) -> None:
        self.watch = watch
        self.ticket = ticket  # not redeemed yet
        self._place = place

    @property
    def principal(self) -> Principal:
        return self.watch.principal

    def take_place(self) -> Reservation | None:
        """The place that was reserved for it, if there is one. The caller releases it."""
        place, self._place = self._place, None
        return place

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.watch.stop()
        if (place := self.take_place()) is not None:
            place.give_up()


class Admission:
    """Checks origin, ticket, credential, sectors and revocation, and returns a :class:`Principal`.

    What was checked before an await is checked again after it. A ticket is redeemed last.

    ``auth`` replaces the :class:`~.auth.Auth` of each endpoint. Without ``tickets`` every ticket
    is rejected. Without ``revocations`` no credential is revoked.
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
        self._immediate = {
            endpoint: each
            for endpoint, each in self._auth.items()
            if isinstance(each, ImmediateAuth)
        }
        self._sector_assignments = sector_assignments
        self._clock = clock
        self._revocations = revocations
        self._tickets = tickets

    async def try_admit(self, request: ClientRequest) -> PendingAdmission | None:
        """As :meth:`admit`, if only revocations have to be waited for, as mostly; else None.

        Unlike :meth:`admit` it is bounded in time by itself.
        """
        auth = self._immediate.get(request.endpoint)
        if auth is None or request.ticket is not None:
            return None
        self._check_origin(request)
        principal = auth.authenticate_nowait(request.credential, request.endpoint)
        if principal is not None and self._sector_assignments is not None:
            principal = self._sector_assignments.assign_nowait(principal)
        if principal is None:
            return None
        watch = CredentialWatch(self._revocations, principal)
        watch.start()
        try:
            return PendingAdmission(watch, None, await watch.enter())
        except BaseException:
            watch.stop()
            raise

    async def admit(self, request: ClientRequest) -> PendingAdmission:
        """Authenticate a client, or raise :exc:`Rejected`. Does not redeem its ticket."""
        self._check_origin(request)
        ticket = request.ticket
        credential = request.credential if ticket is None else await self.token_of(ticket)
        return PendingAdmission(await self._authenticate(credential, request.endpoint), ticket)

    def _check_origin(self, request: ClientRequest) -> None:
        if request.endpoint.staff:
            required = self._needs_origin and not request.same_origin
            # The console in development. In production its origin must be listed like any other.
            if self._needs_origin or not is_own_page(request.origin, request.host):
                check_origin(request.origin, self._origins, required=required)

    async def recheck(self, pending: PendingAdmission) -> None:
        """Raise :exc:`Rejected` if its token was revoked, or if that cannot be checked."""
        await pending.watch.check()

    def confirm(self, pending: PendingAdmission) -> Principal | None:
        """Return the current principal, or raise :exc:`Rejected` if it is no longer admitted.

        Returns None if :meth:`recheck` is needed first. The result holds until the next await.
        """
        if not pending.watch.is_current():
            return None
        if pending.principal.expires_at <= self._clock():
            raise auth_failed("token expired")
        return self._latest(pending.principal)

    async def token_of(self, ticket: str) -> str:
        """Return the token of a ticket, without redeeming it."""
        return await self._accepted_tickets.peek(ticket)

    async def redeem(self, ticket: str) -> None:
        """Use up a ticket. Raises :exc:`Rejected` if somebody else has used it."""
        await self._accepted_tickets.redeem(ticket)

    @property
    def _accepted_tickets(self) -> Tickets:
        if self._tickets is None:
            raise auth_failed("tickets are not accepted here")
        return self._tickets

    def is_allowed(self, origin: str, host: str = "") -> bool:
        """Whether staff may connect from a page on this origin; ``host`` is the Host header."""
        if not self._needs_origin and is_own_page(origin, host):
            return True
        try:
            check_origin(origin, self._origins, required=False)
        except Rejected:
            return False
        return True

    async def renew(self, principal: Principal, token: str | None) -> Principal:
        """Return the principal of a new token, on the same endpoint and of the same owner.

        Raises :exc:`Rejected`. The result holds until the next await.
        """
        if token is None:
            raise auth_failed("token missing")
        with PendingAdmission(await self._authenticate(token, principal.endpoint), None) as pending:
            if pending.principal.owner != principal.owner:
                raise Rejected(Close.FORBIDDEN, "token of somebody else", "renewal")
            while (renewed := self.confirm(pending)) is None:
                await self.recheck(pending)
            return renewed

    async def identify(self, token: str | None, *, staff: bool | None = None) -> list[Principal]:
        """Return the principal of a token on each endpoint that admits it.

        ``staff`` limits it to the endpoints of staff (True) or of diners (False). Raises
        :exc:`Rejected` if no endpoint admits it.
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
            # FORBIDDEN tells more than AUTH_FAILED: the token is valid, but not for this endpoint.
            # If one endpoint could not check the token, the others' answers are not final.
            raise max(rejections, key=lambda r: (r.close is Close.SERVER_OVERLOADED, r.close))
        # One token, however many endpoints.
        with CredentialWatch(self._revocations, found[0]) as watch:
            assigned = [await self._assign(principal) for principal in found]
            await watch.check()
        return assigned

    async def _authenticate(self, credential: str, endpoint: Endpoint) -> CredentialWatch:
        """Return the principal with its sectors, watched."""
        principal = await self._auth[endpoint].authenticate(credential, endpoint)
        watch = CredentialWatch(self._revocations, principal)
        watch.start()
        try:
            watch.principal = await self._assign(principal)
            await watch.check()  # last
        except BaseException:
            watch.stop()
            raise
        return watch

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
    """Return the :class:`~.auth.Auth` of each endpoint, according to the settings."""
    url = settings.jwt_jwks_url
    key_set = KeySet(url, settings.jwt_algorithms) if url is not None else None
    staff = JwtAuth(settings.staff_keys, settings.rules, clock, key_set)
    diner: Auth = TableAuth(settings.table_keys, settings.rules, clock)
    if settings.allow_legacy_table_tokens:
        diner = FirstOf(diner, LegacyTableAuth(settings.table_secret, clock))
    return {endpoint: staff if endpoint.staff else diner for endpoint in Endpoint}
