"""``disconnect`` and ``refresh``: orders to all processes, also to one that is missing now."""

from typing import Annotated, Final

import msgspec
from quart import Response

from ...core.api_keys import ApiKey
from ...core.control_messages import Disconnect, Disconnected, SectorsChanged
from ...core.decimals import is_decimal
from ...core.events import MAX_ID
from ...parts import Parts
from ..responses import Answer
from .reading import TenantNumber, check_tenant, read_body

_MOST_DIGITS: Final = 40
# JSON Schema's `$` is the end, Python's may be before a line feed: so the pattern is not checked.
_User = (
    Annotated[int, msgspec.Meta(ge=0, le=MAX_ID)]
    | Annotated[str, msgspec.Meta(extra_json_schema={"pattern": f"^[0-9]{{1,{_MOST_DIGITS}}}$"})]
)


def _check_user(name: str, user: _User | None) -> None:
    if isinstance(user, str) and not is_decimal(user, _MOST_DIGITS):
        raise ValueError(f"{name} must be a decimal string")


WHOSE: Final = ("user_id", "session_id", "jti")


class DisconnectRequest(msgspec.Struct, forbid_unknown_fields=True):
    """Whose connections to close: one of ``user_id``, ``session_id`` and ``jti``."""

    tenant_id: TenantNumber
    user_id: _User | None = None
    session_id: Annotated[int, msgspec.Meta(gt=0, le=MAX_ID)] | None = None
    jti: Annotated[str, msgspec.Meta(min_length=1, max_length=1000)] | None = None
    reason: Annotated[str, msgspec.Meta(max_length=100)] = ""

    def __post_init__(self) -> None:
        if sum(getattr(self, name) is not None for name in WHOSE) != 1:
            raise ValueError("exactly one of user_id, session_id and jti is required")
        _check_user("user_id", self.user_id)


class DisconnectReply(msgspec.Struct):
    """How many connections were closed, and which processes will do it when they run again."""

    closed: int
    complete: bool
    missing: list[str]


class RefreshRequest(msgspec.Struct, forbid_unknown_fields=True):
    """The waiter whose assignments have changed."""

    tenant_id: TenantNumber
    waiter_id: _User

    def __post_init__(self) -> None:
        _check_user("waiter_id", self.waiter_id)


class RefreshReply(msgspec.Struct):
    """Which processes will do it when they run again."""

    complete: bool
    missing: list[str]


async def disconnect(parts: Parts, key: ApiKey) -> Answer:
    """Close the connections of a user, a session or a token on all processes, with 4001."""
    body = await read_body(DisconnectRequest)
    check_tenant(key, body.tenant_id)
    assert parts.cluster is not None
    answers = await parts.cluster.control.order(
        "disconnect",
        Disconnect(body.tenant_id, body.user_id, body.session_id, body.jti, body.reason),
    )
    closed = sum(found.closed for _, found in answers.decoded(Disconnected))
    return _json(DisconnectReply(closed, answers.complete, answers.missing))


async def refresh(parts: Parts, key: ApiKey) -> Answer:
    """Load the sectors of a waiter again, on all processes."""
    body = await read_body(RefreshRequest)
    check_tenant(key, body.tenant_id)
    assert parts.cluster is not None
    answers = await parts.cluster.control.order(
        "refresh", SectorsChanged(body.tenant_id, body.waiter_id)
    )
    return _json(RefreshReply(answers.complete, answers.missing))


def _json(reply: msgspec.Struct) -> Response:
    return Response(msgspec.json.encode(reply), content_type="application/json")
