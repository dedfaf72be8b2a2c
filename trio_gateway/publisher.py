"""Publishing, for backends: send an event to every gateway, or raise an error with the reason.

::

    with Publisher("redis://localhost:6380") as publisher:
        publisher.publish({"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}, id="round-9001")
"""

from collections.abc import Callable, Mapping
from functools import partial
from types import TracebackType
from typing import Any, Final, Self, TypeVar

import msgspec
import redis
import sniffio
from redis.backoff import NoBackoff
from redis.retry import Retry

from .core.event_ids import DEFAULT_STREAM
from .core.events import InvalidEvent, parse_event
from .core.routing import ROUTES, InvalidRoutes, Route, Routing, channel_for, read_routes
from .core.shards import MAX_SHARDS, shard_of, stream_name
from .redis_errors import is_wrong_server
from .redis_url import RedisAddress

__all__ = [
    "TIMEOUT",
    "AsyncPublisher",
    "InvalidEvent",
    "InvalidRoutes",
    "PublishFailed",
    "Publisher",
    "read_routes",
]

TIMEOUT: Final = 2.0  # seconds to connect, and again for the reply
_FIELD: Final = "data"

# What redis-py and its parser raise for an invalid reply, in addition to redis-py's own errors.
_INVALID_REPLY: Final = (AssertionError, AttributeError, LookupError, TypeError, ValueError)

T = TypeVar("T")
_Event = Mapping[str, Any] | bytes | str


class PublishFailed(Exception):  # noqa: N818 - an outcome
    """Redis did not confirm the event. The text has the address and the reason, but no password.

    ``in_doubt`` is True if the event may have been published nevertheless: it was sent, in the
    first or the second attempt, but the reply was lost. Publishing it again is safe if it has an
    ``id``.
    """

    def __init__(self, text: str, *, in_doubt: bool = False) -> None:
        super().__init__(text)
        self.in_doubt = in_doubt


class _WrongServer(PublishFailed):
    """This server can't execute the command: it is a replica, or it is loading its data."""


class Publisher:
    """Publishes events to Redis, after checking each event by the gateway's own rules.

    An event of a durable type is added to a stream; any other event is published on one channel.
    No connection is made before the first event. Threads may share a publisher.

    Arguments:
        url: the URL of Redis (``redis://``, ``rediss://`` or ``unix://``), with the options of the
            gateway's ``REDIS_URL``.
        stream: the stream for durable events; one of the gateways' ``REDIS_STREAMS``.
        shards: the gateways' ``REDIS_STREAM_SHARDS``. Above 1, each event is added to the shard of
            its tenant, for example ``events:critical:{3}``.
        max_length: the approximate number of entries in a stream; None for no limit.
        routes: the gateways' routing table. Pass ``read_routes(text)`` of their
            ``WS_ROUTES_FILE`` if they have one.

    Raises :exc:`ValueError` if the URL can't be used, or for a number of shards that is not from
    1 to 256.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str = DEFAULT_STREAM,
        shards: int = 1,
        max_length: int | None = 100_000,
        routes: Mapping[str, Route] = ROUTES,
    ) -> None:
        try:
            address = RedisAddress.from_url(url)
            address.check()
        except ValueError as error:
            raise ValueError(
                "not a Redis URL (redis://[[user]:password@]host[:port][/db], rediss:// or"
                f" unix://): it {error}"
            ) from None
        if not 1 <= shards <= MAX_SHARDS:
            raise ValueError(f"shards must be from 1 to {MAX_SHARDS}")
        self._redis = redis.Redis(
            connection_pool=_Pool(
                **address.pool_options(redis),
                protocol=2,
                socket_connect_timeout=TIMEOUT,
                socket_timeout=TIMEOUT,
                retry=Retry(
                    NoBackoff(), 0
                ),  # _run repeats commands: an event must not be sent twice
            )
        )
        self._address = address
        self._stream = stream
        self._shards = shards
        self._max_length = max_length
        self._routes = Routing(routes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections. A later :meth:`publish` connects again."""
        self._redis.connection_pool.disconnect()

    def publish(
        self,
        event: _Event,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
        stream: str | None = None,
        channel: str | None = None,
    ) -> str | int:
        """Publish one event. This takes a few seconds at most.

        Arguments:
            event: a mapping, or the JSON as bytes or str, which is sent byte for byte.
            id: the idempotency key, unless the mapping has one; not allowed with JSON. Gateways
                treat events with the same ``id`` within 5 minutes as one event. An event with an
                ``id`` is therefore sent again if the reply to adding it to the stream is lost.
            stream, channel: publish there, whatever type the event has. The publisher's own
                ``stream`` means the shard of the event's tenant in it.

        Returns the entry's id in the stream (a str), or the number of subscribers that received it
        on the channel (an int).

        If the server refuses because it is not the primary, the event is sent once more, to the
        server that the host name then resolves to.

        Raises :exc:`InvalidEvent` if the gateway would drop the event, :exc:`PublishFailed` if
        Redis did not accept it, :exc:`TypeError` or :exc:`ValueError` for arguments that exclude
        each other.
        """
        if stream is not None and channel is not None:
            raise ValueError("pass stream or channel, not both")
        payload = _encode(event, id)
        parsed = parse_event(payload, channel="", received_at=0.0)
        if stream is None and channel is None:
            if self._routes.is_durable(parsed.type):
                stream = self._stream
            else:
                channel = channel_for(parsed, self._routes)
        if stream is not None:
            if stream == self._stream:
                shard = shard_of(parsed.tenant, self._shards)
                stream = stream_name(stream, self._shards, shard)
            return self._add(stream, payload, again=parsed.id is not None)
        assert channel is not None
        subscribers: int = self._run(partial(self._redis.publish, channel, payload), int)
        return subscribers

    def _add(self, stream: str, payload: bytes, *, again: bool) -> str:
        add = partial(
            self._redis.xadd, stream, {_FIELD: payload}, maxlen=self._max_length, approximate=True
        )
        entry: bytes = self._run(add, bytes, again=again)
        return entry.decode()

    def _run(self, command: Callable[[], Any], kind: type, *, again: bool = False) -> Any:
        """Run the command, and once more if the wrong server refused it.

        With ``again``, also once more if the reply was lost.
        """
        in_doubt = refused = False
        while True:
            try:
                return self._try(command, kind)
            except PublishFailed as failed:
                wrong_server = isinstance(failed, _WrongServer)
                try_again = (wrong_server and not refused) or (
                    again and failed.in_doubt and not in_doubt
                )
                refused |= wrong_server
                in_doubt |= failed.in_doubt
                if not try_again:
                    # An earlier attempt may have succeeded, whatever happened to this one.
                    failed.in_doubt = in_doubt
                    raise

    def _try(self, command: Callable[[], Any], kind: type) -> Any:
        where = f"Redis at {self._address}"
        try:
            reply = command()
        except _NotReached as not_reached:
            match not_reached.error:
                case redis.AuthenticationError() as error:
                    text = f"{where} refuses the credentials: {error}"
                case redis.TimeoutError():
                    text = f"can't connect to {where}: no answer in {TIMEOUT:g} s"
                case error:
                    text = f"can't connect to {where}: {_cause(error)}"
            raise PublishFailed(text) from None
        except redis.TimeoutError:
            text = f"{where} did not answer in {TIMEOUT:g} s"
            raise PublishFailed(text, in_doubt=True) from None
        except redis.RedisError as error:
            if is_wrong_server(error):
                # The next connection resolves the name and authenticates again.
                self._redis.connection_pool.disconnect()
                raise _WrongServer(f"{where} refuses: {error}") from None
            if isinstance(error, redis.ResponseError):
                raise PublishFailed(f"{where} refuses: {error}") from None
            raise PublishFailed(
                f"{where} closed the connection: {_cause(error)}", in_doubt=True
            ) from None
        except _INVALID_REPLY:
            reply = None
        if not isinstance(reply, kind):
            self._redis.connection_pool.disconnect()  # later replies on it can't be trusted
            raise PublishFailed(f"{where} sent an invalid reply", in_doubt=True)
        return reply


