"""``GET /ws/presence``: who is present in a branch, on all processes."""

from collections.abc import Hashable
from typing import Final

from quart import request

from ..broker.commands import Unavailable
from ..cluster.presence_query import who_is_present
from ..core.audiences import BranchId, Endpoint, TenantId
from ..core.client_request import bearer
from ..core.close_codes import Rejected
from ..parts import Parts
from ..runtime.concurrency_limiter import Overloaded
from .catchup import is_id
from .responses import Answer, identify, problem, refusal, respond

_ALL: Final = "*"  # all processes; what dashboards can put into a query


async def presence(parts: Parts) -> Answer:
    """Who is present in a branch, see Presence; for its MANAGER or ADMIN, with WS_CLUSTER."""
    if parts.cluster is None or parts.cluster.presence is None:
        return problem(404, "presence is not known: WS_CLUSTER is not set")
    token = request.args.get("token") or bearer(request.headers.get("Authorization"))
    try:
        principals = await identify(parts, token, staff=True)
    except Rejected as rejected:
        return refusal(rejected)
    wanted = request.args.get("branch_id", "")
    if not is_id(wanted):
        return problem(422, "branch_id must be a positive integer")
    branch = BranchId(int(wanted))
    admin = next((each for each in principals if each.endpoint is Endpoint.ADMIN), None)
    if admin is None:
        return problem(403, "for the roles MANAGER and ADMIN only")
    if branch not in admin.branches:
        return problem(403, "branch_id is not a branch of this token")
    return await report(parts, admin.tenant, branch, admin.owner)


async def report(parts: Parts, tenant: TenantId, branch: BranchId, owner: Hashable) -> Answer:
    """The response that says who is present in a branch. Presence must be known, see WS_CLUSTER.

    The request's ``node`` names a process, to which it is limited; ``*`` means all. Each owner may
    ask for a few at a time.
    """
    assert parts.cluster is not None
    node = request.args.get("node", _ALL)
    try:
        give_back = await parts.catch_ups.take(owner)
    except Overloaded:
        return problem(429, "too many simultaneous requests of one user or key", retry_after=1)
    try:
        if node != _ALL and node not in await parts.cluster.registry.read():
            return problem(404, "no live process has this name (node)")
        found, _ = await who_is_present(
            parts.cluster.control, tenant, branch, node=None if node == _ALL else node
        )
    except Unavailable as error:
        return problem(503, error.cause, retry_after=1)
    finally:
        give_back()
    return respond(found)
