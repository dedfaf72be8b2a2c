"""What is fed with junk: each target takes any bytes, and raises only if a promise is broken."""

import json
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, Final, TypeVar

import structlog
import trio

from tests.support.sockets import HEADS, client_frame
from trio_gateway.access.addresses import client_address
from trio_gateway.access.jwks import KeySet
from trio_gateway.access.revocations import Revocations
from trio_gateway.broker.connection import RedisConnection
from trio_gateway.broker.pubsub import PubSub
from trio_gateway.broker.topology import single
from trio_gateway.core.audiences import Endpoint, audiences_of
from trio_gateway.core.claims import Rules
from trio_gateway.core.client_request import ClientRequest
from trio_gateway.core.close_codes import Close, Rejected
from trio_gateway.core.event_ids import Position, cursor_id, read_cursor, tag
from trio_gateway.core.events import MAX_ID, InvalidEvent, parse_event
from trio_gateway.core.frames import PING, TEXT
from trio_gateway.core.messages import read_message, resumed
from trio_gateway.core.resilience import Breaker
from trio_gateway.core.routing import ROUTES
from trio_gateway.core.signatures import Key, names_of
from trio_gateway.core.tokens import read_jwt, read_legacy_table_token, read_table_token
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.socket import Disconnected, ProtocolViolation
from trio_gateway.runtime.supervision import ConnectionLost
from trio_gateway.testing import make_jwt, make_payload, make_table_token
from trio_gateway.transports.direct import DirectSocket
from trio_gateway.transports.handshake import Refusal, acceptance, parse_head, refusal_response
from trio_gateway.transports.request_head import Head, HeadReader

Target = Callable[[bytes], None]
T = TypeVar("T")
SECRET: Final = "0123456789abcdef" * 4
_MOST: Final = 4096  # bytes of a message, so that the bound is met
_REVOCATIONS: Final = Revocations(Any, Hub())  # type: ignore[arg-type]  # gives no commands
_KEY_SET: Final = KeySet("http://nowhere.example", ("RS256", "ES256", "EdDSA"))


class _Pieces(trio.abc.Stream):
    """A stream that brings some bytes, cut as the first of them says, and then its end.

    It never waits, so what reads it can be run without Trio.
    """

    def __init__(self, data: bytes) -> None:
        size = data[0] if data else 0
        self._data = data[1:]
        self._size = size or len(data) or 1

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        size = min(self._size, max_bytes or self._size)
        found, self._data = self._data[:size], self._data[size:]
        return found

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        raise NotImplementedError

    async def wait_send_all_might_not_block(self) -> None:
        raise NotImplementedError

    async def aclose(self) -> None:
        raise NotImplementedError


def _run(never_waits: Coroutine[Any, Any, T]) -> T:
    try:
        never_waits.send(None)
    except StopIteration as done:
        result: T = done.value
        return result
    raise AssertionError("it waited")


def events(data: bytes) -> None:
    """An event or InvalidEvent; a browser reads the same tenant in it that we did."""
    try:
        event = parse_event(data, channel="c", received_at=0.0)
    except InvalidEvent as invalid:
        assert invalid.reason.isidentifier()
        return
    assert 0 < event.tenant <= MAX_ID
    assert 0 <= event.branch <= MAX_ID
    assert all(event.tenant == audience[1] for audience in ROUTES.audiences(event))
    event = parse_event(
        data,
        channel="c",
        received_at=0.0,
        stream=tag("events:critical"),
        position=Position((1, 0)),
        durable_types={event.type},
    )  # fmt: skip
    text = event.text.decode()
    try:
        read = json.loads(text)
    except (ValueError, RecursionError):  # a number of 5000 digits, or very deep: not for Python
        return
    assert (read["tenant_id"], read["branch_id"]) == (event.tenant, event.branch)
    assert read["event_id"] == event.event_id


