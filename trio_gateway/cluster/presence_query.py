"""Asks all processes who is present in a branch, or in a tenant."""

from typing import Final

import msgspec

from ..core.audiences import BranchId, TenantId
from ..core.presence import Items, SessionItem, UserItem, merge
from .control import Control
from .presence import Presence

PATIENCE: Final = 1.5  # seconds, so that the client has its answer within 2
_KIND: Final = "presence"


class PresenceRequest(msgspec.Struct):
    """Asks a process who of a branch, or of a whole tenant, is connected to it."""

    tenant_id: int
    branch_id: int | None = None


class PresenceReport(msgspec.Struct):
    """Who is connected, and the processes that did not say."""

    users: list[UserItem]
    sessions: list[SessionItem]
    complete: bool
    missing: list[str]


def answer_presence(control: Control, presence: Presence) -> None:
    """Let this process answer the question of :func:`who_is_present`."""

    async def answer(request: PresenceRequest) -> Items:
        branch = None if request.branch_id is None else BranchId(request.branch_id)
        return await presence.here(TenantId(request.tenant_id), branch)

    control.handle(_KIND, PresenceRequest, answer)


async def who_is_present(
    control: Control,
    tenant: TenantId,
    branch: BranchId | None = None,
    *,
    node: str | None = None,
) -> tuple[PresenceReport, list[str]]:
    """Return who has a connection to any process, in one branch or in the whole tenant; and which
    of the missing processes said that they do not know, because WS_CLUSTER is off there.

    ``node`` names the only process that counts, which must be alive.

    Answers within :data:`PATIENCE`. Raises :exc:`~..broker.commands.Unavailable` if Redis is.
    """
    request = PresenceRequest(tenant, branch)
    answers = await control.ask(_KIND, request, timeout=PATIENCE, only=node)
    items = merge([found for _, found in answers.decoded(Items)])
    report = PresenceReport(items.users, items.sessions, answers.complete, answers.missing)
    return report, answers.unknown
