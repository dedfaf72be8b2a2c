"""What the client confirms, in virtual time, against a gateway in memory."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from trio_gateway.client import Client, connect
from trio_gateway.client.receipts import Receipts, Seen
from trio_gateway.testing import make_payload

from .fakes import FakeGateway, Peer, Script, fake_gateway

TYPE = "SERVICE_CALL_CREATED"
URL = "ws://gateway.example/ws/waiter"


def connecting(gateway: FakeGateway, **options: Any) -> Any:
    return connect(URL, "t", dial=gateway.dial, **options)


def at(number: int, tag: str = "4723") -> str:
    """An event id of this position, in the stream with this tag."""
    return f"1790000000000-{number}-{tag}"


async def publish(peer: Peer, event_id: str, type_: str = TYPE) -> None:
    await peer.send_text(make_payload(type_, event_id=event_id).decode())


def sending(*ids: str, receipts: list[str] | None = [TYPE], pause: float = 0) -> Script:  # noqa: B006
    """A script that admits the client, and sends it these events after the first messages."""

    async def script(peer: Peer) -> None:
        peer.intervals, peer.receipts = (60, 90), receipts
        await peer.admit(last_event_id=at(0))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.stay)
            await trio.sleep(1)
            for event_id in ids:
                await publish(peer, event_id)
                await trio.sleep(pause)

    return script


def sent(gateway: FakeGateway, name: str) -> list[str]:
    """The event ids in the messages of this type, on all sockets."""
    messages = [each for each in gateway.received if each != "ping" and each["type"] == name]
    return [each.get("last_event_id", each.get("event_id")) for each in messages]


async def take(client: Client, count: int) -> None:
    for _ in range(count):
        await anext(client)


async def test_one_ack_confirms_the_tracked_events_of_a_fifth_of_a_second(
    autojump_clock: MockClock,
) -> None:
    async with (
        fake_gateway(sending(at(1), at(2), at(3))) as gateway,
        connecting(gateway) as client,
    ):
        await take(client, 3)
        await trio.sleep(0.1)
        assert sent(gateway, "ack") == []
        await trio.sleep(0.1)
        assert sent(gateway, "ack") == [at(3)]


async def test_event_is_confirmed_once_the_iteration_has_returned_it(
    autojump_clock: MockClock,
) -> None:
    async with fake_gateway(sending(at(1), at(2))) as gateway, connecting(gateway) as client:
        await trio.sleep(40)
        assert sent(gateway, "ack") == []
        assert gateway.confirmed == [at(0)]
        await take(client, 1)
        await trio.sleep(25)
        assert sent(gateway, "ack") == [at(1)]
        assert gateway.confirmed == [at(0), at(1)]


@pytest.mark.parametrize("receipts", [None, [], ["CHECK_PAID"]])
async def test_gateway_that_does_not_track_the_type_gets_only_pings(
    autojump_clock: MockClock, receipts: list[str] | None
) -> None:
    async with (
        fake_gateway(sending(*map(at, range(1, 9)), receipts=receipts)) as gateway,
        connecting(gateway) as client,
    ):
        await take(client, 8)
        await trio.sleep(20)
    assert [each["type"] for each in gateway.received] == ["resume"]


async def test_older_gateway_gets_only_pings(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        await publish(peer, at(1))
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        await take(client, 1)
        client.seen(at(1))
        await trio.sleep(30)
    assert [each if each == "ping" else each["type"] for each in gateway.received] == [
        "resume", "ping",
    ]  # fmt: skip


async def test_events_that_come_before_the_intervals_are_confirmed_then(
    autojump_clock: MockClock,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        await publish(peer, at(1))
        await publish(peer, at(2))
        await trio.sleep(3)
        peer.intervals, peer.receipts = (60, 90), [TYPE]
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        await take(client, 2)
        await trio.sleep(4)
        assert sent(gateway, "ack") == [at(2)]


async def test_escalated_event_has_an_ack_of_its_own_and_moves_no_position_back(
    autojump_clock: MockClock,
) -> None:
    positions = []
    first, rest = sending(at(7), at(3), at(4), at(9), pause=1), sending(at(9), at(10), pause=0.01)

    async def lost(peer: Peer) -> None:
        with trio.move_on_after(5):
            await first(peer)

    async with fake_gateway(lost, rest) as gateway, connecting(gateway) as client:
        for _ in range(5):
            await anext(client)
            positions.append(client.last_event_id)
        await trio.sleep(1)
    assert positions == [at(7), at(7), at(7), at(9), at(10)]
    assert sent(gateway, "resume") == ["", at(9)]
    assert sent(gateway, "ack") == [at(7), at(3), at(4), at(9), at(10)]


async def test_events_of_a_lost_connection_are_not_confirmed_on_the_next_one(
    autojump_clock: MockClock,
) -> None:
    async def first(peer: Peer) -> None:
        with trio.move_on_after(2):
            await sending(at(1), at(2))(peer)

    async with fake_gateway(first, sending()) as gateway, connecting(gateway) as client:
        await trio.sleep(20)
        await take(client, 2)
        client.seen(at(1))
        await trio.sleep(30)
    assert sent(gateway, "ack") == sent(gateway, "seen") == []
    assert set(gateway.confirmed) == {at(0)}


async def test_event_that_comes_again_is_confirmed_again(autojump_clock: MockClock) -> None:
    async def first(peer: Peer) -> None:
        with trio.move_on_after(1.1):
            await sending(at(3), at(5))(peer)

    async with fake_gateway(first, sending(at(3))) as gateway, connecting(gateway) as client:
        await take(client, 2)
        with trio.move_on_after(20):
            await take(client, 1)
            raise AssertionError
    assert sent(gateway, "ack") == [at(3)]


async def test_client_that_only_watches_confirms_nothing(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(sending(at(1))) as gateway,
        connecting(gateway, confirm=False) as client,
    ):
        await take(client, 1)
        await trio.sleep(30)
    assert sent(gateway, "ack") == gateway.confirmed == []
    assert gateway.received[0]["confirm"] is False  # of the message that resumes
    assert gateway.received[-1] == "ping"


async def test_leaving_the_block_sends_what_waits(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(sending(*map(at, range(1, 5)))) as gateway,
        connecting(gateway) as client,
    ):
        await take(client, 4)
        for number in (1, 2, 3):
            client.seen(at(number))
    assert sent(gateway, "ack") == [at(4)]
    assert sent(gateway, "seen") == [at(1), at(2), at(3)]


async def test_seen_is_told_at_once_and_no_faster_than_the_rate_limit_allows(
    autojump_clock: MockClock,
) -> None:
    ids = [at(number) for number in range(1, 31)]
    async with fake_gateway(sending(*ids)) as gateway, connecting(gateway) as client:
        first = await anext(client)
        await take(client, 29)
        client.seen(first)
        await trio.sleep(0.05)
        assert sent(gateway, "seen") == ids[:1]
        for event_id in ids[1:]:
            client.seen(event_id)
        await trio.sleep(1)
        assert 9 <= len(sent(gateway, "seen")) <= 12
        await trio.sleep(2.1)
        assert sent(gateway, "seen") == ids


async def test_event_without_an_id_cannot_be_seen(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        await peer.send(type="CART_SYNC", tenant_id=1, branch_id=1)
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        with pytest.raises(ValueError, match="event_id"):
            client.seen(await anext(client))


async def test_seen_of_an_earlier_connection_is_told_over_http_until_it_is_answered(
    autojump_clock: MockClock,
) -> None:
    requests: list[bytes] = []
    statuses = [503, 204]

    def losing(*ids: str) -> Callable[[Peer], Any]:
        async def script(peer: Peer) -> None:
            with trio.move_on_after(5):
                await sending(*ids)(peer)

        return script

    async with fake_gateway(losing(at(1)), losing(), losing(), sending()) as gateway:
        dialled = 0

        async def dial() -> trio.abc.Stream:
            nonlocal dialled
            dialled += 1
            if dialled in http:
                mine, other = trio.testing.memory_stream_pair()
                gateway._nursery.start_soon(answer, other)
                return mine
            return await gateway.dial()

        async def answer(stream: Any) -> None:
            data = b""
            while not data.endswith(b"}"):
                data += await stream.receive_some()
            requests.append(data)
            if status := statuses.pop(0):
                await stream.send_all(b"HTTP/1.1 %d Some reason\r\n\r\n" % status)

        http = {3, 5}
        async with connect(URL, "t", dial=dial, origin="https://app.example") as client:
            await take(client, 1)
            await trio.sleep(3.9)
            client.seen(at(1))  # as a message on a connection that ends before a pong
            await trio.sleep(60)
    assert sent(gateway, "seen") == [at(1)]
    assert len(requests) == 2
    head, _, body = requests[0].partition(b"\r\n\r\n")
    assert json.loads(body) == {"event_id": at(1)}
    lines = head.split(b"\r\n")
    assert lines[0] == b"POST /ws/receipts HTTP/1.1"
    assert {
        b"Host: gateway.example", b"Authorization: Bearer t", b"Origin: https://app.example",
        b"Content-Length: %d" % len(body),
    } <= set(lines)  # fmt: skip


async def test_seen_is_not_told_again_after_a_pong(autojump_clock: MockClock) -> None:
    async def first(peer: Peer) -> None:
        with trio.move_on_after(30):
            await sending(at(1))(peer)

    async with fake_gateway(first, sending()) as gateway, connecting(gateway) as client:
        client.seen(await anext(client))
        await trio.sleep(60)
    assert sent(gateway, "seen") == [at(1)]
    assert len(gateway.dialled) == 2


async def test_request_that_failed_is_repeated_after_the_next_pong(
    autojump_clock: MockClock,
) -> None:
    requests: list[float] = []
    answers = [
        b"HTTP/1.1 503 Service Unavailable\r\n\r\n",
        b"SSH-2.0-x\r\n",
        b"",
        None,
        b"HTTP/1.1 204 \r\n",
    ]
    async with fake_gateway(sending()) as gateway:

        async def dial() -> trio.abc.Stream:
            if not gateway.dialled:
                return await gateway.dial()
            requests.append(trio.current_time())
            if (answer := answers.pop(0)) is None:
                raise OSError("unreachable")
            mine, other = trio.testing.memory_stream_pair()
            await other.send_all(answer)
            await other.send_eof()
            return mine

        async with connect(URL, "t", dial=dial) as client:
            client.seen(at(1))
            await trio.sleep(200)
    assert [round(each) for each in requests] == [0, 25, 50, 75, 100]


def test_acks_are_for_events_of_the_gateway_and_for_each_stream() -> None:
    receipts = Receipts(confirm=True)
    receipts.begin(at(0))
    receipts.types = frozenset({TYPE})
    for event_id in (at(1), at(4, "0abc"), "own id of a backend", at(2), at(1)):
        receipts.take(TYPE, event_id)
    assert receipts.acks == [at(4, "0abc"), at(2), at(1)]
    receipts.acknowledged(at(2))
    assert receipts.acks == [at(4, "0abc"), at(1)]


def test_pong_shows_only_what_was_told_before_its_ping() -> None:
    seen = Seen()
    for pings in (0, 1):
        seen.add(at(pings))
        seen.told(at(pings), pings)
    seen.answered(1)
    seen.reconnected()
    assert seen.waiting == [at(1)]
