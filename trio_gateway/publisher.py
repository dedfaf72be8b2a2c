"""Publishing, for backends: an event goes where every gateway hears it, or an exception says why.

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
from .core.events import Event, InvalidEvent, parse_event
from .core.routing import ROUTES, Route, Routing, To
from .redis_errors import is_wrong_server
from .redis_url import RedisAddress

__all__ = ["TIMEOUT", "AsyncPublisher", "InvalidEvent", "PublishFailed", "Publisher"]

TIMEOUT: Final = 2.0  # seconds to connect, and again for the answer
_FIELD: Final = "data"

# By redis-py and its parser, beside its own errors.
_WHAT_JUNK_RAISES: Final = (AssertionError, AttributeError, LookupError, TypeError, ValueError)

T = TypeVar("T")
_Event = Mapping[str, Any] | bytes | str


class PublishFailed(Exception):  # noqa: N818 - an outcome
    """Redis did not take the event; the text says where and why, never the password.

    ``in_doubt`` is True if the event may have got through all the same: it was sent, at the first
    or the second try, and Redis' answer was lost. Publishing it again is safe if it has an ``id``.
    """

    def __init__(self, text: str, *, in_doubt: bool = False) -> None:
        super().__init__(text)
        self.in_doubt = in_doubt


class _WrongServer(PublishFailed):
    """Refused by one that is not the one to ask."""


class Publisher:
    """Publishes events to Redis, checked by the same rules as the gateway's.

    Events of a durable type are added to ``stream``, which is kept at about ``max_length`` entries
    (None: without bound); the others are published on one channel. ``routes`` is the routing table
    of the gateways: give yours if they have a ``WS_ROUTES_FILE``.

    Nothing is connected before the first event. Threads may share a publisher.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str = DEFAULT_STREAM,
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
        self._redis = redis.Redis(
            connection_pool=_Pool(
                **address.pool_options(redis),
                protocol=2,
                socket_connect_timeout=TIMEOUT,
                socket_timeout=TIMEOUT,
                retry=Retry(NoBackoff(), 0),  # ours to decide: an event must not be sent twice
            )
        )
        self._address = address
        self._stream = stream
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
        self._redis.connection_pool.disconnect()

    def publish(
        self,
        event: _Event,
        *,
        id: str | None = None,  # noqa: A002 - the event's key
        stream: str | None = None,
        channel: str | None = None,
    ) -> str | int:
        """Publish one event; return its entry id in the stream, or how many heard the channel.

        ``event`` is a dict, or the JSON itself as bytes or str, which goes out byte for byte.
        ``id`` becomes the event's idempotency key unless it has one; for a dict only. Gateways
        take the same ``id`` within 5 minutes for the same event, so an event with one is sent
        again when the answer to adding it to the stream gets lost. One that a server refused
        because it is no primary is sent to the one that the name leads to by then.

        ``stream`` or ``channel`` sends it there, whatever its type.

        Raises :exc:`InvalidEvent` if the gateway would drop it, and :exc:`PublishFailed` if Redis
        did not take it; in a few seconds at most.
        """
        if stream is not None and channel is not None:
            raise ValueError("stream or channel, not both")
        payload = _encode(event, id)
        parsed = parse_event(payload, channel="", received_at=0.0)
        if stream is None and channel is None:
            if self._routes.is_durable(parsed.type):
                stream = self._stream
            else:
                channel = channel_for(parsed, self._routes)
        if stream is not None:
            return self._add(stream, payload, again=parsed.id is not None)
        assert channel is not None
        heard: int = self._run(partial(self._redis.publish, channel, payload), int)
        return heard

    def _add(self, stream: str, payload: bytes, *, again: bool) -> str:
        add = partial(
            self._redis.xadd, stream, {_FIELD: payload}, maxlen=self._max_length, approximate=True
        )
        entry: bytes = self._run(add, bytes, again=again)
        return entry.decode()

    def _run(self, command: Callable[[], Any], kind: type, *, again: bool = False) -> Any:
        """Give the command, and once more if a server refused it that is not the one to ask; with
        ``again``, also once more if its answer got lost.
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
                    # An earlier try may have got through, whatever became of this one.
                    failed.in_doubt = in_doubt
                    raise

    def _try(self, command: Callable[[], Any], kind: type) -> Any:
        where = f"Redis at {self._address}"
        try:
            reply = command()
        except _NotReached as not_reached:
            match not_reached.error:
                case redis.AuthenticationError() as error:
                    text = f"{where} does not let us in: {error}"
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
                # The next connection resolves the name anew, and authenticates again.
                self._redis.connection_pool.disconnect()
                raise _WrongServer(f"{where} refuses: {error}") from None
            if isinstance(error, redis.ResponseError):
                raise PublishFailed(f"{where} refuses: {error}") from None
            raise PublishFailed(f"{where} hung up: {_cause(error)}", in_doubt=True) from None
        except _WHAT_JUNK_RAISES:
            reply = None
        if not isinstance(reply, kind):
            self._redis.connection_pool.disconnect()  # what comes next may be no answer, either
            raise PublishFailed(f"{where} answered nonsense", in_doubt=True)
        return reply


class _NotReached(Exception):  # noqa: N818 - an outcome
    """No connection, so that nothing was sent. Not a RedisError: those say less."""

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

    It is the synchronous one in a worker thread of the library at hand, one event at a time and in
    the order of the calls. A call that is cancelled may have published its event all the same.
    Takes the same arguments, and raises the same exceptions. It belongs to the event loop that
    entered it.
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
        """As :meth:`Publisher.publish`."""
        if self._in_thread is None:
            raise RuntimeError("enter it first: async with AsyncPublisher(url) as publisher")
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


def channel_for(event: Event, routes: Routing = ROUTES) -> str:
    """The one channel on which the gateways hear an event that is not durable."""
    if event.session is not None and routes.route_of(event.type).to == To.DINERS:
        return f"channel:session:{event.session}"
    if event.branch == 0:
        return f"channel:tenant:{event.tenant}:admin"
    return f"channel:branch:{event.branch}:admin"


def _encode(event: _Event, id: str | None) -> bytes:  # noqa: A002 - the event's key
    if not isinstance(event, Mapping):
        if id is not None:
            raise TypeError("id is for an event given as a dict: JSON goes out as it is")
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
