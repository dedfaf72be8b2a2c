"""Reading a request head: where it ends, how long it may be, and what follows it."""

import pytest
from trio.testing import memory_stream_pair

from tests.support.sockets import make_head
from trio_gateway.transports.handshake import MAX_HEAD_BYTES, Refusal
from trio_gateway.transports.request_head import Head, HeadReader, Nobody


async def test_bytes_after_the_head_are_returned_separately() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(make_head() + b"behind")

    assert await HeadReader(theirs).read() == Head(make_head(), b"behind")


async def test_endless_head_is_refused_at_the_limit() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(b"x" * (MAX_HEAD_BYTES + 1))

    assert await HeadReader(theirs).read() == Refusal(
        431, f"request head is over {MAX_HEAD_BYTES} bytes"
    )


@pytest.mark.parametrize(
    ("data", "outcome"), [(b"", Nobody()), (b"GET /ws", Refusal(400, "incomplete request"))]
)
async def test_stream_that_ends_is_refused_only_within_a_head(
    data: bytes, outcome: Nobody | Refusal
) -> None:
    ours, theirs = memory_stream_pair()
    if data:
        await ours.send_all(data)
    await ours.send_eof()
    reader = HeadReader(theirs)

    assert await reader.read() == outcome
    assert reader.begun == bool(data)
