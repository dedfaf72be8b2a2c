"""Which calls are tried again, by what a server on a real socket answers."""

import re
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest
import trio

from trio_gateway.api_client import AsyncApiClient, CallFailed, attempts
from trio_gateway.publisher import InDoubt, PublishFailed

READY = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1}
NO_ANSWER = b""


def answer(status: int, body: str = "{}", *headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(body)}", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n" + body).encode()


NODES = answer(200, '{"nodes":[]}')
PUBLISHED = answer(200, '{"published":[{"event_id":"1-0-abcd"}]}')
LATER = answer(503, '{"error":"Redis does not answer"}', "Retry-After: 0.01")
MUCH_LATER = answer(503, "{}", "Retry-After: 60")
TOO_MANY = answer(429, "{}", "Retry-After: 0.01")
PROXY = answer(502, "<html>")
BUG = answer(500)


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attempts, "_PAUSE", 0.01)


@dataclass
class Server:
    """Answers each request with the next text; closes the connection instead of no answer."""

    answers: list[bytes]
    url: str = ""
    requests: list[bytes] = field(default_factory=list)

    async def serve(self, stream: trio.SocketStream) -> None:
        async with stream:
            while True:
                received = b""
                while b"\r\n\r\n" not in received:
                    if not (more := await stream.receive_some()):
                        return
                    received += more
                head, _, body = received.partition(b"\r\n\r\n")
                length = re.search(rb"(?i)content-length: (\d+)", head)
                while length is not None and len(body) < int(length[1]):
                    body += await stream.receive_some()
                self.requests.append(body)
                if (text := self.answers.pop(0)) == NO_ANSWER:
                    return
                await stream.send_all(text)


@asynccontextmanager
async def answering(answers: Sequence[bytes]) -> AsyncIterator[tuple[Server, AsyncApiClient]]:
    server = Server(list(answers))
    async with trio.open_nursery() as nursery:
        (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, server.serve, [listener])
        server.url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        async with AsyncApiClient(server.url, "hunter2", timeout=2) as api:
            yield server, api
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize(
    "before", [LATER, TOO_MANY, PROXY, NO_ANSWER], ids=["503", "429", "502", "no answer"]
)
async def test_reading_is_tried_again(before: bytes) -> None:
    async with answering([before, before, NODES]) as (server, api):
        assert await api.nodes() == []
    assert server.answers == []


@pytest.mark.parametrize(
    ("answers", "status", "in_doubt"),
    [
        ([LATER, LATER, LATER], 503, True),  # Redis may have got the order
        ([TOO_MANY, TOO_MANY, TOO_MANY], 429, False),
        ([BUG], 500, True),
        ([NO_ANSWER, NO_ANSWER, NO_ANSWER], None, True),
        ([NO_ANSWER, LATER, LATER], 503, True),  # the first may have been carried out
        ([answer(200, "<html>")], 200, True),
        ([answer(200, "[" * 100_000)], 200, True),
        ([answer(302, "", "Location: http://127.0.0.1:1/")], 302, False),
    ],
)
async def test_a_call_fails_after_its_last_attempt(
    answers: list[bytes], status: int | None, in_doubt: bool
) -> None:
    async with answering(answers) as (server, api):
        with pytest.raises(CallFailed) as failed:
            await api.disconnect(1, user_id=1)
    assert (failed.value.status, failed.value.in_doubt) == (status, in_doubt)
    assert server.answers == []
    assert "hunter2" not in str(failed.value)


async def test_pause_that_is_too_long_is_told() -> None:
    async with answering([MUCH_LATER]) as (server, api):
        with pytest.raises(CallFailed) as failed:
            await api.nodes()
    assert (failed.value.retry_after, failed.value.in_doubt) == (60, False)
    assert len(server.requests) == 1


async def test_event_without_an_id_is_not_sent_again_if_its_answer_was_lost() -> None:
    for lost in (NO_ANSWER, PROXY):
        async with answering([lost, PUBLISHED]) as (server, api):
            with pytest.raises(InDoubt):
                await api.publish(READY)
        assert len(server.requests) == 1


async def test_event_without_an_id_is_sent_again_if_nothing_was_published() -> None:
    async with answering([LATER, TOO_MANY, PUBLISHED]) as (server, api):
        assert await api.publish(READY) == "1-0-abcd"
    assert len(set(server.requests)) == 1


async def test_event_with_an_id_is_sent_again() -> None:
    async with answering([NO_ANSWER, PUBLISHED]) as (_, api):
        assert await api.publish(READY, id="a") == "1-0-abcd"
    async with answering([NO_ANSWER, LATER, LATER]) as (_, api):
        with pytest.raises(InDoubt):
            await api.publish(READY, id="a")


@pytest.mark.parametrize(
    ("entry", "kind", "text"),
    [
        ('{"error":"unavailable"}', PublishFailed, "not published: unavailable"),
        ('{"error":"refused: OOM"}', PublishFailed, "Redis refuses the event: OOM"),
        ('{"event_id":null,"error":"in_doubt"}', InDoubt, "without an answer"),
        ('{"event_id":"1-0-abcd","error":"in_doubt"}', InDoubt, "too few replicas"),
    ],
)
async def test_outcome_of_an_event_is_the_exception_of_the_publisher(
    entry: str, kind: type[PublishFailed], text: str
) -> None:
    async with answering([answer(200, f'{{"published":[{entry}]}}')]) as (_, api):
        with pytest.raises(PublishFailed, match=text) as failed:
            await api.publish(READY)
    assert type(failed.value) is kind


@pytest.mark.parametrize("body", ['{"published":[]}', '{"published":[{},{}]}', "{}", "null"])
async def test_answer_that_leaves_an_event_out_is_in_doubt(body: str) -> None:
    async with answering([answer(200, body)]) as (_, api):
        with pytest.raises(InDoubt, match="invalid answer"):
            await api.publish(READY)


async def test_batches_after_one_that_failed_are_not_sent() -> None:
    async with answering([MUCH_LATER]) as (server, api):
        found = await api.publish_many([READY] * 1001)
    assert len(server.requests) == 1
    assert {str(each.error) for each in found[1000:]} == {
        "not sent: events before it were not published"
    }
    assert not any(isinstance(each.error, InDoubt) for each in found)


async def test_text_of_a_server_that_repeats_the_secret_is_told_without_it() -> None:
    body = '{"error":"Bearer hunter2 is unknown \\u001b[2J"}'
    async with answering([answer(401, body)]) as (_, api):
        with pytest.raises(CallFailed, match="is unknown") as failed:
            await api.nodes()
    assert "hunter2" not in str(failed.value)
    assert "\x1b" not in str(failed.value)


async def test_silent_server_is_not_waited_for_longer_than_the_timeout() -> None:
    listener: Any
    (listener,) = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        url = f"http://127.0.0.1:{listener.socket.getsockname()[1]}"
        async with AsyncApiClient(url, "s", timeout=0.1) as api:
            with trio.fail_after(5), pytest.raises(InDoubt, match="no answer from 127"):
                await api.publish(READY)
