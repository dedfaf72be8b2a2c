"""The console: a page for operators, and the feed of figures that it shows."""

import base64
import hashlib
import os
import re
import secrets
import time
from collections.abc import Collection
from importlib.resources import files
from typing import TYPE_CHECKING, Annotated, Any, Final, NoReturn, TypeVar

import jwt
import msgspec
import trio
from quart import Response, jsonify, request

from ..access.addresses import host_of
from ..broker.commands import Unavailable
from ..core.audiences import ENDPOINTS, Endpoint, Principal, Role
from ..core.close_codes import Close, Rejected
from ..core.events import InvalidEvent, parse_event
from ..core.messages import Command, statistics
from ..core.origins import is_loopback
from ..core.routing import UNKNOWN
from ..publisher import channel_for
from ..runtime.connection import Connection
from ..transports.handshake import bearer
from .responses import Answer, identify, problem, refusal, status_of

if TYPE_CHECKING:
    from ..gateway import Gateway

T = TypeVar("T")

EVERY: Final = 1.0  # seconds between two messages of figures
MOST_SLOW: Final = 20  # slow clients that are named
TOKEN_LIFE: Final = 3600  # seconds
_FORWARDED: Final = ("Forwarded", "Via", "X-Forwarded-For", "X-Real-Ip")


def may_watch(principal: Principal) -> bool:
    """The figures are of the whole process: for who may see to it."""
    return principal.endpoint is Endpoint.ADMIN and Role.ADMIN in principal.roles


class Feed:
    """Sends figures once a second to the admins that asked to watch; idle while nobody does."""

    def __init__(self, app: "Gateway") -> None:
        self._app = app
        self._watchers: set[Connection] = set()
        self._begun = trio.Event()

    def hear(self, connection: Connection, said: Command) -> None:
        """A client said WATCH or UNWATCH; who may not is not answered, as to any other text."""
        if said is Command.UNWATCH:
            self._watchers.discard(connection)
        elif may_watch(connection.principal) and connection not in self._watchers:
            self._watchers.add(connection)
            self._tell([connection])
            self._begun.set()

    async def run(self) -> NoReturn:
        """Send; returns only when cancelled."""
        while True:
            while not self._watchers:
                self._begun = trio.Event()
                await self._begun.wait()
            await trio.sleep(EVERY)
            # Who has left, or is an admin no more since its token was renewed:
            here = self._watchers & self._app.hub.connections
            self._watchers = {each for each in here if may_watch(each.principal)}
            self._tell(self._watchers)

    def _tell(self, watchers: Collection[Connection]) -> None:
        reading = [each for each in watchers if not each.waiting_bytes]
        if not reading:
            return
        found = figures(self._app)
        for each in reading:
            each.send(statistics(found, slow(self._app, each.principal)))


def figures(app: "Gateway") -> dict[str, Any]:
    """What the metrics say of this process, and the state that is no number."""
    sample = app.sample()
    return {
        "at": trio.current_time(),  # which nobody sets
        "pid": os.getpid(),
        "ready": app.ready,
        "draining": app.draining,
        "breakers": {name: each.state.name.lower() for name, each in app.breakers.items()},
        "streams": {
            "connected": app.streams is not None and app.streams.connected,
            "cursors": app.streams.cursors if app.streams is not None else {},
        },
        "pubsub": {"connected": app.pubsub is not None and app.pubsub.connected},
        "numbers": sample.numbers,
        "histograms": sample.histograms,
    }


def slow(app: "Gateway", admin: Principal) -> list[dict[str, Any]]:
    """The clients of the admin's own tenant for whom most bytes wait."""
    waiting = [
        each
        for each in app.hub.connections
        if each.waiting_bytes and each.principal.tenant == admin.tenant
    ]
    waiting.sort(key=lambda each: each.waiting_bytes, reverse=True)
    return [
        {
            "endpoint": each.principal.endpoint.label,
            "user": each.principal.user,
            "session": each.principal.session,
            "bytes": each.waiting_bytes,
            "frames": each.waiting_frames,
        }
        for each in waiting[:MOST_SLOW]
    ]


# The page


def _read(name: str) -> str:
    return files("trio_gateway").joinpath("static", name).read_text("utf-8")


_PAGE: Final = _read("console.html")
_GATE: Final = _read("console-gate.html")


def _allowed(tag: str) -> str:
    """What stands inline in the two pages, by its hash (CSP 3, 2.3.1)."""
    found = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", _PAGE + _GATE, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()) for text in found]
    return " ".join(f"'sha256-{each.decode()}'" for each in hashes)


_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": (
        f"default-src 'none'; script-src {_allowed('script')} 'self'; "  # itself: client.js
        f"style-src {_allowed('style')}; worker-src blob:; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}


async def page(app: "Gateway") -> Answer:
    """The console; in production for an ADMIN's token or ticket."""
    if app.settings.production:
        try:
            await _admit(app)
            await _redeem(app)
        except Rejected as rejected:
            return _html(_GATE, status_of(rejected.close))
    text = _PAGE.replace("{environment}", app.settings.environment)
    return _html(text.replace("{tokens}", str(app.settings.ws_console_tokens).lower()), 200)