def heads(data: bytes) -> None:
    """A handshake, a refusal, or nobody of ours; and a response that is made of it."""
    match parse_head(data):
        case ClientRequest() as handshake:
            assert acceptance(handshake).count(b"\r\n") <= 6
            for found in (handshake.credential, handshake.last_event_id, handshake.origin):
                assert found is None or isinstance(found, str)
        case Refusal() as refusal:
            assert refusal_response(refusal).startswith(b"HTTP/1.1 ")


def addresses(data: bytes) -> None:
    """The client's word is never an address of its own choosing: that is the last one."""
    said = data.decode("latin-1")
    found = client_address("192.0.2.1", said + ", 198.51.100.7", 1)
    assert found == "198.51.100.7"
    assert len(client_address("192.0.2.1", said, 1)) < 50


def messages(data: bytes) -> None:
    """Whatever it is, it has a meaning."""
    read_message(data.decode(errors="replace"))


def cursors(data: bytes) -> None:
    """A place or ValueError; a place has an id that names it."""
    try:
        cursor = read_cursor(data.decode(errors="replace"))
    except ValueError:
        return
    assert read_cursor(cursor_id(cursor)) == cursor
    resumed(recovered=True, count=0, last_event_id=cursor_id(cursor))


def tokens(data: bytes) -> None:
    """Rejected with 4001, or one that we signed; no refusal quotes the token."""
    text = data.decode("utf-8", errors="surrogateescape")  # half an emoji, perhaps
    names_of(text)
    now = time.time()
    for read in (
        lambda: read_jwt(text, [Key(SECRET, ("HS256",))], Rules(), now),
        lambda: read_table_token(text, [Key(SECRET, ("HS256",))], Rules(), now),
        lambda: read_legacy_table_token(text, SECRET, now),
    ):
        try:
            read()
        except Rejected as rejected:
            assert rejected.close is Close.AUTH_FAILED
            assert len(text) < 20 or text not in rejected.text


def claims(data: bytes) -> None:
    """Signed junk is refused as 4001 or 4003, or it is somebody of the tenant that it names."""
    import jwt

    signed = jwt.api_jws.encode(data, SECRET, "HS256")
    try:
        staff = read_jwt(signed, [Key(SECRET, ("HS256",))], Rules(), 0)
        principal = staff.on(Endpoint.WAITER)
    except Rejected as rejected:
        assert rejected.close in {Close.AUTH_FAILED, Close.FORBIDDEN}
        return
    assert json.loads(data)["tenant_id"] == principal.tenant
    assert all(principal.tenant == audience[1] for audience in audiences_of(principal))


def key_sets(data: bytes) -> None:
    """Keys, or what a fetch counts as a failed one."""
    try:
        found = _KEY_SET._read(data)
    except (ValueError, RecursionError):
        return
    assert all(set(key.algorithms) <= {"RS256", "ES256", "EdDSA"} for key in found)


def revocations(data: bytes) -> None:
    """Received or ignored."""

    async def receive() -> None:
        _REVOCATIONS.receive(data)

    trio.run(receive)


def replies(data: bytes) -> None:
    """Replies of Redis are read, or the link is lost."""
    redis = RedisConnection(_Pieces(data))
    ingest = Ingest()
    pubsub = PubSub(
        single(RedisAddress()),
        ["*"],
        ingest,
        EventQueue(10),
        Breaker(5, 30),
        {"channel:auth:revoked": _REVOCATIONS},
    )

    async def listen() -> None:
        while True:
            for reply in await redis.receive():
                pubsub._take(reply)

    with suppress(ConnectionLost):
        trio.run(listen)


def frames(data: bytes) -> None:
    """Messages within their bound, until the client has left or broken a rule."""
    socket = DirectSocket(_Pieces(data), data[1:9], _MOST)
    try:
        while True:
            said = _run(socket.receive())
            assert not isinstance(said, str) or len(said.encode()) <= _MOST
    except Disconnected as left:
        assert 1000 <= left.code < 5000
    except ProtocolViolation as violation:
        assert violation.close in {
            Close.PROTOCOL_ERROR, Close.UNSUPPORTED_DATA, Close.INVALID_DATA, Close.MESSAGE_TOO_BIG,
        }  # fmt: skip


