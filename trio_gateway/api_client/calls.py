"""Calls: the request of each, how its answer is read, and whether it may be repeated."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

import httpx
import msgspec

from ..publisher import InDoubt, InvalidEvent, PublishFailed
from .values import (
    Disconnected,
    EventPath,
    EventReceipts,
    HistoryPage,
    Node,
    Presence,
    Published,
    Refreshed,
    Slo,
)

T = TypeVar("T")
Confirm = int | Literal["all"]


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request. ``read`` raises :exc:`ValueError` for an answer of another shape.

    ``repeatable``: it may be sent again if its answer was lost. ``is_order``: it may have been
    given although Redis did not answer.
    """

    method: str
    path: str
    read: Callable[[httpx.Response], T]
    repeatable: bool
    params: Mapping[str, str] = field(default_factory=dict)
    body: bytes | None = None
    is_order: bool = False


@dataclass(frozen=True)
class Page:
    """A page of the history, and the call for the next one, if there is one."""

    page: HistoryPage
    following: "Call[Page] | None"


def publish(
    payloads: Sequence[bytes], confirm: Confirm, *, repeatable: bool
) -> Call[list[Published]]:
    """Publish these events; ``repeatable`` if each of them has an ``id``."""

    def read(response: httpx.Response) -> list[Published]:
        answers = msgspec.json.decode(response.content, type=_Answers).published
        if len(answers) != len(payloads):
            raise ValueError("one answer for each event is expected")
        return [_published(each) for each in answers]

    params = {} if confirm == 0 else {"confirm": str(confirm)}
    body = b'{"events":[%b]}' % b",".join(payloads)
    return Call("POST", "publish", read, repeatable, params, body)


def disconnect(
    tenant_id: int,
    user_id: str | int | None,
    session_id: int | None,
    jti: str | None,
    reason: str,
) -> Call[Disconnected]:
    """Close connections. Raises :exc:`ValueError` unless it is said of whom in one way."""
    whose = {"user_id": user_id, "session_id": session_id, "jti": jti}
    given = {name: value for name, value in whose.items() if value is not None}
    if len(given) != 1:
        raise ValueError("pass one of user_id, session_id and jti")
    return _order("disconnect", {"tenant_id": tenant_id, "reason": reason, **given}, Disconnected)


def refresh(tenant_id: int, waiter_id: str | int) -> Call[Refreshed]:
    """Load the sectors of a waiter again."""
    return _order("refresh", {"tenant_id": tenant_id, "waiter_id": waiter_id}, Refreshed)


def presence(tenant_id: int, branch_id: int, node: str | None) -> Call[Presence]:
    """Who is present in a branch, on one process or on all."""
    params = {"tenant_id": str(tenant_id), "branch_id": str(branch_id)}
    if node is not None:
        params["node"] = node
    return Call("GET", "presence", _reader(Presence), repeatable=True, params=params)


def nodes() -> Call[list[Node]]:
    """The processes."""

    def read(response: httpx.Response) -> list[Node]:
        return msgspec.json.decode(response.content, type=_Nodes).nodes

    return Call("GET", "nodes", read, repeatable=True)


def receipts(event_id: str) -> Call[EventReceipts]:
    """Who has received an event."""
    params = {"event_id": event_id}
    return Call("GET", "receipts", _reader(EventReceipts), repeatable=True, params=params)


def why(event_id: str) -> Call[EventPath]:
    """The path of an event."""
    return Call("GET", "why", _reader(EventPath), repeatable=True, params={"event_id": event_id})


def slo(tenant_id: int | None, limit: int) -> Call[Slo]:
    """The delivery times of a tenant, or of the slowest ones."""
    params = {"limit": str(limit)}
    if tenant_id is not None:
        params["tenant_id"] = str(tenant_id)
    return Call("GET", "slo", _reader(Slo), repeatable=True, params=params)


def history(tenant_id: int, branch_id: int, since: float | str) -> Call[Page]:
    """The durable events of a branch after a unix time, or after an event id."""

    def read(response: httpx.Response) -> Page:
        found = msgspec.json.decode(response.content, type=_Events)
        is_complete = response.headers.get("Gateway-Complete") != "false"
        following = None if found.next is None else history(tenant_id, branch_id, found.next)
        return Page(HistoryPage(found.events, is_complete), following)

    text = since if isinstance(since, str) else repr(float(since))
    params = {"tenant_id": str(tenant_id), "branch_id": str(branch_id), "since": text}
    return Call("GET", "history", read, repeatable=True, params=params)


class _Answer(msgspec.Struct):
    event_id: str | msgspec.UnsetType | None = msgspec.UNSET
    error: str | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if self.event_id is self.error:  # both are unset
            raise ValueError("event_id or error is required")


class _Answers(msgspec.Struct):
    published: list[_Answer]


class _Nodes(msgspec.Struct):
    nodes: list[Node]


class _Events(msgspec.Struct):
    events: list[dict[str, Any]]
    next: str | None = None


def _published(answer: _Answer) -> Published:
    """The outcome of an event: see the table in docs/backends.md."""
    event_id = None if answer.event_id is msgspec.UNSET else answer.event_id
    if answer.error is msgspec.UNSET:
        return Published(event_id)
    kind, _, detail = answer.error.partition(": ")
    match kind:
        case "in_doubt":
            entry = (event_id or "").rpartition("-")[0] or None
            where = "on too few replicas" if entry else "sent to Redis, without an answer"
            error = InDoubt(f"the event is {where}", entry=entry)
            return Published(event_id, error)
        case "invalid":
            return Published(error=InvalidEvent("invalid", detail))
        case "refused":
            return Published(error=PublishFailed(f"Redis refuses the event: {detail}"))
        case _:
            return Published(error=PublishFailed(f"the event was not published: {answer.error}"))


def _order(path: str, body: Mapping[str, Any], answer: type[T]) -> Call[T]:
    encoded = msgspec.json.encode(body)
    return Call("POST", path, _reader(answer), repeatable=True, body=encoded, is_order=True)


def _reader(answer: type[T]) -> Callable[[httpx.Response], T]:
    return lambda response: msgspec.json.decode(response.content, type=answer)
