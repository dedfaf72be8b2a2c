"""A Redis connection on a Trio stream; hiredis reads the replies."""

import socket
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from math import inf
from typing import Any, Final

import hiredis
import trio

from ..core.exception_groups import first_leaf
from ..redis_url import RedisAddress
from ..runtime.supervision import ConnectionLost, Demoted

CONNECT_TIMEOUT: Final = 3.0  # seconds to connect, and again to authenticate
# Bytes: a connection that brings this many during a timeout is slow, but works. One that brings
# fewer, and no complete reply, is lost, even if some bytes trickle in.
ENOUGH: Final = 65_536
_CHUNK: Final = 1 << 18
_DEMOTED: Final = frozenset({"MASTERDOWN", "READONLY", "UNBLOCKED", "CLUSTERDOWN", "TRYAGAIN"})
_NOTHING: Final = object()

Command = Sequence[str | bytes | int]


class Redirected(Demoted):
    """Another node of the Cluster has the slot, or has what the key is while the slot moves."""

    def __init__(self, reply: str) -> None:
        """Read ``MOVED 3999 127.0.0.1:6381``, or the same with ASK."""
        self.kind, slot, self.place = reply.split(" ", 2)
        super().__init__(f"the Cluster says {self.kind}")
        self.slot = int(slot)


