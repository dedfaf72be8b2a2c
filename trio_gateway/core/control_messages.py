"""Control messages: what is published to the gateway itself, each kind on its own channel."""

from typing import Annotated, Final, TypeVar

import msgspec

_Kind = TypeVar("_Kind")

REVOKED: Final = "channel:auth:revoked"
SECTORS_CHANGED: Final = "channel:sectors:changed"
PLACEMENT: Final = "channel:gateway:placement"

_ReportChannel = Annotated[str, msgspec.Meta(pattern=f"^{PLACEMENT}:[0-9a-f]{{1,32}}\\Z")]
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


class PlacementRequest(msgspec.Struct):
    """Of ``trio-gateway rebalance``: report your tenants, or send clients of tenants away.

    The channel of a report is below :data:`PLACEMENT`, so that no request causes events.
    """

    report_to: _ReportChannel | None = None
    places: dict[int, str] = {}  # the process of each tenant; all others send its clients away


class PlacementReport(msgspec.Struct):
    """What a process answers: its id, and its number of connections of each tenant."""

    process: str
    tenants: dict[int, int]


def read_control_message(payload: bytes, kind: type[_Kind]) -> _Kind:
    """Read a message of this kind. Raises :exc:`ValueError` if it is anything else."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        raise ValueError(f"not a {kind.__name__}") from error
