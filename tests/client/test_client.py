"""The client's behaviour, in virtual time, against a gateway in memory."""

import logging
import time
from collections.abc import Callable
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked
from trio_websocket import wrap_server_stream

from trio_gateway.client import Client, Presence, Refused, Status, connect
from trio_gateway.testing import make_jwt, make_payload

from .fakes import FakeGateway, Peer, closing, fake_gateway, hang_up, welcome

URL = "ws://gateway.example/ws/waiter"
SECRET = "x" * 32


def connecting(gateway: FakeGateway, token: Any = "t", **options: Any) -> Any:
    return connect(URL, token, dial=gateway.dial, **options)


async def numbers(client: Client, count: int) -> list[int]:
    return [(await anext(client)).data["n"] for _ in range(count)]


# Events and messages


async def test_events_arrive_unchanged(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit(last_event_id="0")
        await peer.publish(1)
        await peer.send(type="CART_SYNC", tenant_id=1, branch_id=1)
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        await client.wait_open()
        first, second = await anext(client), await anext(client)
    assert (first.type, first.event_id, first.data["n"]) == ("ROUND_READY", "1", 1)
    assert first.text.endswith('"event_id": "1"}')
    assert (second.type, second.event_id) == ("CART_SYNC", None)
    assert client.last_event_id == "1"


async def test_duplicate_event_is_not_returned_again(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        for number in (1, 2, 1, 2, 3):
            await peer.publish(number)
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        assert await numbers(client, 3) == [1, 2, 3]


async def test_messages_of_the_gateway_are_not_events_whatever_type_events_have(
    autojump_clock: MockClock,
) -> None:
    gaps: list[str] = []

    async def script(peer: Peer) -> None:
        await peer.admit()
        await peer.send(type="sectors_updated", sector_ids=[1])
        await peer.send_text("sectors_updated:1")
        await peer.send_text("[" * 100_000)
        await peer.publish(1, type="gap")
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway, on_gap=gaps.append) as client:
        assert (await anext(client)).type == "gap"
    assert gaps == []


async def test_gaps_are_reported_in_the_order_of_the_events(autojump_clock: MockClock) -> None:
    calls: list[Any] = []

    async def gap(why: str) -> None:
        await trio.sleep(1)
        calls.append(why)

    async def script(peer: Peer) -> None:
        await peer.admit(recovered=False, last_event_id="7")
        await peer.publish(8)
        await peer.send(type="gap")
        await peer.publish(9)
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway, on_gap=gap) as client:
        async for event in client:
            calls.append(event.data["n"])
            if event.data["n"] == 9:
                break
    assert calls == ["not_recovered", 8, "lost", 9]