class RedisConnection:
    """Sends commands and receives replies.

    Every failure raises :exc:`ConnectionLost`; the connection cannot be used after that.
    ``asking``: the server is a node of a Cluster that is about to get the slot.
    """

    def __init__(self, stream: trio.abc.Stream, *, asking: bool = False) -> None:
        self._stream = stream
        # Of a plain TCP or unix connection, the socket within Trio's: to send does not wait then,
        # and to receive is one system call instead of two.
        self._socket: socket.socket | None = None
        if type(stream) is trio.SocketStream:
            self._socket = getattr(stream.socket, "_sock", None)
        self._asking = asking
        self._reader = hiredis.Reader(notEnoughData=_NOTHING)
        self.received = 0  # bytes

    async def send(self, *words: str | bytes | int) -> None:
        """Send one command."""
        await self._send([words])

    async def _send(self, commands: Sequence[Command]) -> None:
        try:
            packed = [hiredis.pack_command(words) for words in commands]  # type: ignore[arg-type]  # its stub is too narrow
            data = b"".join(packed)
            if rest := data[self._send_nowait(data) :]:
                await self._stream.send_all(rest)
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"send failed: {_cause(error)}") from None

    async def receive(self) -> list[Any]:
        """Wait for data, and return the replies that it completes; the list may be empty."""
        try:
            data = await self._receive_some()
        except (OSError, trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionLost(f"receive failed: {_cause(error)}") from None
        if not data:
            raise ConnectionLost("closed by Redis")
        self.received += len(data)
        self._reader.feed(data)
        return self._complete()

    def _send_nowait(self, data: bytes) -> int:
        """Send what can go without waiting, and return the number of bytes."""
        if self._socket is None:
            return 0
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0

    async def _receive_some(self) -> bytes:
        if self._socket is None:
            return bytes(await self._stream.receive_some(_CHUNK))
        while self._socket.fileno() != -1:
            await trio.lowlevel.wait_readable(self._socket)
            try:
                return self._socket.recv(_CHUNK)
            except BlockingIOError:
                continue
        raise trio.ClosedResourceError

    async def close(self) -> None:
        """Close the connection. A task that waits for a reply gets :exc:`ConnectionLost`."""
        await trio.aclose_forcefully(self._stream)

    async def ask(self, *words: str | bytes | int, timeout: float = inf) -> Any:
        """Send one command and return its reply; no other command may be waiting for one.

        An error reply is returned as :exc:`hiredis.ReplyError`. If neither a reply nor
        :data:`ENOUGH` bytes of one arrive in ``timeout`` seconds, the connection is lost.
        """
        (reply,) = await self.ask_all([words], timeout=timeout)
        return reply

    async def ask_all(
        self,
        commands: Sequence[Command],
        *,
        timeout: float = inf,
        replies: list[Any] | None = None,
    ) -> list[Any]:
        """Send commands at once and return their replies, as :meth:`ask` does.

        They are added to ``replies``, an empty list, as they arrive: it has those that came before
        the connection was lost.
        """
        replies = [] if replies is None else replies
        if self._asking:
            commands = [each for command in commands for each in (("ASKING",), command)]
        await self._send(commands)
        while timeout == inf and len(replies) < len(commands):  # without a scope
            replies += await self.receive()
        while len(replies) < len(commands):
            before = self.received
            with trio.move_on_after(timeout) as scope:
                while len(replies) < len(commands):
                    replies += await self.receive()
            if scope.cancelled_caught and self.received - before < ENOUGH:
                raise ConnectionLost(f"no answer to {commands[len(replies)][0]!s}")
        if len(replies) > len(commands):
            raise ConnectionLost("more replies than commands")
        return replies[1::2] if self._asking else replies

    async def call(self, *words: str | bytes | int, timeout: float = inf) -> Any:
        """Like :meth:`ask`, but an error reply raises :exc:`ConnectionLost`.

        It raises :exc:`Demoted` if the reply says that the server is a replica.
        """
        return no_error(await self.ask(*words, timeout=timeout), words[0])

    async def check_role(self, *, timeout: float = inf) -> None:
        """Raise :exc:`Demoted` if the server says that it is a replica. A proxy may not say it.

        Every user may send HELLO, whatever the ACL. Without a version it changes nothing.
        """
        raise_if_replica(await self.ask("HELLO", timeout=timeout))

    def _complete(self) -> list[Any]:
        found = []
        try:
            while (reply := self._reader.gets()) is not _NOTHING:
                found.append(reply)
        # Maps whose keys are lists (RESP3), arrays of 4,000,000,000 members, and so on.
        except (hiredis.ProtocolError, TypeError, ValueError, MemoryError):
            raise ConnectionLost("the reply is not RESP") from None
        return found


def raise_if_replica(reply: Any) -> None:
    """Raise :exc:`Demoted` if this reply to HELLO is that of a replica."""
    if isinstance(reply, list) and b"role" in reply[::2]:
        role = reply[2 * reply[::2].index(b"role") + 1 :][:1]
        if role in ([b"replica"], [b"slave"]):
            raise Demoted("Redis is a replica")


def no_error(reply: Any, command: str | bytes | int) -> Any:
    """The reply to a command, unless it is an error: see :meth:`RedisConnection.call`."""
    if isinstance(reply, hiredis.ReplyError):
        what = str(reply).split(" ", 1)[0]
        if what in ("MOVED", "ASK"):
            raise _redirected(str(reply))
        kind = Demoted if what in _DEMOTED else ConnectionLost
        raise kind(f"{command!s} failed: {what}")
    return reply


def _redirected(reply: str) -> ConnectionLost:
    try:
        return Redirected(reply)
    except ValueError:
        return ConnectionLost("unexpected reply")


@asynccontextmanager
async def open_redis(
    address: RedisAddress, *, any_role: bool = False, asking: bool = False
) -> AsyncIterator[RedisConnection]:
    """As :func:`connect_redis`; the connection is closed at the end of the block."""
    connection = await connect_redis(address, any_role=any_role, asking=asking)
    try:
        yield connection
    finally:
        await connection.close()


async def connect_redis(
    address: RedisAddress, *, any_role: bool = False, asking: bool = False
) -> RedisConnection:
    """Connect, authenticate and select the database. The host name is resolved each time.

    Raises :exc:`ConnectionLost` if one of these fails, and, unless it may have ``any_role``,
    :exc:`Demoted` if the server is a replica.
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
    connection = RedisConnection(stream, asking=asking)
    try:
        with trio.move_on_after(CONNECT_TIMEOUT) as scope:
            await _greet(connection, address)
            if not any_role:
                await connection.check_role()
        if scope.cancelled_caught:
            raise ConnectionLost(f"no answer from {address} in {CONNECT_TIMEOUT:g} s")
    except BaseException:
        await connection.close()
        raise
    return connection


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
        reply = await connection.ask("AUTH", *user, address.password or "")
        if not address.optional_auth:
            no_error(reply, "AUTH")
    if address.db:
        await connection.call("SELECT", address.db)
    # Shown in CLIENT LIST. An error is ignored: an ACL may refuse it, a proxy may not know it.
    await connection.ask("CLIENT", "SETNAME", address.client_name or "trio-gateway")


def _cause(error: BaseException) -> str:
    cause = first_leaf(error.__cause__ or error)
    if isinstance(cause, ssl.SSLError) and getattr(cause, "reason", None):
        return cause.reason
    return (cause.strerror if isinstance(cause, OSError) else None) or type(cause).__name__