async def _admit(app: "Gateway") -> Principal:
    """The ADMIN who asks, else :exc:`Rejected`. A ticket is good until :func:`_redeem`."""
    token, ticket = bearer(request.headers.get("Authorization")), request.args.get("ticket")
    for principal in await identify(app, token, staff=True, ticket=ticket):
        if may_watch(principal):
            return principal
    raise Rejected(Close.FORBIDDEN, "for an ADMIN only", "role")


async def _redeem(app: "Gateway") -> None:
    """Use the ticket up, if there is one, when nothing else can refuse the request."""
    if (ticket := request.args.get("ticket")) is not None:
        await app.admission.redeem(ticket)


def _html(text: str, status: int) -> Answer:
    headers = dict(_HEADERS)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(text, status, headers, content_type="text/html; charset=utf-8")


# In development only


class _Wanted(msgspec.Struct):
    """Whose token: staff with these claims, or a table's."""

    endpoint: str
    tenant_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    branch_ids: tuple[int, ...] = (1,)
    sector_ids: tuple[int, ...] = ()
    session_id: Annotated[int, msgspec.Meta(gt=0)] = 1
    table_id: Annotated[int, msgspec.Meta(gt=0)] = 1


class _Sample(msgspec.Struct):
    event: msgspec.Raw


async def token(app: "Gateway") -> Answer:
    """Development only, where `WS_CONSOLE_TOKENS` allows it: a token for the playground."""
    if not app.settings.ws_console_tokens:
        return problem(404, "not found")
    # What makes tokens for whoever asks is for this machine: not for who comes through a proxy
    # on it, nor for a page under a name that was pointed here.
    if not (is_loopback(request.remote_addr or "") and is_loopback(host_of(request.host))) or any(
        name in request.headers for name in _FORWARDED
    ):
        return problem(403, "for a browser on the gateway's own machine")
    wanted = await _asked(_Wanted)
    if not isinstance(wanted, _Wanted):
        return wanted
    endpoint = ENDPOINTS.get(f"/ws/{wanted.endpoint}")
    if endpoint is None:
        return problem(422, "no such endpoint")
    now = int(time.time())
    claims: dict[str, Any] = {"tenant_id": wanted.tenant_id, "iat": now, "exp": now + TOKEN_LIFE}
    settings = app.settings
    if not endpoint.staff:
        if not wanted.branch_ids:
            return problem(422, "a table is in a branch")
        claims |= {
            "branch_id": wanted.branch_ids[0],
            "session_id": wanted.session_id,
            "table_id": wanted.table_id,
        }
        return jsonify(token=jwt.encode(claims, settings.table_secret, "HS256"))
    algorithm = next((name for name in settings.jwt_algorithms if name.startswith("HS")), None)
    if algorithm is None:
        return problem(422, "JWT_ALGORITHMS has none that we could sign with")
    claims |= {
        "sub": str(secrets.randbelow(10**9) + 10**9),
        "branch_ids": wanted.branch_ids,
        "sector_ids": wanted.sector_ids,
        "roles": [endpoint.label.upper()],
    }
    for name, value in {"iss": settings.jwt_issuer, "aud": settings.jwt_audience}.items():
        if value is not None:
            claims[name] = value
    return jsonify(token=jwt.encode(claims, settings.staff_secret, algorithm))


async def publish(app: "Gateway") -> Answer:
    """Development only: an ADMIN publishes a sample for its tenant, if durable on a stream."""
    if app.settings.production:
        return problem(404, "not found")
    try:
        admin = await _admit(app)
    except Rejected as rejected:
        return refusal(rejected)
    sample = await _asked(_Sample)
    if not isinstance(sample, _Sample):
        return sample
    payload = bytes(sample.event)
    try:
        event = parse_event(payload, channel="", heard_at=0)
    except InvalidEvent as invalid:
        return problem(422, f"event: {invalid}")
    if event.tenant != admin.tenant:
        return problem(403, "an event of another tenant")
    try:
        await _redeem(app)
    except Rejected as rejected:
        return refusal(rejected)
    routes, streams = app.settings.routes, app.settings.redis_streams
    assert app.commands is not None
    try:
        if routes.get(event.type, UNKNOWN).durable and streams:
            await app.commands.add(streams[0], {"data": payload})  # others' stream: not trimmed
            return jsonify(stream=streams[0])
        channel = channel_for(event, routes)
        await app.commands.publish(channel, payload)
    except Unavailable:
        return problem(503, "Redis does not answer")
    return jsonify(channel=channel)


async def _asked(kind: type[T]) -> T | Answer:
    """The body of a request from a page of our own: no other can send JSON without asking first
    (Fetch, 3.2.2), which we don't answer.
    """
    if request.mimetype != "application/json":
        return problem(415, "application/json only")
    try:
        return msgspec.json.decode(await request.get_data(as_text=False), type=kind)
    except msgspec.ValidationError as error:
        return problem(422, str(error))
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return problem(422, "not a JSON object")
