"""What calls return. Keys that a newer gateway adds are ignored."""

from dataclasses import dataclass
from typing import Any

import msgspec

from ..core.events import InvalidEvent
from ..publisher import PublishFailed


@dataclass(frozen=True, slots=True)
class Published:
    """What became of one event of several.

    ``event_id`` is the id that clients get with it; None if the event is not durable. ``error`` is
    what :meth:`ApiClient.publish` would have raised, or None.
    """

    event_id: str | None = None
    error: InvalidEvent | PublishFailed | None = None


class _FromAll(msgspec.Struct, frozen=True, kw_only=True):
    complete: bool = True
    missing: tuple[str, ...] = ()


class Disconnected(_FromAll, frozen=True):
    """``closed`` connections were closed. Processes in ``missing`` do it when they run again."""

    closed: int


class Refreshed(_FromAll, frozen=True):
    """Sectors are loaded again. Processes in ``missing`` do it when they run again."""


class PresentUser(msgspec.Struct, frozen=True):
    """A user on an endpoint, since a unix time."""

    user_id: str
    endpoint: str
    connections: int
    since: float
    sector_ids: tuple[int, ...] = ()


class PresentSession(msgspec.Struct, frozen=True):
    """The diners of a table."""

    session_id: int
    connections: int
    table_id: int | None = None


class Presence(_FromAll, frozen=True):
    """Who is present in a branch, without those that only processes in ``missing`` know."""

    users: tuple[PresentUser, ...]
    sessions: tuple[PresentSession, ...]


class Times(msgspec.Struct, frozen=True):
    """How many there were, and percentiles of the seconds that they took, None without any.

    ``over`` events took longer than the limit. ``unconfirmed`` (of delivered ones): clients that
    were sent an event and have not confirmed it.
    """

    count: int
    p50: float | None
    p95: float | None
    p99: float | None
    over: int
    unconfirmed: int = 0


class TimesWindow(msgspec.Struct, frozen=True):
    """From entering Redis: until events were written, and until each client had confirmed them."""

    written: Times
    delivered: Times


class TenantTimes(msgspec.Struct, frozen=True):
    """The delivery times of a tenant; without ``tenant_id``, of several together."""

    last_5_minutes: TimesWindow
    last_hour: TimesWindow
    tenant_id: int | None = None


class Slo(_FromAll, frozen=True):
    """The delivery times of tenants, the slowest first; ``seconds`` is the limit of ``over``.

    ``more`` tenants were left out. ``others`` are those that processes count together only.
    Processes in ``missing`` are not counted.
    """

    seconds: float
    tenants: tuple[TenantTimes, ...]
    more: int = 0
    others: TenantTimes | None = None


class ClientReceipt(msgspec.Struct, frozen=True):
    """How far an event has come to a user on an endpoint, or to a session; ``at`` is unix time."""

    endpoint: str
    state: str
    at: float | None
    user_id: str | None = None
    session_id: int | None = None


class ReceiptStep(msgspec.Struct, frozen=True):
    """An audience that an event was sent on to, at a unix time."""

    to: str
    at: float


class EventReceipts(_FromAll, frozen=True):
    """Who has received an event, which entered Redis ``at`` a unix time.

    What processes in ``missing`` know may not be counted.
    """

    event_id: str
    type: str
    at: float
    written: int
    delivered: int
    seen: int
    by: tuple[ClientReceipt, ...]
    steps: tuple[ReceiptStep, ...]


class PathAudience(msgspec.Struct, frozen=True):
    """A key under which an event and its clients meet; ``audience`` is its kind."""

    audience: str
    tenant_id: int
    branch_id: int | None = None
    sector_id: int | None = None
    session_id: int | None = None


class PathClient(msgspec.Struct, frozen=True, kw_only=True):
    """A user on an endpoint, or a session, that an event was sent to.

    ``sent`` to ``seen`` are when it came to each state, None if it has not. ``must_reach`` are the
    audiences of the steps that it is in.
    """

    endpoint: str
    state: str
    sent: float | None
    written: float | None
    delivered: float | None
    seen: float | None
    must_reach: tuple[str, ...]
    user_id: str | None = None
    session_id: int | None = None


class PathStep(msgspec.Struct, frozen=True):
    """An audience that must receive an event; ``sent``, ``written``, ``delivered`` are numbers.

    ``begun`` and ``deadline`` are None before its time, ``ended`` until it is over or confirmed.
    """

    to: str
    within: float
    state: str
    begun: float | None
    deadline: float | None
    ended: float | None
    sent: int
    written: int
    delivered: int


class PathMoment(msgspec.Struct, frozen=True):
    """Something that happened to an event, or that will (``lies_ahead``), in words for people."""

    after: float
    text: str
    lies_ahead: bool


class EventPath(_FromAll, frozen=True, kw_only=True):
    """The path of an event. ``at`` is unix time, all other times are seconds after that.

    ``receipts``: whether it is known who was sent it. The numbers are of all clients; ``clients``
    are those that the key may know of. What processes in ``missing`` know may not be counted.
    """

    event_id: str
    type: str
    at: float
    now: float
    tenant_id: int
    branch_id: int
    sector_id: int | None = None
    session_id: int | None = None
    durable: bool
    receipts: bool
    sent: int
    written: int
    delivered: int
    seen: int
    audiences: tuple[PathAudience, ...]
    clients: tuple[PathClient, ...]
    steps: tuple[PathStep, ...]
    summary: tuple[str, ...]
    timeline: tuple[PathMoment, ...]


class Node(msgspec.Struct, frozen=True):
    """A process of the gateway. ``started_at`` is unix time, ``lag`` is in events."""

    name: str
    version: str = ""
    started_at: float = 0.0
    draining: bool = False
    connections: int = 0
    lag: int = 0
    shards: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class HistoryPage:
    """Durable events of a branch, in order, each with its ``event_id``.

    ``complete`` is false if events before these may be missing.
    """

    events: list[dict[str, Any]]
    complete: bool