class _NotReached(Exception):  # noqa: N818 - an outcome
    """There is no connection, so nothing was sent. A RedisError alone does not tell this."""

    def __init__(self, error: redis.RedisError) -> None:
        super().__init__()
        self.error = error


class _Pool(redis.ConnectionPool):
    def get_connection(self, *args: Any, **options: Any) -> Any:
        try:
            return super().get_connection(*args, **options)
        except redis.RedisError as error:
            raise _NotReached(error) from error


class AsyncPublisher:
    """A :class:`Publisher` for asyncio and Trio: ``async with AsyncPublisher(url) as publisher``.

    It runs the synchronous publisher in a worker thread, one event at a time and in the order of
    the calls. A cancelled call may have published its event nevertheless. It belongs to the event
    loop in which it was entered.

    Takes the arguments of :class:`Publisher`, and raises the same exceptions.
    """

    def __init__(self, url: str, **options: Any) -> None:
        self._publisher = Publisher(url, **options)
        self._in_thread: _InThread | None = None

    async def __aenter__(self) -> Self:
        library = sniffio.current_async_library()
        if library == "trio":
            self._in_thread = _TrioThread()
        elif library == "asyncio":
            self._in_thread = _AsyncioThread()
        else:
            raise RuntimeError(f"AsyncPublisher runs on asyncio and Trio, not on {library}")
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._in_thread = None
        self._publisher.close()

    async def publish(
        self,
        event: _Event,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
        stream: str | None = None,
        channel: str | None = None,
    ) -> str | int:
        """Publish one event, as :meth:`Publisher.publish` does.

        Also raises :exc:`RuntimeError` outside of the ``async with`` block.
        """
        if self._in_thread is None:
            raise RuntimeError("not entered: use async with AsyncPublisher(url) as publisher")
        return await self._in_thread.run(
            partial(self._publisher.publish, event, id=id, stream=stream, channel=channel)
        )


class _TrioThread:
    def __init__(self) -> None:
        import trio

        self._one = trio.CapacityLimiter(1)  # first come, first served
        self._run_sync = trio.to_thread.run_sync

    async def run(self, work: Callable[[], T]) -> T:
        return await self._run_sync(work, limiter=self._one)


class _AsyncioThread:
    def __init__(self) -> None:
        import asyncio

        self._one = asyncio.Lock()  # first come, first served
        self._to_thread = asyncio.to_thread

    async def run(self, work: Callable[[], T]) -> T:
        async with self._one:
            return await self._to_thread(work)


_InThread = _TrioThread | _AsyncioThread


def _encode(event: _Event, id: str | None) -> bytes:  # noqa: A002 - the event's key
    if not isinstance(event, Mapping):
        if id is not None:
            raise TypeError("id can't be added to JSON: pass the event as a mapping")
        try:
            return event.encode() if isinstance(event, str) else bytes(event)
        except UnicodeEncodeError:
            raise InvalidEvent("not_utf8", "event is not UTF-8") from None
    found = dict(event)
    if id is not None:
        found.setdefault("id", id)
    try:
        return msgspec.json.encode(found)
    except UnicodeEncodeError:
        raise InvalidEvent("not_utf8", "event is not UTF-8") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise InvalidEvent("not_json", f"event can't be JSON: {error}") from None


def _cause(error: BaseException) -> str:
    cause = error.__context__
    return (cause.strerror if isinstance(cause, OSError) else None) or str(error)
