"""What all calls of the API have in common: key, rate, scope, the bound of a body, metrics."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import msgspec
import trio
from quart import request
from werkzeug.exceptions import HTTPException, RequestEntityTooLarge

from ...broker.commands import Unavailable
from ...core.api_keys import ApiKey, Scope
from ...core.client_request import bearer
from ...core.close_codes import Rejected
from ...parts import Api, Parts
from ...runtime.concurrency_limiter import Overloaded
from ..responses import Answer, count_failed_login, problem, refusal

PREFIX: Final = "/ws/api/"
SMALL_BODY: Final = 16_384  # bytes
MAY_READ: Final = "api_may_read"  # in the ASGI scope: the event that the body waits for


class Invalid(Exception):  # noqa: N818 - an answer
    """The request is refused with this status; the text names the field that is wrong."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class Parameter(NamedTuple):
    """A parameter of the query, as the OpenAPI document describes it."""

    name: str
    schema: dict[str, Any]
    words: str
    required: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One call of the API: what decides on it, and what describes it.

    ``most_bytes`` bounds its body. ``takes_turns``: its bodies are big, so only a few of these
    calls are served at once. ``asks_all``: it waits for other processes, so a key may have only a
    few of these calls at once.
    """

    name: str
    scope: Scope
    answer: Callable[[Parts, ApiKey], Awaitable[Answer]]
    reply: type[msgspec.Struct]
    body: type[msgspec.Struct] | None = None  # of a POST; without one it is a GET
    query: tuple[Parameter, ...] = ()
    most_bytes: int = SMALL_BODY
    takes_turns: bool = False
    asks_all: bool = False

    @property
    def method(self) -> str:
        return "GET" if self.body is None else "POST"

    @property
    def path(self) -> str:
        return f"{PREFIX}{self.name}"


def no_api() -> Answer:
    """The answer to every request if the API is not enabled."""
    return problem(404, "there is no API here: WS_API_KEYS_FILE is not set")


def view_of(call: Call) -> Callable[[Parts], Awaitable[Answer]]:
    """The handler of a call, for the table of routes."""

    async def view(parts: Parts) -> Answer:
        if (api := parts.api) is None:
            return no_api()
        answer = await _checked(parts, api, call)
        status = answer[1] if isinstance(answer, tuple) else answer.status_code
        api.requests[f"{call.name},{status}"] += 1
        return answer

    view.__doc__ = call.answer.__doc__
    return view


async def _checked(parts: Parts, api: Api, call: Call) -> Answer:
    """Check a request and answer it. Its body is not read before its key is known."""
    key = api.keys.find(bearer(request.headers.get("Authorization")))
    if key is None:
        try:
            count_failed_login(parts)
        except Rejected as rejected:
            return refusal(rejected)
        return problem(401, "the header Authorization: Bearer <secret of an API key> is required")
    if not api.keys.try_use(key, trio.current_time()):
        text = f"over the key's rate, {key.rate:g} a second"
        return problem(429, text, retry_after=math.ceil(1 / key.rate))
    if call.scope not in key.scopes:
        return problem(403, f"the key does not have the scope {call.scope}")
    try:
        if not call.takes_turns:
            return await _answer(parts, key, call)
        give_back = await api.turns.take(call.name)
        try:
            return await _answer(parts, key, call)
        finally:
            give_back()
    except Invalid as invalid:
        return problem(invalid.status, str(invalid))
    except RequestEntityTooLarge:
        return problem(413, f"the body must have at most {call.most_bytes} bytes")
    except HTTPException as error:  # the rest of a body does not come
        return problem(error.code or 500, error.name)
    except Overloaded:
        return problem(503, "too many of these requests at once", retry_after=1)
    except Unavailable as error:
        return problem(503, error.cause)


async def _answer(parts: Parts, key: ApiKey, call: Call) -> Answer:
    _check_query(call)
    request.body = request.body_class(request.content_length, call.most_bytes)
    request.scope[MAY_READ].set()  # type: ignore[typeddict-item]  # HttpConnection's
    if not call.asks_all:
        return await call.answer(parts, key)
    try:
        give_back = await parts.catch_ups.take(("api", key.name))
    except Overloaded:
        return problem(429, "too many simultaneous requests of one key", retry_after=1)
    try:
        return await call.answer(parts, key)
    finally:
        give_back()


def _check_query(call: Call) -> None:
    """Refuse what would have no effect: a misspelt ``confirm`` must not look like success."""
    known = [each.name for each in call.query]
    for name, values in request.args.lists():
        if name not in known:
            raise Invalid(422, f"unknown query parameter {name[:100]}")
        if len(values) > 1:
            raise Invalid(422, f"{name} must be there once")
