"""A Redis connection on a Trio stream; hiredis reads the replies."""

import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from math import inf
from typing import Any, Final

import hiredis
import trio

from ..core.exception_groups import first_leaf
from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost, Demoted

CONNECT_TIMEOUT: Final = 3.0  # seconds for the connection, and as many for its greetings
# Bytes: a link that brings so many while it is waited for is slow; one that brings fewer, and no
# answer, is lost, though some trickle in.
ENOUGH: Final = 65_536
_CHUNK: Final = 1 << 18
_DEMOTED: Final = frozenset({"MASTERDOWN", "READONLY", "UNBLOCKED"})
_NOTHING: Final = object()


class RedisConnection:
    """Sends commands and receives replies.

    Every failure raises :exc:`ConnectionLost`; the connection cannot be used after that.
    """

    def __init__(self, stream: trio.abc.Stream) -> None:
        self._stream = stream
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self.received = 0  # bytes

    async def send(self, *words: str | bytes | int) -> None:
        try:
            packed = hiredis.pack_command(words)  # type: ignore[arg-type]  # its stub is too narrow
            await self._stream.send_all(packed)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"send failed: {type(error).__name__}") from None

    async def receive(self) -> list[Any]:
        """Wait for data; the replies that are complete with it, maybe none."""
        try:
            data = await self._stream.receive_some(_CHUNK)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"receive failed: {type(error).__name__}") from None
        if not data:
            raise ConnectionLost("closed by Redis")
        self.received += len(data)
        self._reader.feed(bytes(data))
        return self._complete()

    async def ask(self, *words: str | bytes | int, timeout: float = inf) -> Any:
        """Send one command and wait for its reply, with nothing else under way.

        An error reply is returned as :exc:`hiredis.ReplyError`. Neither a reply nor
        :data:`ENOUGH` bytes of one in ``timeout`` seconds is :exc:`ConnectionLost`.
        """
        await self.send(*words)
        replies: list[Any] = []
        while not replies:
            before = self.received
            with trio.move_on_after(timeout) as scope:
                while not (replies := await self.receive()):
                    pass
            if scope.cancelled_caught and self.received - before < ENOUGH:
                raise ConnectionLost(f"no answer to {words[0]!s}")
        if len(replies) > 1:
            raise ConnectionLost("more replies than commands")
        return replies[0]

    async def call(self, *words: str | bytes | int, timeout: float = inf) -> Any:
        """As :meth:`ask`, but an error reply is :exc:`ConnectionLost`, too."""
        reply = await self.ask(*words, timeout=timeout)
        if isinstance(reply, hiredis.ReplyError):
            what = str(reply).split(" ", 1)[0]
            kind = Demoted if what in _DEMOTED else ConnectionLost
            raise kind(f"{words[0]!s} failed: {what}")
        return reply

    async def check_role(self, *, timeout: float = inf) -> None:
        """Raise :exc:`Demoted` if this is a replica, as far as it tells: a proxy may not.

        Every user may say HELLO, whatever the ACL. Without a version it changes nothing.
        """
        reply = await self.ask("HELLO", timeout=timeout)
        if isinstance(reply, list) and b"role" in reply[::2]:
            role = reply[2 * reply[::2].index(b"role") + 1 :][:1]
            if role in ([b"replica"], [b"slave"]):
                raise Demoted("Redis is a replica")

    def _complete(self) -> list[Any]:
        found = []
        try:
            while (reply := self._reader.gets()) is not _NOTHING:
                found.append(reply)
        # RESP3's maps by lists; arrays of four thousand million members; and such.
        except (hiredis.ProtocolError, TypeError, ValueError, MemoryError):
            raise ConnectionLost("what came is not RESP") from None
        return found


@asynccontextmanager
async def open_redis(address: RedisAddress) -> AsyncIterator[RedisConnection]:
    """Connect, authenticate and select the database. The host name is resolved each time.

    Raises :exc:`ConnectionLost` if one of these fails, :exc:`Demoted` if the server is a replica.
    """
    try:
        with trio.fail_after(CONNECT_TIMEOUT):
            stream = await _connect(address)
    except (OSError, trio.BrokenResourceError) as error:
        raise ConnectionLost(f"can't connect to {address}: {_cause(error)}") from None
    except trio.TooSlowError:
        raise ConnectionLost(
            f"can't connect to {address}: no answer in {CONNECT_TIMEOUT:g} s"
        ) from None
    try:
        connection = RedisConnection(stream)
        with trio.move_on_after(CONNECT_TIMEOUT) as scope:
            await _greet(connection, address)
        if scope.cancelled_caught:
            raise ConnectionLost(f"no answer from {address} in {CONNECT_TIMEOUT:g} s")
        yield connection
    finally:
        await trio.aclose_forcefully(stream)


async def _connect(address: RedisAddress) -> trio.abc.Stream:
    if address.path is not None:
        return await trio.open_unix_socket(address.path)
    stream = await trio.open_tcp_stream(address.host, address.port)
    if address.tls is None:
        return stream
    try:
        secure = trio.SSLStream(
            stream, address.tls.context(), server_hostname=address.host, https_compatible=False
        )
        await secure.do_handshake()
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    return secure


async def _greet(connection: RedisConnection, address: RedisAddress) -> None:
    if address.user is not None or address.password is not None:
        user = [address.user] if address.user is not None else []
        await connection.call("AUTH", *user, address.password or "")
    if address.db:
        await connection.call("SELECT", address.db)
    # A convenience in CLIENT LIST: an ACL may refuse it, and a proxy may not know it.
    await connection.ask("CLIENT", "SETNAME", address.client_name or "trio-gateway")
    await connection.check_role()


def _cause(error: BaseException) -> str:
    cause = first_leaf(error.__cause__ or error)
    if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None):
        return cause.reason
    return (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
