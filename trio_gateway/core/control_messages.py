"""Control messages: what is published to the gateway itself, each kind on its own channel.

On the channel ``control`` the processes of one service speak to each other. An :class:`Ask` is
answered by all of them, an :class:`Answer` goes to the channel of the process that asked.
"""

from typing import Annotated, Final, TypeVar

import msgspec

from .capacity import Owner

_Kind = TypeVar("_Kind")

REVOKED: Final = "channel:auth:revoked"
SECTORS_CHANGED: Final = "channel:sectors:changed"

_ReportChannel = Annotated[
    str, msgspec.Meta(pattern=r"^channel:gateway:([0-9]+:)?placement:[0-9a-f]{1,32}\Z")
]
_Name = Annotated[str, msgspec.Meta(pattern="^[A-Za-z0-9._-]{1,100}\\Z")]
# Python's `$` may be before a line feed. JSON Schema, where this stands too, does not know `\Z`.
_User = int | Annotated[str, msgspec.Meta(pattern=r"^[0-9]+$(?!\n)")]


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

    The channel of a report is below that of requests, so that no request causes events.
    """

    report_to: _ReportChannel | None = None
    places: dict[int, str] = {}  # the process of each tenant; all others send its clients away


class PlacementReport(msgspec.Struct):
    """What a process answers: its id, and its number of connections of each tenant."""

    process: str
    tenants: dict[int, int]


class Ask(msgspec.Struct, tag="ask"):
    """A question to every process; ``id`` is chosen by the one that asks, for its answers."""

    id: str
    asker: _Name
    kind: str
    request: msgspec.Raw


class Ordered(msgspec.Struct, tag="ordered"):
    """An order was added to the stream of orders under this entry id: read on there."""

    order: str


class Left(msgspec.Struct, tag="left"):
    """A process has stopped, and is not to be waited for."""

    node: str


class Answer(msgspec.Struct, tag="answer", omit_defaults=True):
    """What a process answers to an :class:`Ask`, or to an order; with ``error``, it could not."""

    id: str
    node: str
    answer: msgspec.Raw = msgspec.Raw(b"null")
    error: str | None = None


Control = Ask | Ordered | Left | Answer


class Node(msgspec.Struct):
    """The state that a process publishes. ``started_at`` is unix time, ``lag`` is in events."""

    name: str
    version: str = ""
    started_at: float = 0.0
    draining: bool = False
    connections: int = 0
    lag: int = 0
    shards: list[int] = []


class Hello(msgspec.Struct):
    """A question that every process answers, with nothing."""


class Disconnect(msgspec.Struct, omit_defaults=True):
    """Close the connections of a user, of a session, or with one token, of a tenant."""

    tenant_id: int
    user_id: _User | None = None
    session_id: int | None = None
    jti: str | None = None
    reason: str = ""

    def __post_init__(self) -> None:
        if sum(each is not None for each in (self.user_id, self.session_id, self.jti)) != 1:
            raise ValueError("needs one of user_id, session_id and jti")


class Disconnected(msgspec.Struct):
    """How many connections a process has closed."""

    closed: int


class Probe(msgspec.Struct):
    """Ping the connections of a user or session; those that do not answer are the answer."""

    owner: Owner


class Silent(msgspec.Struct):
    """A connection that does not answer, by its number in its process."""

    connection: int
    seconds: float  # for which it has been silent


class Evict(msgspec.Struct):
    """Close a connection of this process that does not answer, to make room for another."""

    owner: Owner
    connection: int


class FlushReceipts(msgspec.Struct):
    """Write all receipts to Redis before you answer."""


def own_channel(name: str, database: int) -> str:
    """The channel of this name that only the processes on one database of a Redis use.

    Pub/Sub reaches the clients of all databases of a server.
    """
    return f"channel:gateway:{name}" if database == 0 else f"channel:gateway:{database}:{name}"


def placement_channel(database: int) -> str:
    """The channel of requests for placement; those of reports are below it."""
    return own_channel("placement", database)


def read_control_message(payload: bytes, kind: type[_Kind]) -> _Kind:
    """Read a message of this kind. Raises :exc:`ValueError` if it is anything else."""
    try:
        return msgspec.json.decode(payload, type=kind)
    except (msgspec.DecodeError, UnicodeError, RecursionError) as error:
        name = getattr(kind, "__name__", "control message")  # a union has none
        raise ValueError(f"not a {name}") from error
