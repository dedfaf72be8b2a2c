"""The streams source: no entry is delivered twice."""

import pytest
import trio

from tests.support.redis_links import link_to
from trio_gateway.broker.stream_cursor import StreamCursor
from trio_gateway.broker.stream_replies import Info
from trio_gateway.broker.streams import Streams
from trio_gateway.core.event_ids import tag
from trio_gateway.core.resilience import Breaker
from trio_gateway.core.routing import ROUTES
from trio_gateway.redis_url import RedisAddress
from trio_gateway.runtime.dispatch import Dispatch
from trio_gateway.runtime.history import History
from trio_gateway.runtime.hub import CapacityLimits, Hub
from trio_gateway.runtime.ingest import Ingest
from trio_gateway.runtime.queue import EventQueue
from trio_gateway.runtime.resume import Replays
from trio_gateway.runtime.stream_inlet import StreamInlet
from trio_gateway.runtime.supervision import ConnectionLost


async def test_reply_to_an_earlier_command_is_not_delivered_again() -> None:
    entry = b"*2\r\n$3\r\n1-1\r\n*2\r\n$4\r\ndata\r\n$2\r\n{}\r\n"
    news = b"*1\r\n*2\r\n$1\r\ns\r\n*1\r\n" + entry

    async def redis(stream: trio.abc.Stream) -> None:
        while await stream.receive_some():
            await stream.send_all(news)

    ingest, history = Ingest(), History()
    hub = Hub(CapacityLimits(total=1, per_user=1, per_session=1))
    inlet = StreamInlet(
        ingest=ingest, queue=EventQueue(10), history=history, dispatch=Dispatch(hub, ROUTES),
        replays=Replays(history, hub), routes=ROUTES,
    )  # fmt: skip
    streams = Streams(RedisAddress(), ["s"], inlet, Breaker(5, 30))
    cursor = StreamCursor("s", tag("s"), Info())
    cursor.checked_at = trio.current_time()
    streams._by_name["s"] = cursor
    async with link_to(redis) as link:
        await streams._read(link)
        assert streams.cursors == {"s": "1-1"}
        with pytest.raises(ConnectionLost, match="earlier question"):
            await streams._read(link)
    assert ingest.received["stream"] == 1
