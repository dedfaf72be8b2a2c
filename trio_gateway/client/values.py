"""The public values of the client."""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from ..core.close_codes import Close

TokenProvider = Callable[[bool], str | Awaitable[str]]
Gap = Literal["lost", "not_recovered"]


@dataclass(frozen=True, slots=True)
class Event:
    """An event as it was received."""

    type: str
    data: Mapping[str, Any]  # decoded
    text: str  # byte for byte as published, with the event_id at its end
    event_id: str | None  # None if the event is not durable


@dataclass(frozen=True, slots=True)
class Presence:
    """Who is present in a branch, on all processes of the gateway together.

    The items are as the gateway sends them: a user has ``user_id``, ``endpoint``, ``sector_ids``,
    ``connections`` and ``since``; a session has ``session_id``, ``table_id`` and ``connections``.
    """

    branch_id: int
    users: tuple[Mapping[str, Any], ...]
    sessions: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True)
class Status:
    """The state of the connection, and its reason.

    ``code`` is a close code, or the HTTP status that refused the upgrade. ``error`` is the
    exception if no gateway was reached.
    """

    state: Literal["connecting", "open", "waiting", "refused"]
    code: int | None = None
    reason: str = ""
    retry_in: float | None = None  # seconds, if waiting
    error: Exception | None = None


class Refused(Exception):  # noqa: N818 - an outcome
    """The gateway refuses this client; another attempt would have the same result.

    ``code`` is its close code, or the HTTP status that refused the upgrade.
    """

    def __init__(self, code: int, reason: str) -> None:
        try:
            name = f" {Close(code).name}"
        except ValueError:
            name = ""
        super().__init__(f"refused: {code}{name}" + (f" ({reason})" if reason else ""))
        self.code = code
        self.reason = reason
