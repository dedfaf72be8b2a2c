"""Connections to Redis servers, without an event loop: commands go out, replies come in.

They distinguish what redis-py does not: whether a command was certainly not sent, was refused, or
may have been executed.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any, Final, TypeVar

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from ..redis_errors import is_wrong_server
from ..redis_url import RedisAddress

TIMEOUT: Final = 2.0  # seconds to connect, and again for each reply
_CHECK: Final = 2.0  # seconds for which a server counts as a primary that has said so
_POLL: Final = 0.25  # seconds of silence after which we ask whether it is worth waiting longer

# What redis-py and its parser raise for an invalid reply, in addition to redis-py's own errors.
_INVALID_REPLY: Final = (AssertionError, AttributeError, LookupError, TypeError, ValueError)

T = TypeVar("T")
Command = tuple[str | bytes | int, ...]


class NotReached(Exception):  # noqa: N818 - an outcome
    """There is no connection, so nothing was sent."""


class Refused(Exception):  # noqa: N818 - an outcome
    """The server has answered the command with an error, so it did not execute it."""

    def __init__(self, text: str, error: redis.RedisError) -> None:
        super().__init__(text)
        self.error = error

    @property
    def is_wrong_server(self) -> bool:
        """Whether another server may execute the command, see :func:`is_wrong_server`."""
        return is_wrong_server(self.error)


class NoReply(Exception):  # noqa: N818 - an outcome
    """The command was sent, and no valid reply came. Whether it was executed is unknown.

    ``entry`` is the id of the entry that an earlier command on this connection has added.
    """

    def __init__(self, text: str, *, entry: str | None = None) -> None:
        super().__init__(text)
        self.entry = entry


class Link:
    """A connection to a server that nobody else uses meanwhile."""

    def __init__(self, connection: Any, address: RedisAddress, timeout: float) -> None:
        self.address = address
        # While a reply is late: whether to go on waiting.
        self.is_current: Callable[[], bool] = lambda: True
        self._connection = connection
        self._timeout = timeout
        self._primary_until = 0.0

    def send(self, *commands: Command) -> None:
        """Send commands at once; raises :exc:`NoReply`."""
        try:
            self._connection.send_packed_command(self._connection.pack_commands(commands))
        except redis.RedisError as error:
            raise NoReply(f"{self} closed the connection: {_cause(error)}") from None

    def receive(self, kind: type[T]) -> T:
        """Return the reply to the next command. Raises :exc:`Refused` and :exc:`NoReply`."""
        silent = f"{self} did not answer in {self._timeout:g} s"
        try:
            if not self._wait():
                raise NoReply(silent)
            reply = self._connection.read_response()
        except redis.TimeoutError:
            raise NoReply(silent) from None
        except redis.RedisError as error:
            if isinstance(error, redis.ResponseError) or is_wrong_server(error):
                raise Refused(f"{self} refuses: {error}", error) from None
            raise NoReply(f"{self} closed the connection: {_cause(error)}") from None
        except _INVALID_REPLY:
            reply = None
        if not isinstance(reply, kind):
            raise NoReply(f"{self} sent an invalid reply")
        return reply

    def check_primary(self) -> None:
        """Raise :exc:`Refused` if the server says that it is a replica; ask every few seconds.

        A replica refuses writes, but not PUBLISH, which reaches only those who listen to it.

        Raises :exc:`NotReached` if it does not answer.
        """
        now = time.monotonic()
        if now < self._primary_until:
            return
        try:
            self.send(("HELLO", 2))
            reply = self.receive(object)
        except Refused:  # an old server or a proxy does not know it
            reply = None
        except NoReply as lost:
            raise NotReached(str(lost)) from None
        if isinstance(reply, list) and b"role" in reply[::2]:
            role = reply[1 + 2 * reply[::2].index(b"role")]
            if role != b"master":
                error = redis.exceptions.ReadOnlyError("it is a replica")
                raise Refused(f"{self} is a replica", error)
        self._primary_until = now + _CHECK

    def is_usable(self) -> bool:
        """Whether an idle connection is still open."""
        # It has something to read only if it was closed.
        with suppress(redis.RedisError, OSError, *_INVALID_REPLY):
            return not self._connection.can_read()
        return False

    def close(self) -> None:
        """Close the connection."""
        _close(self._connection)

    def _wait(self) -> bool:
        """Whether a reply begins in time, from a server that still is the one to ask."""
        end = time.monotonic() + self._timeout
        while not self._connection.can_read(max(0.0, min(_POLL, end - time.monotonic()))):
            if time.monotonic() >= end or not self.is_current():
                return False
        return True

    def __str__(self) -> str:
        return f"Redis at {self.address}"


class Links:
    """Idle connections by address, and new ones when there is none. For several threads.

    Arguments:
        connect: seconds to connect; each reply while connecting may take the same again.
        reply: seconds for each reply.
    """

    def __init__(self, *, connect: float = TIMEOUT, reply: float = TIMEOUT) -> None:
        self._connect_timeout = connect
        self._timeout = reply
        self._idle: dict[RedisAddress, list[Link]] = {}
        self._process = os.getpid()

    @contextmanager
    def to(
        self, address: RedisAddress, is_current: Callable[[], bool] = lambda: True
    ) -> Iterator[Link]:
        """A connection to this server, that is closed if the block raises.

        While a reply is late, ``is_current`` is asked whether to go on waiting.

        Raises :exc:`NotReached`.
        """
        link = self._take(address) or Link(self._connect(address), address, self._timeout)
        link.is_current = is_current
        try:
            yield link
        except BaseException:
            link.close()
            raise
        self._idle.setdefault(address, []).append(link)

    def discard(self, address: RedisAddress) -> None:
        """Close the idle connections to this server: its name may lead to another one now."""
        for link in self._idle.pop(address, ()):
            link.close()

    def close(self) -> None:
        """Close all idle connections."""
        for address in list(self._idle):
            self.discard(address)

    def _take(self, address: RedisAddress) -> Link | None:
        if self._process != os.getpid():  # the connections are those of the process before a fork
            self._process, self._idle = os.getpid(), {}
        while True:
            try:
                link = self._idle.get(address, []).pop()
            except IndexError:
                return None
            if link.is_usable():
                return link
            link.close()

    def _connect(self, address: RedisAddress) -> Any:
        options = address.pool_options(redis) | {
            "protocol": 2,  # RESP3 begins with HELLO, which some proxies do not know
            "socket_connect_timeout": self._connect_timeout,
            "socket_timeout": self._connect_timeout,  # for the replies to AUTH and the like
            # It would repeat commands, and an event must not be sent twice.
            "retry": Retry(NoBackoff(), 0),
        }
        connection = options.pop("connection_class")(**options)
        where = f"Redis at {address}"
        try:
            connection.connect()
        except redis.RedisError as error:
            _close(connection)
            if isinstance(error, redis.AuthenticationError):
                if address.optional_auth:
                    return self._connect(
                        replace(address, user=None, password=None, optional_auth=False)
                    )
                raise NotReached(f"{where} refuses the credentials: {error}") from None
            if isinstance(error, redis.TimeoutError):
                reason = f"no answer in {self._connect_timeout:g} s"
            else:
                reason = _cause(error)
            raise NotReached(f"can't connect to {where}: {reason}") from None
        except BaseException as error:
            _close(connection)
            if isinstance(error, _INVALID_REPLY):
                raise NotReached(f"can't connect to {where}: it sent an invalid reply") from None
            raise
        return connection


def _close(connection: Any) -> None:
    with suppress(redis.RedisError, OSError):
        connection.disconnect()


def _cause(error: BaseException) -> str:
    cause = error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)
