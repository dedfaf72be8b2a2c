"""Notices: what backends tell the gateway itself, each on a channel of its own."""

from typing import Annotated, Final

import msgspec

REVOKED: Final = "channel:auth:revoked"
SECTORS_CHANGED: Final = "channel:sectors:changed"

_User = int | Annotated[str, msgspec.Meta(pattern="^[0-9]+$")]


class Revoked(msgspec.Struct):
    """A token is revoked, or a user's tokens (of one tenant, or of any)."""

    jti: str | None = None
    user_id: _User | None = None
    tenant_id: int | None = None


class SectorsChanged(msgspec.Struct):
    """The assignments of one waiter have changed."""

    tenant_id: int
    waiter_id: _User