async def test_last_event_id_is_that_of_the_last_returned_event(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit(last_event_id="0")
        await peer.publish(1)
        await peer.publish(2)
        await peer.stay()

    async with (
        fake_gateway(script) as gateway,
        connecting(gateway, last_event_id="before") as client,
    ):
        await client.wait_open()
        await trio.sleep(1)
        assert client.last_event_id == "before"
        await anext(client)
        assert client.last_event_id == "1"
    assert gateway.received[0] == {"type": "resume", "last_event_id": "before"}


# The credential


async def test_token_is_sent_only_in_a_header(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(welcome) as gateway,
        connecting(gateway, "secret", origin="https://app.example") as client,
    ):
        await client.wait_open()
    (headers,) = gateway.headers
    assert headers["authorization"] == "Bearer secret"
    assert headers["origin"] == "https://app.example"


@pytest.mark.parametrize(
    "url",
    [
        "redis://x", "ws://", "ws://u:p@x/ws/waiter", "wss://x/ws/diner?table_token=t",
        "wss://x/ws/waiter?ticket=", "ws://x:y/",
    ],
)  # fmt: skip
async def test_invalid_url_or_one_with_a_credential_is_an_error(url: str) -> None:
    with pytest.raises(ValueError):
        async with connect(url, "t"):
            raise AssertionError


async def test_provider_is_called_before_every_connect(autojump_clock: MockClock) -> None:
    asked: list[bool] = []

    async def provide(refused: bool) -> str:
        asked.append(refused)
        return f"t{len(asked)}"

    async with (
        fake_gateway(hang_up, closing(4001, "token revoked"), welcome) as gateway,
        connecting(gateway, provide) as client,
    ):
        await client.wait_open()
    assert asked == [False, False, True]
    assert [h["authorization"] for h in gateway.headers] == ["Bearer t1", "Bearer t2", "Bearer t3"]


async def test_failing_provider_is_called_again(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    results = iter([OSError("no backend"), "t"])
    statuses: list[Status] = []

    def provide(refused: bool) -> str:
        if isinstance(found := next(results), Exception):
            raise found
        return str(found)

    async with (
        fake_gateway(welcome) as gateway,
        connecting(gateway, provide, on_state=statuses.append) as client,
    ):
        await client.wait_open()
    assert len(gateway.dialled) == 1
    assert str(statuses[1].error) == "no backend"
    assert caplog.record_tuples == [
        ("trio_gateway.client", logging.WARNING, "the token provider failed")
    ]


@pytest.mark.parametrize("token", ["", "a b", "a\r\nX: y", "ü"])
async def test_impossible_token_is_refused_without_an_attempt(
    autojump_clock: MockClock, token: str
) -> None:
    async with fake_gateway(welcome) as gateway, connecting(gateway, token) as client:
        with pytest.raises(Refused) as refused:
            await anext(client)
    assert refused.value.code == 4001
    assert not token or token not in str(refused.value)
    assert gateway.dialled == []


async def test_same_token_after_a_refusal_is_final(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(closing(4001, "token expired")) as gateway,
        connecting(gateway) as client,
    ):
        with pytest.raises(Refused, match=r"^refused: 4001 AUTH_FAILED \(token expired\)$"):
            await client.wait_open()
        with pytest.raises(Refused):
            await anext(client)
    assert len(gateway.dialled) == 1


async def test_refused_fresh_tokens_are_tried_with_back_off(
    autojump_clock: MockClock,
) -> None:
    made = iter(range(1000))
    async with (
        fake_gateway(closing(4001)) as gateway,
        connecting(gateway, lambda refused: f"t{next(made)}"),
    ):
        await trio.sleep(600)
    assert gateway.dialled[1] == gateway.dialled[0]
    assert 20 < len(gateway.dialled) < 100


def renewing(*answers: Callable[[Peer], Any]) -> Callable[[Peer], Any]:
    """A script that admits the client and answers each renewal with the next function."""

    async def script(peer: Peer) -> None:
        await peer.admit()
        for answer in answers:
            while (message := await peer.receive()) == "ping":
                await peer.send(type="pong")
            assert message["type"] == "auth"
            await answer(peer)
        await peer.stay()

    return script


async def test_token_is_renewed_on_the_connection_before_it_expires(
    autojump_clock: MockClock,
) -> None:
    tokens = [make_jwt(SECRET, life=life) for life in (100, 200, 300)]
    given = iter(tokens)
    renewed: list[float] = []

    async def ok(peer: Peer) -> None:
        renewed.append(trio.current_time())
        await peer.send(type="auth_ok", expires_at=int(time.time()) + 200)

    async with (
        fake_gateway(renewing(ok, ok)) as gateway,
        connecting(gateway, lambda refused: next(given)) as client,
    ):
        await client.wait_open()
        await trio.sleep(250)
    sent = [each["token"] for each in gateway.received if each != "ping" and each["type"] == "auth"]
    assert sent == tokens[1:]
    assert renewed == [pytest.approx(80, abs=2), pytest.approx(80 + 160, abs=4)]
    assert len(gateway.dialled) == 1


async def test_provider_without_a_new_token_is_called_until_it_has_one(
    autojump_clock: MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    old, new = make_jwt(SECRET, life=1000), make_jwt(SECRET, life=5000)
    answers: list[Any] = [old, old, OSError(), "", new]

    def provide(refused: bool) -> str:
        if isinstance(found := answers.pop(0), Exception):
            raise found
        return str(found)

    async def ok(peer: Peer) -> None:
        await peer.send(type="auth_ok", expires_at=int(time.time()) + 10**6)

    async with fake_gateway(renewing(ok)) as gateway, connecting(gateway, provide) as client:
        await client.wait_open()
        await trio.sleep(5000)
    assert answers == []
    assert gateway.received[-1] == "ping"
    assert {"type": "auth", "token": new} in gateway.received
    assert len(caplog.records) == 1


async def test_refused_renewal_is_followed_by_another_token(
    autojump_clock: MockClock,
) -> None:
    asked: list[bool] = []

    def provide(refused: bool) -> str:
        asked.append(refused)
        return make_jwt(SECRET, life=100, sub=str(len(asked)))

    async def refuse(peer: Peer) -> None:
        await peer.close(4001, "token revoked")

    async with (
        fake_gateway(renewing(refuse), welcome) as gateway,
        connecting(gateway, provide) as client,
    ):
        await client.wait_open()
        await trio.sleep(81)
    assert asked[:3] == [False, False, True]
    assert len(gateway.dialled) == 2


async def test_refusal_during_a_renewal_marks_neither_token_as_refused(
    autojump_clock: MockClock,
) -> None:
    """The new token is presented once more, and the next refusal concerns that token."""
    offered = make_jwt(SECRET, life=100, sub="2")
    tokens = iter([make_jwt(SECRET, life=100), *[offered] * 3])

    async def refuse(peer: Peer) -> None:
        await peer.close(4001, "token revoked")

    async with (
        fake_gateway(renewing(refuse), closing(4001, "token revoked")) as gateway,
        connecting(gateway, lambda refused: next(tokens)) as client,
    ):
        with trio.fail_after(600), pytest.raises(Refused, match="token revoked"):
            await anext(client)
    assert gateway.headers[1]["authorization"] == f"Bearer {offered}"
    assert len(gateway.dialled) == 2


async def unanswered(peer: Peer) -> None:
    """The revocation cannot be looked up: the old token is valid until its expiry."""
    with trio.move_on_after(15):
        await peer.stay()
    await peer.close(4001, "token expired")


async def abort(peer: Peer) -> None:
    raise trio.BrokenResourceError


@pytest.mark.parametrize("answer", [unanswered, abort])
async def test_token_without_an_answer_is_not_marked_as_refused(
    autojump_clock: MockClock, answer: Callable[[Peer], Any]
) -> None:
    first, second = make_jwt(SECRET, life=100), make_jwt(SECRET, life=1000)
    tokens = iter([first, *[second] * 10])
    async with (
        fake_gateway(renewing(answer), welcome) as gateway,
        connecting(gateway, lambda refused: next(tokens)) as client,
    ):
        await trio.sleep(200)
        assert client.status.state == "open"
    presented = [headers["authorization"] for headers in gateway.headers]
    assert presented == [f"Bearer {first}", f"Bearer {second}"]


async def test_present_token_is_tried_again_after_a_refused_renewal(
    autojump_clock: MockClock,
) -> None:
    """The refusal concerned the other token."""
    first = make_jwt(SECRET, life=1000)
    tokens = iter([first, make_jwt(SECRET, life=1000, sub="2"), *[first] * 10])
    async with (
        fake_gateway(renewing(lambda peer: peer.close(4001, "bad signature")), welcome) as gateway,
        connecting(gateway, lambda refused: next(tokens)) as client,
    ):
        await trio.sleep(900)
        assert client.status.state == "open"
    assert [headers["authorization"] for headers in gateway.headers] == [f"Bearer {first}"] * 2


async def test_repeated_answer_to_a_renewal_loses_no_token(autojump_clock: MockClock) -> None:
    tokens = iter([make_jwt(SECRET, life=100), *[make_jwt(SECRET, life=1000)] * 5])

    async def twice(peer: Peer) -> None:
        for _ in range(2):
            await peer.send(type="auth_ok", expires_at=int(time.time()) + 1000)
        await peer.close(4001, "token revoked")

    async with (
        fake_gateway(renewing(twice)) as gateway,
        connecting(gateway, lambda refused: next(tokens)) as client,
    ):
        with trio.fail_after(600), pytest.raises(Refused, match="token revoked"):
            await anext(client)
    assert len(gateway.dialled) == 1


@pytest.mark.parametrize("skew", [-600, 0, 600])
@pytest.mark.parametrize("life", [120, 900])
@pytest.mark.parametrize("says_iat", [True, False], ids=["iat", "no iat"])
async def test_renewal_does_not_depend_on_the_devices_clock(
    autojump_clock: MockClock,
    monkeypatch: pytest.MonkeyPatch,
    skew: float,
    life: int,
    says_iat: bool,
) -> None:
    began = 1_790_000_000

    def true_time() -> int:
        return began + int(trio.current_time())

    def provide(refused: bool) -> str:
        minted.append(true_time())
        iat: Any = true_time() if says_iat else ...
        return make_jwt(SECRET, iat=iat, exp=true_time() + life, jti=str(len(minted)))

    async def script(peer: Peer) -> None:
        """Like the gateway: close at the expiry of the last accepted token."""
        await peer.admit()
        expires = minted[-1] + life
        while True:
            with trio.move_on_at(expires - began) as scope:
                message = await peer.receive()
            if scope.cancelled_caught:
                await peer.close(4001, "token expired")
                return
            if message == "ping":
                await peer.send(type="pong")
            else:
                expires = minted[-1] + life
                await peer.send(type="auth_ok", expires_at=expires)

    minted: list[int] = []
    monkeypatch.setattr(time, "time", lambda: began + trio.current_time() + skew)
    async with fake_gateway(script) as gateway, connecting(gateway, provide):
        await trio.sleep(4 * life)
    # A short token without iat, and a clock that is behind: only an expiry can tell.
    assert len(gateway.dialled) == (2 if not says_iat and life == 120 and skew < 0 else 1)
    assert 4 <= len(minted) < (20 if says_iat else 40)


async def test_clock_that_is_ahead_does_not_cause_endless_renewals(
    autojump_clock: MockClock,
) -> None:
    made = iter(range(10**6))

    async def ok(peer: Peer) -> None:
        await peer.send(type="auth_ok", expires_at=int(time.time()) + 1)

    def provide(refused: bool) -> str:
        return make_jwt(SECRET, iat=..., exp=int(time.time()) + 1, sub=str(next(made)))

    async with fake_gateway(renewing(*[ok] * 1000)) as gateway, connecting(gateway, provide):
        await trio.sleep(600)
    assert 2 < next(made) < 70


async def test_provider_is_called_with_refused_until_a_token_is_accepted(
    autojump_clock: MockClock,
) -> None:
    asked: list[bool] = []

    def provide(refused: bool) -> str:
        asked.append(refused)
        return f"t{len(asked)}"

    async with (
        fake_gateway(closing(4001), closing(1011), closing(1011, after=1), welcome) as gateway,
        connecting(gateway, provide),
    ):
        await trio.sleep(60)
    assert asked == [False, True, True, False]


# Sectors


async def test_refresh_sectors_returns_the_answer(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        assert await peer.receive() == {"type": "refresh_sectors"}
        await peer.send(type="sectors_updated", sector_ids=[5, 6])
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        with pytest.raises(ConnectionError, match="not connected: connecting"):
            await client.refresh_sectors()
        await client.wait_open()
        assert await client.refresh_sectors() == (5, 6)


async def test_refresh_sectors_without_an_answer_is_an_error(autojump_clock: MockClock) -> None:
    async def leave(peer: Peer) -> None:
        await peer.admit()
        await peer.receive()

    async with fake_gateway(welcome) as gateway, connecting(gateway) as client:
        await client.wait_open()
        with pytest.raises(TimeoutError):
            await client.refresh_sectors()
    async with fake_gateway(leave) as gateway, connecting(gateway) as client:
        await client.wait_open()
        with pytest.raises(ConnectionError, match="ended"):
            await client.refresh_sectors()


# Presence

WAITER = {"user_id": "21", "endpoint": "waiter", "sector_ids": [5], "connections": 1, "since": 1.5}
ADMIN = WAITER | {"endpoint": "admin", "sector_ids": []}
TABLE = {"session_id": 456, "table_id": 10, "connections": 2}


async def test_presence_is_the_whole_state_after_each_change(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        assert await peer.receive() == {"type": "watch_presence", "branch_id": 1}
        await peer.send(type="presence", branch_id=1, joined=[TABLE], left=[])  # of another watch
        await peer.send(type="presence", branch_id=1, users=[WAITER, ADMIN], sessions=[TABLE])
        await peer.send(type="presence", branch_id=2, users=[], sessions=[])
        await trio.sleep(1)
        await peer.send(type="presence", branch_id=1, joined=[], left=[ADMIN, TABLE])
        await trio.sleep(1)
        await peer.send(
            type="presence", branch_id=1, joined=[WAITER | {"sector_ids": [6]}], left=[]
        )
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        with client.watch_presence(1) as watch:
            assert await anext(watch) == Presence(1, (WAITER, ADMIN), (TABLE,))
            assert await anext(watch) == Presence(1, (WAITER,), ())
            assert await anext(watch) == Presence(1, (WAITER | {"sector_ids": [6]},), ())


async def test_presence_is_watched_again_after_a_reconnect(autojump_clock: MockClock) -> None:
    def present(*users: Any) -> Any:
        async def script(peer: Peer) -> None:
            await peer.admit()
            assert await peer.receive() == {"type": "watch_presence", "branch_id": 1}
            await peer.send(type="presence", branch_id=1, users=users, sessions=[])
            await trio.sleep(1)

        return script

    scripts = (present(WAITER), present(ADMIN), welcome)
    async with fake_gateway(*scripts) as gateway, connecting(gateway) as client:
        with client.watch_presence(1) as watch:
            assert (await anext(watch)).users == (WAITER,)
            assert (await anext(watch)).users == (ADMIN,)


async def test_slow_reader_of_presence_gets_the_newest_state(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        await peer.receive()
        await peer.send(type="presence", branch_id=1, users=[], sessions=[])
        for user in range(1000):
            item = WAITER | {"user_id": str(user)}
            await peer.send(type="presence", branch_id=1, joined=[item], left=[])
        await peer.stay()

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        with client.watch_presence(1) as watch:
            await trio.sleep(5)
            assert len((await anext(watch)).users) == 1000
            with trio.move_on_after(5) as nothing:
                await anext(watch)
    assert nothing.cancelled_caught


async def test_branch_is_watched_until_the_block_is_left_and_may_be_watched_again(
    autojump_clock: MockClock,
) -> None:
    async with fake_gateway(welcome) as gateway, connecting(gateway) as client:
        await client.wait_open()
        with client.watch_presence(1):
            await trio.sleep(1)
            with pytest.raises(ValueError, match="branch 1 is watched already"):
                client.watch_presence(1).__enter__()
        with client.watch_presence(1):
            await trio.sleep(1)
        await trio.sleep(1)
    asked = [each["type"] for each in gateway.received if "branch_id" in each]
    assert asked == ["watch_presence", "unwatch_presence", "watch_presence", "unwatch_presence"]


async def test_watching_presence_ends_when_the_client_is_refused(autojump_clock: MockClock) -> None:
    async with fake_gateway(closing(4003)) as gateway, connecting(gateway) as client:
        with client.watch_presence(1) as watch, pytest.raises(Refused):
            await anext(watch)
        with client.watch_presence(1) as watch, pytest.raises(Refused):
            await anext(watch)


# Liveness


@pytest.mark.parametrize(
    ("intervals", "every"), [((60, 90), 25), ((20, 90), 10), ((60, 8.0), 4), ((0, 0), 0.5)]
)
async def test_client_pings_as_often_as_the_gateway_asks(
    autojump_clock: MockClock, intervals: tuple[float, float], every: float
) -> None:
    async def script(peer: Peer) -> None:
        peer.intervals = intervals
        await welcome(peer)

    async with fake_gateway(script) as gateway, connecting(gateway) as client:
        await client.wait_open()
        await trio.sleep(10 * every + 0.1)
    assert gateway.received.count("ping") == 10


async def test_part_of_a_message_extends_the_wait_for_a_pong(autojump_clock: MockClock) -> None:
    """On a link of 4 KB/s an event may take longer than the timeout of a ping."""

    async def dial() -> trio.abc.Stream:
        client, server = trio.testing.memory_stream_pair()
        nursery.start_soon(serve, server)
        return client

    async def serve(stream: Any) -> None:
        dialled.append(trio.current_time())
        async with trio.open_nursery() as serving:
            request = await wrap_server_stream(serving, stream)
            peer = Peer(await request.accept(), [], [])
            await peer.admit()
            await peer.receive()  # the ping
            text = make_payload(event_id="1", data="x" * 40_000)
            frame = b"\x81\x7e" + len(text).to_bytes(2, "big") + text
            for at in range(0, len(frame), 4096):
                await stream.send_all(frame[at : at + 4096])
                await trio.sleep(3)
            await peer.stay()

    dialled: list[float] = []
    async with trio.open_nursery() as nursery:
        async with connect(URL, "t", dial=dial) as client:
            assert (await anext(client)).event_id == "1"
        nursery.cancel_scope.cancel()
    assert dialled == [0]


async def test_client_pings_a_silent_gateway(autojump_clock: MockClock) -> None:
    async with fake_gateway(welcome) as gateway, connecting(gateway) as client:
        await client.wait_open()
        await trio.sleep(101)
    assert gateway.received[1:] == ["ping"] * 4
    assert len(gateway.dialled) == 1


async def test_ping_without_an_answer_replaces_the_socket(autojump_clock: MockClock) -> None:
    async def mute(peer: Peer) -> None:
        await peer.admit()
        await peer.stay(answering=False)

    statuses: list[Status] = []
    async with (
        fake_gateway(mute, welcome) as gateway,
        connecting(gateway, on_state=statuses.append) as client,
    ):
        await client.wait_open()
        await trio.sleep(40)
    assert (statuses[2].code, statuses[2].reason) == (1006, "no answer to a ping")
    assert statuses[2].retry_in is not None
    assert gateway.dialled[1] == pytest.approx(35 + statuses[2].retry_in)


async def test_message_from_before_the_ping_is_no_answer_to_it(
    autojump_clock: MockClock,
) -> None:
    async def mute(peer: Peer) -> None:
        await peer.admit()
        await peer.receive()  # the ping
        await peer.send(type="gap")
        await peer.stay(answering=False)

    statuses: list[Status] = []
    async with (
        fake_gateway(mute, welcome) as gateway,
        connecting(gateway, on_state=statuses.append) as client,
    ):
        await client.wait_open()
        await trio.sleep(45)
    assert statuses[2].reason == "no answer to a ping"


async def test_slow_reader_keeps_its_connection_and_every_event(
    autojump_clock: MockClock,
) -> None:
    """While the reader is busy nothing is read, no answer to a ping either."""

    async def script(peer: Peer) -> None:
        await peer.admit()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(peer.stay)
            for number in range(20):
                await peer.publish(number)

    async with fake_gateway(script) as gateway, connecting(gateway, buffer=2) as client:
        found = []
        for _ in range(20):
            found += await numbers(client, 1)
            await trio.sleep(60)
    assert found == list(range(20))
    assert len(gateway.dialled) == 1
    assert gateway.received.count("ping") > 40


@pytest.mark.parametrize("reader", ["quick", "slow"])
async def test_stuck_gateway_replaces_the_socket(autojump_clock: MockClock, reader: str) -> None:
    class Stuck(trio.abc.Stream):
        """A socket whose peer stops reading after the admission."""

        def __init__(self, stream: trio.abc.Stream) -> None:
            self._stream = stream
            self.stuck = False

        async def send_all(self, data: Any) -> None:
            if self.stuck:
                await trio.sleep_forever()
            await self._stream.send_all(data)

        async def wait_send_all_might_not_block(self) -> None:
            raise AssertionError

        async def receive_some(self, max_bytes: int | None = None) -> Any:
            return await self._stream.receive_some(max_bytes)

        async def aclose(self) -> None:
            await self._stream.aclose()

    streams: list[Stuck] = []

    async def dial() -> trio.abc.Stream:
        streams.append(Stuck(await gateway.dial()))
        return streams[-1]

    async def script(peer: Peer) -> None:
        await peer.admit()
        if reader == "slow":
            for number in range(2):
                await peer.publish(number)
        await peer.stay()

    async with (
        fake_gateway(script, welcome) as gateway,
        connect(URL, "t", dial=dial, buffer=2) as client,
    ):
        await client.wait_open()
        await wait_all_tasks_blocked()
        streams[0].stuck = True
        await trio.sleep(25 + 10 + 1.1)
        if reader == "slow":  # one of them waits for the reader, after the position to resume from
            assert await numbers(client, 2) == [0, 1]
            await trio.sleep(1.1)
    assert len(streams) == 2


# The end of a socket, and the next attempt


@pytest.mark.parametrize("code", [1002, 1003, 1007, 1008, 1009, 4003])
async def test_codes_that_a_retry_cannot_fix_are_final(
    autojump_clock: MockClock, code: int
) -> None:
    statuses: list[Status] = []
    async with (
        fake_gateway(closing(code, "why")) as gateway,
        connecting(gateway, on_state=statuses.append) as client,
    ):
        with pytest.raises(Refused) as refused:
            await anext(client)
    assert (refused.value.code, refused.value.reason) == (code, "why")
    assert statuses[-1] == Status("refused", code, "why")
    assert len(gateway.dialled) == 1


@pytest.mark.parametrize("code", [1000, 1001, 1006, 1011, 1013, 4008, 4009, 4999])
async def test_other_codes_are_retried_with_back_off_up_to_half_a_minute(
    autojump_clock: MockClock, code: int
) -> None:
    statuses: list[Status] = []
    script = hang_up if code == 1006 else closing(code)
    async with fake_gateway(script) as gateway, connecting(gateway, on_state=statuses.append):
        await trio.sleep(300)
    waits = [status.retry_in for status in statuses if status.state == "waiting"]
    assert {status.code for status in statuses if status.state == "waiting"} == {code}
    for wait, bound in zip(waits, [1, 2, 4, 8, 16, *[30] * 100], strict=False):
        assert wait is not None
        assert 0 <= wait <= bound
    assert max(filter(None, waits)) > 10
    assert len(gateway.dialled) == len(waits)


async def test_retry_hint_is_respected(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(closing(1001, "retry in 3.2s"), welcome) as gateway,
        connecting(gateway) as client,
    ):
        await client.wait_open()
    assert gateway.dialled == [0, pytest.approx(3.2)]


async def test_connection_that_lasted_resets_the_back_off(autojump_clock: MockClock) -> None:
    statuses: list[Status] = []
    scripts = [*[hang_up] * 8, closing(1011, after=11), closing(1011, after=11), welcome]
    async with fake_gateway(*scripts) as gateway, connecting(gateway, on_state=statuses.append):
        await trio.sleep(300)
    waits = [status.retry_in for status in statuses if status.state == "waiting"]
    assert len(waits) == 10
    assert all(wait is not None and wait <= 1 for wait in waits[8:])


async def test_rate_limit_is_followed_by_a_cool_down(autojump_clock: MockClock) -> None:
    async with (
        fake_gateway(closing(4029, "rate limited"), welcome) as gateway,
        connecting(gateway) as client,
    ):
        await client.wait_open()
    assert 30 <= gateway.dialled[1] <= 60


@pytest.mark.parametrize("status", [400, 401, 403, 404, 426, 431])
async def test_permanently_refused_upgrade_is_final(autojump_clock: MockClock, status: int) -> None:
    async with fake_gateway(status) as gateway, connecting(gateway) as client:
        with pytest.raises(Refused, match=f"^refused: {status} \\(HTTP {status}\\)$") as refused:
            await anext(client)
    assert refused.value.code == status
    assert len(gateway.dialled) == 1


async def test_401_is_followed_by_another_token(autojump_clock: MockClock) -> None:
    """The answer of a proxy that checks tokens."""
    asked: list[bool] = []

    def provide(refused: bool) -> str:
        asked.append(refused)
        return f"t{len(asked)}"

    async with fake_gateway(401, welcome) as gateway, connecting(gateway, provide) as client:
        await client.wait_open()
    assert asked == [False, True]
    assert gateway.dialled == [0, 0]


@pytest.mark.parametrize("status", [429, 503])
async def test_retry_after_is_respected(autojump_clock: MockClock, status: int) -> None:
    async def dial() -> trio.abc.Stream:
        dialled.append(trio.current_time())
        client, server = trio.testing.memory_stream_pair()
        nursery.start_soon(answer, server)
        return client

    async def answer(stream: trio.abc.Stream) -> None:
        await stream.receive_some()
        head = f"HTTP/1.1 {status} No\r\nRetry-After: 40\r\nContent-Length: 0\r\n\r\n"
        await stream.send_all(head.encode())

    dialled: list[float] = []
    async with trio.open_nursery() as nursery:
        async with connect(URL, "t", dial=dial):
            await trio.sleep(100)
        nursery.cancel_scope.cancel()
    first, second, third, *_ = dialled
    assert 40 <= second - first <= 41
    assert 40 <= third - second <= 42


@pytest.mark.parametrize("status", [408, 429, 502, 503, 504])
async def test_temporarily_refused_upgrade_is_tried_again(
    autojump_clock: MockClock, status: int
) -> None:
    async with fake_gateway(status, status, welcome) as gateway, connecting(gateway) as client:
        await client.wait_open()
    assert len(gateway.dialled) == 3


async def test_server_that_is_not_a_gateway_is_tried_again_and_reported(
    autojump_clock: MockClock,
) -> None:
    answers = [b"SSH-2.0-x\r\n\r\n", b"", None]
    statuses: list[Status] = []

    async with trio.open_nursery() as nursery:

        async def answer(stream: trio.abc.Stream) -> None:
            reply = answers.pop(0) if answers else b""
            await stream.receive_some()
            if reply is None:
                await trio.sleep_forever()
            else:
                await stream.send_all(reply)
                await stream.aclose()

        async def dial() -> trio.abc.Stream:
            ours, theirs = trio.testing.memory_stream_pair()
            nursery.start_soon(answer, theirs)
            return ours

        async with connect(URL, "t", dial=dial, on_state=statuses.append):
            await trio.sleep(25)
        nursery.cancel_scope.cancel()
    waiting = [status for status in statuses if status.state == "waiting"]
    assert [status.reason for status in waiting[:3]] == [
        "the server there does not speak WebSocket",
        "",
        "not connected in 15 s",
    ]
    assert isinstance(waiting[2].error, TimeoutError)


async def test_missing_network_is_tried_again(autojump_clock: MockClock) -> None:
    outcomes: list[Exception] = [OSError("unreachable"), trio.BrokenResourceError()]

    async with fake_gateway(welcome) as gateway:

        async def dial() -> trio.abc.Stream:
            if outcomes:
                raise outcomes.pop(0)
            return await gateway.dial()

        async with connect(URL, "t", dial=dial) as client:
            await client.wait_open()


async def test_client_resumes_from_the_last_received_event(autojump_clock: MockClock) -> None:
    async def first(peer: Peer) -> None:
        await peer.admit(last_event_id="0")
        await peer.publish(1)
        await peer.publish(2)

    async def second(peer: Peer) -> None:
        await peer.admit(last_event_id="2")
        await peer.publish(2)
        await peer.publish(3)
        await peer.stay()

    async with fake_gateway(first, second) as gateway, connecting(gateway) as client:
        assert await numbers(client, 3) == [1, 2, 3]
    resumes = [message["last_event_id"] for message in gateway.received if message != "ping"]
    assert resumes == ["", "2"]


async def test_client_without_events_resumes_from_the_position_of_the_answer(
    autojump_clock: MockClock,
) -> None:
    async with (
        fake_gateway(closing(4009, after=1), welcome) as gateway,
        connecting(gateway),
    ):
        await trio.sleep(5)
    resumes = [message["last_event_id"] for message in gateway.received if message != "ping"]
    assert resumes == ["", "0"]


async def test_slow_reader_gets_a_gap_notice(autojump_clock: MockClock) -> None:
    """Admission must not wait for the reader, or the gap that comes with it could be lost."""
    gaps: list[str] = []

    async def full(peer: Peer) -> None:
        await peer.admit()
        for number in range(3):
            await peer.publish(number)

    async def forgetful(peer: Peer) -> None:
        await peer.admit(recovered=False)
        await peer.publish(9)
        await peer.stay()

    async with (
        fake_gateway(full, forgetful) as gateway,
        connecting(gateway, buffer=1, on_gap=gaps.append) as client,
    ):
        await trio.sleep(100)
        assert await numbers(client, 4) == [0, 1, 2, 9]
    assert gaps == ["not_recovered"]
    assert len(gateway.dialled) == 2


# Leaving


async def test_leaving_the_block_sends_a_close_frame(autojump_clock: MockClock) -> None:
    codes: list[int | None] = []

    async def script(peer: Peer) -> None:
        try:
            await welcome(peer)
        finally:
            codes.append(peer.close_code)

    async with fake_gateway(script) as gateway:
        async with connecting(gateway) as client:
            await client.wait_open()
        await wait_all_tasks_blocked()
    assert codes == [1000]
    assert trio.current_time() == 0


async def test_leaving_takes_half_a_second_if_the_gateway_does_not_answer(
    autojump_clock: MockClock,
) -> None:
    async def dial() -> trio.abc.Stream:
        stream = await gateway.dial()
        streams.append(stream)
        return stream

    streams: list[Any] = []
    async with fake_gateway(welcome) as gateway:
        async with connect(URL, "t", dial=dial) as client:
            await client.wait_open()
            streams[0].send_stream.send_all_hook = trio.sleep_forever
        assert trio.current_time() == 0.5


async def test_exception_of_the_block_is_raised_unchanged(autojump_clock: MockClock) -> None:
    async def listen() -> None:
        async with connecting(gateway) as client:
            await client.wait_open()
            raise KeyError

    async with fake_gateway(welcome) as gateway:
        with pytest.raises(KeyError):
            await listen()


async def test_cancelled_block_is_left_like_any_other(autojump_clock: MockClock) -> None:
    async with fake_gateway(welcome) as gateway:
        with trio.move_on_after(3) as scope:
            async with connecting(gateway) as client:
                async for _ in client:
                    raise AssertionError
        assert scope.cancelled_caught


@pytest.mark.parametrize("state", ["connecting", "open", "waiting", "refused"])
async def test_exception_of_on_state_is_raised_unchanged(
    autojump_clock: MockClock, state: str
) -> None:
    def buggy(status: Status) -> None:
        if status.state == state:
            raise KeyError

    async def listen() -> None:
        async with connecting(gateway, on_state=buggy) as client:
            await anext(client)

    async with fake_gateway(closing(1011, after=1), closing(4003)) as gateway:
        with pytest.raises(KeyError):
            await listen()


async def test_block_can_be_left_with_unread_events(autojump_clock: MockClock) -> None:
    async def script(peer: Peer) -> None:
        await peer.admit()
        for number in range(5):
            await peer.publish(number)

    statuses: list[Status] = []
    async with (
        fake_gateway(script) as gateway,
        connecting(gateway, buffer=1, on_state=statuses.append) as client,
    ):
        await client.wait_open()
        await trio.sleep(1)
    assert [status.state for status in statuses] == ["connecting", "open"]


async def test_iteration_ends_with_the_block(autojump_clock: MockClock) -> None:
    async with fake_gateway(welcome) as gateway:
        async with connecting(gateway) as client:
            await client.wait_open()
        with pytest.raises(trio.ClosedResourceError):
            await anext(client)
