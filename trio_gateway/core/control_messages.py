"""Control messages: what backends publish to the gateway itself, each kind on its own channel."""

from typing import Annotated, Final

import msgspec

REVOKED: Final = "channel:auth:revoked"
SECTORS_CHANGED: Final = "channel:sectors:changed"

_User = int | Annotated[str, msgspec.Meta(pattern="^[0-9]+$")]


class Revoked(msgspec.Struct):
    """A token is revoked, or all tokens of a user (in one tenant, or in all)."""

    jti: str | None = None
    user_id: _User | None = None
    tenant_id: int | None = None


class SectorsChanged(msgspec.Struct):
    """The assignments of one waiter have changed."""

    tenant_id: int
    waiter_id: _User
