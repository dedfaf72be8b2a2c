"""Explanations: whether a principal receives an event, and if not, why.

The answer comes from the functions that deliver events, so the two cannot disagree. A reason is
found by calling them again with one fact about the principal changed.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Final, NamedTuple

from .audiences import Audience, Endpoint, Principal, Role, SectorId, SessionId, audiences_of
from .events import Event
from .routing import ROUTES, Routing, To

EVERYWHERE: Final = "token"  # the key of a reason that holds on every endpoint


class Fact(StrEnum):
    """The kinds of reasons why a principal does not receive an event."""

    TENANT = "tenant"
    BRANCH = "branch"
    ROLE = "role"
    TYPE = "type"
    SECTOR = "sector"
    SESSION = "session"
    TOKEN = "token"  # it is invalid  # noqa: S105 - a word


@dataclass(frozen=True, slots=True)
class Reason:
    """Why a principal does not receive an event; ``text`` is for people."""

    fact: Fact
    text: str

    def __str__(self) -> str:
        return f"{self.fact}: {self.text}"


class Later(NamedTuple):
    """In which audience one gets an event ``after`` this many seconds without a confirmation."""

    to: str
    after: float


@dataclass(frozen=True, slots=True)
class Verdict:
    """The endpoints on which a token's holder receives an event, and why not on the others.

    ``later`` has those of the others to which a step brings it, see :class:`~.routing.Step`.
    """

    endpoints: tuple[Endpoint, ...]
    reasons: Mapping[str, Reason]  # by the endpoint's label, or EVERYWHERE
    later: Mapping[str, Later] = field(default_factory=dict)  # by the endpoint's label

    def as_json(self) -> dict[str, Any]:
        """The verdict as ``POST /ws/explain`` returns it."""
        later = {where: each._asdict() for where, each in self.later.items()}
        return {
            "receives": bool(self.endpoints),
            "endpoints": [endpoint.label for endpoint in self.endpoints],
            "reasons": {where: str(reason) for where, reason in self.reasons.items()},
            **({"later": later} if later else {}),
        }


def refused(text: str) -> Verdict:
    """The verdict on a token that no endpoint admits, or that must not be looked at."""
    return Verdict((), {EVERYWHERE: Reason(Fact.TOKEN, text)})


def judge(
    event: Event,
    principals: Sequence[Principal],
    routes: Routing = ROUTES,
    audiences: Collection[Audience] | None = None,
) -> Verdict:
    """The verdict on one token.

    ``principals`` has one principal for each endpoint that admits the token. About a token of
    another tenant the verdict says only that. ``audiences`` as in :func:`why_not`.
    """
    first = principals[0]
    if first.tenant != event.tenant:
        return Verdict((), {EVERYWHERE: _of_another_tenant()})
    receiving: list[Endpoint] = []
    reasons: dict[str, Reason] = {}
    later: dict[str, Later] = {}
    by_endpoint = {principal.endpoint: principal for principal in principals}
    for endpoint in Endpoint:
        if endpoint.staff is not first.endpoint.staff:
            continue
        if (principal := by_endpoint.get(endpoint)) is None:
            reasons[endpoint.label] = _not_admitted(endpoint, first.roles)
        elif (reason := why_not(event, principal, routes, audiences)) is None:
            receiving.append(endpoint)
        else:
            reasons[endpoint.label] = reason
            if (found := _later(event, principal, routes)) is not None:
                later[endpoint.label] = found
    return Verdict(tuple(receiving), reasons, later)


def _later(event: Event, principal: Principal, routes: Routing) -> Later | None:
    """The step that brings an event to a principal which does not receive it at first."""
    mine, after = audiences_of(principal), 0.0
    steps = routes.route_of(event.type).steps
    for step, audiences in zip(steps, routes.audiences_of_steps(event.type, event), strict=True):
        if after and not mine.isdisjoint(audiences):
            return Later(step.name, after)
        after += step.within
    return None


def why_not(
    event: Event,
    principal: Principal,
    routes: Routing = ROUTES,
    audiences: Collection[Audience] | None = None,
) -> Reason | None:
    """Why a principal does not receive an event; None if it does.

    ``audiences`` are those that the event goes to, if they differ from what the routing table says
    (WS_UNCOVERED_SECTOR). Of several reasons the first is returned, in this order: tenant, branch,
    role or type, sector, session.
    """
    named = frozenset(routes.audiences(event) if audiences is None else audiences)

    def receives(who: Principal) -> bool:
        return not named.isdisjoint(audiences_of(who))

    if receives(principal):
        return None
    if principal.tenant != event.tenant:
        return _of_another_tenant()
    to = routes.route_of(event.type).to
    fixes = _fixes(event, principal)
    ideal = _fixed(principal, fixes.values())
    if not receives(ideal):
        if principal.endpoint is Endpoint.DINER and event.branch and To.DINERS in to:
            return Reason(Fact.SESSION, f"{event.type} is for one session, but names no session")
        if Fact.BRANCH in fixes:
            return _other_branch(event, principal)
        if receives(replace(ideal, roles=ideal.roles | {Role.MANAGER})):
            return _no_admin(event, principal)
        return _never(event, principal.endpoint, to, known=event.type in routes)
    for fact, fix in fixes.items():
        others = [each for other, each in fixes.items() if other is not fact]
        if receives(replace(principal, **fix)) or not receives(_fixed(principal, others)):
            return _REASONS[fact](event, principal)
    raise AssertionError("with all fixes the principal receives it, but no single fix is a reason")


def describe(audience: Audience) -> dict[str, Any]:
    """An audience as JSON: its kind, tenant, and branch, sector or session."""
    kind, tenant, number, sector = audience
    found: dict[str, Any] = {"audience": kind, "tenant_id": int(tenant)}
    if kind == "diners":
        found["session_id"] = number
    elif kind != "tenant_admins":
        found["branch_id"] = number
    if kind == "waiters":
        found["sector_id"] = sector
    return found


def describe_type(event_type: str, routes: Routing) -> dict[str, Any]:
    """What the table says of a type, as JSON, but for its audiences."""
    route = routes.route_of(event_type)
    return {
        "type": event_type,
        "known": event_type in routes,
        "durable": route.durable,
        "receipt": route.receipt,
        "steps": [{"to": step.name, "within": step.within} for step in route.steps],
    }


def _fixes(event: Event, principal: Principal) -> dict[Fact, dict[str, Any]]:
    """What would have to change in the principal, in the order of the reasons."""
    found: dict[Fact, dict[str, Any]] = {}
    if event.branch and event.branch not in principal.branches:
        found[Fact.BRANCH] = {"branches": principal.branches | {event.branch}}
    if principal.endpoint is Endpoint.WAITER and event.sector is not None:
        has = principal.sectors.get(event.branch, frozenset[SectorId]())
        if event.sector not in has or Fact.BRANCH in found:
            sectors = {**principal.sectors, event.branch: has | {event.sector}}
            found[Fact.SECTOR] = {"sectors": sectors}
    if principal.endpoint is Endpoint.DINER and event.session not in {None, principal.session}:
        found[Fact.SESSION] = {"session": event.session}
    return found


def _fixed(principal: Principal, fixes: Iterable[dict[str, Any]]) -> Principal:
    for fix in fixes:
        principal = replace(principal, **fix)
    return principal


def _of_another_tenant() -> Reason:
    return Reason(Fact.TENANT, "the token is of another tenant")


def _not_admitted(endpoint: Endpoint, roles: frozenset[str]) -> Reason:
    wanted = ", ".join(sorted(endpoint.roles))
    return Reason(Fact.ROLE, f"{endpoint.path} admits {wanted}; the token has {_words(roles)}")


def _other_branch(event: Event, principal: Principal) -> Reason:
    mine = _numbers(principal.branches)
    return Reason(Fact.BRANCH, f"the event is for branch {event.branch}, the token for {mine}")


def _other_sector(event: Event, principal: Principal) -> Reason:
    mine = _numbers(principal.sectors.get(event.branch, ()))
    text = f"the event is for sector {event.sector} of branch {event.branch}, this waiter has"
    return Reason(Fact.SECTOR, f"{text} {mine}")


def _other_session(event: Event, principal: Principal) -> Reason:
    mine: SessionId | None = principal.session
    return Reason(Fact.SESSION, f"the event is for session {event.session}, the token for {mine}")


_REASONS: Final = {
    Fact.BRANCH: _other_branch,
    Fact.SECTOR: _other_sector,
    Fact.SESSION: _other_session,
}


def _no_admin(event: Event, principal: Principal) -> Reason:
    what = f"{event.type} goes" if event.branch else "an event for the whole tenant (branch 0) goes"
    heads = "which on /ws/waiter are ADMIN and MANAGER"
    return Reason(Fact.ROLE, f"{what} to admins, {heads}; the token has {_words(principal.roles)}")


def _never(event: Event, endpoint: Endpoint, to: To, *, known: bool) -> Reason:
    if not event.branch:
        text = "an event for the whole tenant (branch 0) goes to its admins only"
        if To.ADMINS not in to:
            text += f", and {event.type} never goes to them"
        return Reason(Fact.TYPE, text)
    kinds = [kind.name.lower().replace("_", " ") for kind in to if kind.name] or ["nobody"]
    text = f"{event.type}{'' if known else ' is not a known type and'} goes to {', '.join(kinds)}"
    return Reason(Fact.TYPE, f"{text}, never to {endpoint.path}")


def _numbers(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, sorted(numbers))) or "none"


def _words(words: Iterable[str]) -> str:
    return ", ".join(sorted(words)) or "none"
