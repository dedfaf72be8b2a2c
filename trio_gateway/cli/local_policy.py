"""The routing and admission of a gateway with the settings of this machine."""

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import structlog

from ..access.admission import Admission
from ..access.auth import Auth, FirstOf, JwtAuth, LegacyTableAuth, TableAuth
from ..core.audiences import Audience, Endpoint, Principal
from ..core.close_codes import Rejected
from ..core.events import Event
from ..core.explanation import Verdict, describe, describe_type, judge, refused
from ..core.minting import mint, sign_legacy
from ..core.signatures import Key, claims_of, names_of
from ..core.tokens import is_for_diners
from ..settings import InvalidSettings, Settings
from .errors import misused

if TYPE_CHECKING:
    from ..access.sectors import SectorAssignments

_SIGNER: Final = "HS256"


@dataclass(frozen=True, slots=True)
class _Holder:
    """The holder of a token, or why the token is refused."""

    found: Sequence[Principal] | Verdict
    verified: bool


async def ask(settings: Settings, event: Event, tokens: Sequence[str]) -> Mapping[str, Any]:
    """Answer as POST /ws/explain does, without the counts of connections.

    The answer also has ``verified`` for each token, and ``notes`` for people.
    """
    sector_assignments = _sector_assignments(settings)
    try:
        # Its log entries are for operators of a gateway; the answer contains what matters here.
        with structlog.testing.capture_logs():
            policy = _Policy(settings, sector_assignments)
            holders = [await policy.holder_of(token) for token in tokens]
        failed = sector_assignments is not None and sector_assignments.queries["failed"] > 0
    finally:
        if sector_assignments is not None:
            sector_assignments.close()
    routes = settings.routes
    audiences = list(dict.fromkeys(routes.audiences(event)))
    return {
        **describe_type(event.type, routes),
        "audiences": [describe(each) for each in audiences],
        "tokens": [
            (
                holder.found
                if isinstance(holder.found, Verdict)
                else judge(event, holder.found, routes)
            ).as_json()
            | {"verified": holder.verified}
            for holder in holders
        ],
        "notes": [
            *_notes_on_tokens(settings, holders, database_failed=failed),
            *_notes_on_sectors(settings, event, audiences),
        ],
    }


class _Policy:
    """A gateway's admission, and a second one for tokens whose signature can't be checked here.

    Those are signed again with a random key, and then read like any other token.
    """

    def __init__(self, settings: Settings, sector_assignments: "SectorAssignments | None") -> None:
        self._settings = settings
        self._gateways = Admission(settings, sector_assignments=sector_assignments)
        self._secret = secrets.token_urlsafe(32)
        keys = (Key(self._secret, (_SIGNER,)),)
        staff = JwtAuth(keys, settings.rules)
        diner: Auth = TableAuth(keys, settings.rules)
        if settings.allow_legacy_table_tokens:
            diner = FirstOf(diner, LegacyTableAuth(self._secret))
        ways = {endpoint: staff if endpoint.staff else diner for endpoint in Endpoint}
        self._unchecked = Admission(settings, auth=ways, sector_assignments=sector_assignments)

    async def holder_of(self, token: str) -> _Holder:
        diners = is_for_diners(token)
        if diners and claims_of(token) is None and not self._settings.allow_legacy_table_tokens:
            text = "a legacy table token, and ALLOW_LEGACY_TABLE_TOKENS is not true"
            return _Holder(refused(text), verified=False)
        unchecked = await _identify(self._unchecked, self._sign_again(token), diners=diners)
        if not _has_keys(self._settings, diners=diners):
            return _Holder(unchecked, verified=False)
        found = await _identify(self._gateways, token, diners=diners)
        if not isinstance(found, Verdict) or found == unchecked:
            return _Holder(found, verified=True)
        allowed = names_of(token)[0]
        if diners or allowed is None or allowed in self._settings.jwt_algorithms:
            keys = "TABLE_TOKEN_SECRET" if diners else _staff_keys(self._settings)
            found = refused(f"not signed with {keys}, or changed after it was signed")
        return _Holder(found, verified=True)

    def _sign_again(self, token: str) -> str:
        claims = claims_of(token)
        if claims is not None:
            return mint(claims, self._secret, _SIGNER)
        return sign_legacy(token.rpartition(":")[0], self._secret)


async def _identify(
    admission: Admission, token: str, *, diners: bool
) -> Sequence[Principal] | Verdict:
    try:
        return await admission.identify(token, staff=not diners)
    except Rejected as rejected:
        return refused(rejected.text)


def _has_keys(settings: Settings, *, diners: bool) -> bool:
    """Whether there is a key to check a signature with."""
    if diners:
        return settings.table_token_secret is not None
    return bool(settings.jwt_secret or settings.jwt_public_key or settings.jwt_jwks_url)


def _staff_keys(settings: Settings) -> str:
    names = ("jwt_secret", "jwt_public_key", "jwt_jwks_url")
    return " or ".join(name.upper() for name in names if getattr(settings, name))


def _notes_on_tokens(
    settings: Settings, holders: Sequence[_Holder], *, database_failed: bool
) -> list[str]:
    if not holders:
        return []
    found = ["revocations are not checked here: ask a gateway with --url"]
    if not all(holder.verified for holder in holders):
        found.append("claims are not verified where JWT_SECRET or TABLE_TOKEN_SECRET is not set")
    if settings.database_url is None:
        found.append("sectors are the tokens' sector_ids: DATABASE_URL is not set")
    elif database_failed:
        found.append("sectors are the tokens' sector_ids where the database did not answer")
    else:
        found.append("sectors are today's in the database")
    return found


def _notes_on_sectors(settings: Settings, event: Event, audiences: Sequence[Audience]) -> list[str]:
    named = {kind for kind, *_ in audiences}
    if settings.ws_uncovered_sector != "branch" or "waiters" not in named:
        return []
    condition = f"if no waiter of sector {event.sector} is connected"
    receivers = f"all waiters of branch {event.branch}"
    return [f"{condition}, {receivers} receive it (WS_UNCOVERED_SECTOR=branch)"]


def _sector_assignments(settings: Settings) -> "SectorAssignments | None":
    """Make the gateway's sector assignments, for a hub without connections."""
    if settings.database_url is None:
        return None
    import time

    from ..access.sectors import make_sector_assignments
    from ..core.resilience import Breaker
    from ..runtime.hub import Hub

    breaker = Breaker(settings.circuit_failure_threshold, settings.circuit_recovery_timeout)
    try:
        return make_sector_assignments(settings, Hub(), breaker, time.time)
    except InvalidSettings as invalid:
        misused(invalid.problems)
