"""The publisher for synchronous code."""

from collections.abc import Mapping
from functools import partial
from typing import Final, Self

from ..core.event_ids import DEFAULT_STREAM
from ..core.events import parse_event
from ..core.routing import ROUTES, Route, Routing, channel_for
from ..core.shards import MAX_SHARDS, STREAM_LENGTH, shard_of, stream_name
from ..redis_url import RedisUrl
from .adding import Confirm, add, check_confirm
from .links import Link
from .payload import EventToPublish, encode
from .sending import Sender

_FIELD: Final = "data"


class Publisher:
    """Publishes events to Redis, after checking each event by the gateway's own rules.

    An event of a durable type is added to a stream; any other event is published on one channel.
    No connection is made before the first event. Threads may share a publisher.

    Arguments:
        url: the URL of Redis, as the gateway's ``REDIS_URL``: one server (``redis://``,
            ``rediss://``, ``unix://``), Sentinels (``redis+sentinel://``) or a Cluster
            (``redis+cluster://``).
        stream: the stream for durable events; one of the gateways' ``REDIS_STREAMS``.
        shards: the gateways' ``REDIS_STREAM_SHARDS``. Above 1, each event is added to the shard of
            its tenant, for example ``events:critical:{3}``.
        max_length: the approximate number of entries in a stream; None for no limit.
        routes: the gateways' routing table. Pass ``read_routes(text)`` of their
            ``WS_ROUTES_FILE`` if they have one.
        confirm: how many replicas must have a durable event within 1 second; ``"all"`` for all
            that are connected then, at least one. If the primary fails, an event that fewer than
            all have confirmed can be lost: a replica without it may become the primary.

    Raises :exc:`ValueError` if the URL can't be used, and for a number of shards that is not from
    1 to 256 or an invalid ``confirm``.
    """

    def __init__(
        self,
        url: str,
        *,
        stream: str = DEFAULT_STREAM,
        shards: int = 1,
        max_length: int | None = STREAM_LENGTH,
        routes: Mapping[str, Route] = ROUTES,
        confirm: Confirm = 0,
    ) -> None:
        try:
            target = RedisUrl.from_url(url)
            target.check()
        except ValueError as error:
            raise ValueError(
                "not a Redis URL (redis://[[user]:password@]host[:port][/db], rediss://, unix://,"
                f" redis+sentinel:// or redis+cluster://): it {error}"
            ) from None
        if not 1 <= shards <= MAX_SHARDS:
            raise ValueError(f"shards must be from 1 to {MAX_SHARDS}")
        check_confirm(confirm)
        self._sender = Sender(target, counts_replicas=confirm == "all")
        self._stream = stream
        self._shards = shards
        self._max_length = max_length
        self._routes = Routing(routes)
        self._confirm = confirm

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections that are not in use. A later :meth:`publish` connects again."""
        self._sender.close()

    def publish(
        self,
        event: EventToPublish,
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
        on the channel (an int); in a Cluster, those on one of its nodes.

        If the server refuses because it is not the primary, the event is sent once more, to the
        server that the host name then leads to, or that Sentinels or nodes then name. It does not
        wait for the end of a failover.

        Raises :exc:`InvalidEvent` if the gateway would drop the event, :exc:`PublishFailed` if it
        was not published, :exc:`InDoubt` (a PublishFailed) if that is not certain, or if it was
        not confirmed, :exc:`TypeError` or :exc:`ValueError` for arguments that exclude each other.
        """
        if stream is not None and channel is not None:
            raise ValueError("pass stream or channel, not both")
        payload = encode(event, id)
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
            limit = () if self._max_length is None else ("MAXLEN", "~", self._max_length)
            command = ("XADD", stream, *limit, "*", _FIELD, payload)
            adding = partial(add, command, self._confirm, self._sender.replicas_of)
            return self._sender.send(stream, adding, again=parsed.id is not None)
        assert channel is not None

        def publish(link: Link) -> int:
            link.check_primary()
            link.send(("PUBLISH", channel, payload))
            return link.receive(int)

        return self._sender.send(channel, publish, again=False)
