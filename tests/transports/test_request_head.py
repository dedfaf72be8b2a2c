"""Reading a request head: how far, how much, and what the client may not have sent."""

import pytest
from trio.testing import memory_stream_pair

from tests.support.sockets import make_head
from trio_gateway.transports.handshake import MAX_HEAD_BYTES, Refusal
from trio_gateway.transports.request_head import Head, HeadReader, Nobody


async def test_bytes_behind_the_head_are_kept_apart() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(make_head() + b"behind")

    assert await HeadReader(theirs).read() == Head(make_head(), b"behind")


async def test_head_without_an_end_is_refused_at_the_limit() -> None:
    ours, theirs = memory_stream_pair()
    await ours.send_all(b"x" * (MAX_HEAD_BYTES + 1))

    assert await HeadReader(theirs).read() == Refusal(
        431, f"request head is over {MAX_HEAD_BYTES} bytes"
    )


@pytest.mark.parametrize(
    ("data", "outcome"), [(b"", Nobody()), (b"GET /ws", Refusal(400, "incomplete request"))]
)
async def test_stream_that_ends_is_refused_only_if_a_head_has_begun(
    data: bytes, outcome: Nobody | Refusal
) -> None:
    ours, theirs = memory_stream_pair()
    if data:
        await ours.send_all(data)
    await ours.send_eof()
    reader = HeadReader(theirs)

    assert await reader.read() == outcome
    assert reader.begun == bool(data)