def heads_in_pieces(data: bytes) -> None:
    """Read until it is whole: the same head however it was cut."""

    async def read() -> list[Any]:
        found = []
        for cut in (data[:1], b"\0", b"\1"):
            outcome = await HeadReader(_Pieces(cut + data[1:])).read()
            found.append(outcome.data if isinstance(outcome, Head) else outcome)
        return found

    first, *others = trio.run(read)
    assert all(other == first for other in others)


_EVENT: Final = make_payload(sector_id=5, session_id=456, ts="2026-01-01T00:00:00Z", x=["ñ", "🙏"])
_TOKENS: Final = [make_jwt(SECRET).encode(), make_table_token(SECRET).encode()]
_HEADS: Final = [head.data for head in HEADS.values()]
_RSA: Final = b'{"keys":[{"kty":"RSA","kid":"a","use":"sig","alg":"RS256","n":"AQAB","e":"AQAB"}]}'

# With something to begin from: a fuzzer would be long in finding JSON.
TARGETS: Final[dict[str, tuple[Target, list[bytes]]]] = {
    "events": (events, [_EVENT, b'{"type":"\\ud800","tenant_id":1,"branch_id":0,"data":{}}']),
    "heads": (heads, _HEADS),
    "heads_in_pieces": (heads_in_pieces, [b"\7" + head for head in _HEADS[:20]]),
    "addresses": (addresses, [b"1.2.3.4", b"[2001:db8::1]:443", b"::ffff:1.2.3.4", b"fe80::1%0"]),
    "messages": (messages, [b"ping", b'{"type":"resume","last_event_id":"1-0-abcd"}',
                            b'{"type":"auth","token":"x"}', b' {"type":"ping","\\ud800":1e999}']),
    "cursors": (cursors, [b"1-0-abcd", b"1-0-abcd.2-3-ef01", b"0-0-none"]),
    "tokens": (tokens, [*_TOKENS, b"1:2:3:4:9999999999:" + b"a" * 32, b"\xed\xa0\x80.e30.x"]),
    "claims": (claims, [b'{"sub":"21","tenant_id":1,"branch_ids":[1],"roles":["WAITER"],"exp":9}']),
    "key_sets": (key_sets, [_RSA, b'{"keys":[{"kty":"EC","crv":"P-256","x":"AA","y":"AA"}]}',
                            b'{"keys":[{"kty":"oct","k":"AAAA"}]}']),
    "revocations": (revocations, [b'{"jti":"a"}', b'{"user_id":"21","tenant_id":1}']),
    "replies": (replies, [b"\0*4\r\n$8\r\npmessage\r\n$1\r\n*\r\n$1\r\nc\r\n$2\r\n{}\r\n",
                          b"\3*3\r\n$7\r\nmessage\r\n$20\r\nchannel:auth:revoked\r\n$2\r\n{}\r\n",
                          b"\0%1\r\n*0\r\n+a\r\n", b"\0-ERR x\r\n",
                          b"\0*4\r\n$8\r\npmessage\r\n*0\r\n*0\r\n:1\r\n"]),
    "frames": (frames, [b"\0" * 9 + client_frame(TEXT, "ping"),
                        b"\1" * 9 + client_frame(TEXT, "pi", fin=False) + client_frame(0, "ng"),
                        b"\0" * 9 + client_frame(PING, b"x") + client_frame(8, b"\x03\xe8bye"),
                        b"\0" * 9 + client_frame(TEXT, "é" * 3000)]),
}  # fmt: skip


def quiet() -> None:
    """Without a log line for each piece of junk."""
    structlog.configure(processors=[_drop])


def _drop(_logger: Any, _method: str, _event: Any) -> Any:
    raise structlog.DropEvent
