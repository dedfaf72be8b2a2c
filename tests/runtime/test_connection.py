"""A connection: what it is held to, how it ends, and what a slow one gets."""

from collections.abc import Callable, Sequence

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from trio_gateway.core.close_codes import Close
from trio_gateway.core.frames import PING_FRAME, boundary, frame, text_frame
from trio_gateway.core.frames import PONG as PONG_OPCODE
from trio_gateway.core.messages import Command, Message, Reauthenticate, Resume
from trio_gateway.runtime.connection import Connection, ConnectionLimits
from trio_gateway.runtime.hub import Hub
from trio_gateway.runtime.socket import Ping, Pong, ProtocolViolation
from trio_gateway.testing import FakeSocket, make_principal

INFINITE = float("inf")
PATIENT = ConnectionLimits(stale_after=INFINITE, receive_timeout=INFINITE)
PONG = '{"type":"pong"}'


def make(terms: ConnectionLimits = PATIENT) -> Connection:
    return Connection(make_principal(), terms)


async def start(
    nursery: trio.Nursery, connection: Connection, socket: FakeSocket, hub: Hub | None = None
) -> None:
    nursery.start_soon(connection.run, socket, Hub() if hub is None else hub)
    await wait_all_tasks_blocked()


class SlowToClose(FakeSocket):
    """Its client takes ten seconds to answer the close frame."""

    async def close(self, code: int, reason: str) -> None:
        await trio.sleep(10)
        await super().close(code, reason)


@given(st.lists(st.sampled_from([0, 5, 125, 126, 300, 65_535, 65_536]), max_size=4), st.data())
def test_fake_socket_shows_the_texts_that_are_written_in_whole(
    sizes: list[int], data: st.DataObject
) -> None:
    socket = FakeSocket()
    frames = [text_frame(b"x" * size) for size in sizes]
    ends = [len(b"".join(frames[:n])) for n in range(len(frames) + 1)]
    written = data.draw(st.integers(0, ends[-1]) | st.sampled_from(ends))

    socket.try_write(b"".join(frames)[:written])

    assert [len(text) for text in socket.texts] == sizes[: sum(end <= written for end in ends[1:])]


# What a client is held to


async def test_silent_client_is_closed_when_stale(autojump_clock: MockClock) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits())

    await client.run(socket, Hub())

    assert trio.current_time() == 60
    assert socket.closed is Close.HEARTBEAT_TIMEOUT
    assert socket.reason == "no heartbeat"


@pytest.mark.parametrize("message", ["ping", "anything", "", "{", Ping(b"")])
async def test_any_message_resets_the_heartbeat_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery, message: str | Ping
) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits())
    await start(nursery, client, socket)

    await trio.sleep(59)
    await socket.client.send(message)
    await trio.sleep(59)
    assert not client.ending
    await trio.sleep(2)

    assert client.code == Close.HEARTBEAT_TIMEOUT
    assert client.ended_at == 59 + 60


async def test_pong_is_not_a_heartbeat(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits())
    await start(nursery, client, socket)

    for _ in range(5):
        await trio.sleep(11)
        await socket.client.send(Pong())
    await trio.sleep(11)

    assert client.code == Close.HEARTBEAT_TIMEOUT
    assert client.ended_at == 60


async def test_connection_that_receives_nothing_is_closed_after_the_receive_timeout(
    autojump_clock: MockClock,
) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits(stale_after=INFINITE, receive_timeout=90))

    await client.run(socket, Hub())

    assert trio.current_time() == 90
    assert socket.closed is Close.HEARTBEAT_TIMEOUT
    assert socket.reason == "nothing received"


async def test_pong_resets_the_receive_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits(stale_after=INFINITE, receive_timeout=90))
    await start(nursery, client, socket)

    await trio.sleep(80)
    await socket.client.send(Pong())
    await trio.sleep(100)

    assert client.code == Close.HEARTBEAT_TIMEOUT
    assert client.ended_at == 80 + 90


async def test_message_that_arrives_with_the_deadline_is_in_time(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits())
    await start(nursery, client, socket)

    socket.client.to_gateway.send_nowait("ping")  # its reader is woken, but has not run yet
    autojump_clock.jump(60)
    await wait_all_tasks_blocked()
    assert socket.texts == [PONG]
    await trio.sleep(100)

    assert client.code == Close.HEARTBEAT_TIMEOUT
    assert client.ended_at == 60 + 60


@pytest.mark.parametrize("silent", [True, False])
async def test_connection_is_closed_when_its_credential_expires(
    autojump_clock: MockClock, nursery: trio.Nursery, silent: bool
) -> None:
    socket = FakeSocket()
    client = Connection(make_principal(), ConnectionLimits(), expires_at=50.5)
    await start(nursery, client, socket)

    for _ in range(60):
        await trio.sleep(1)
        if not silent:
            await socket.client.send("ping")

    assert socket.closed is Close.AUTH_FAILED
    assert socket.reason == "token expired"
    assert client.ended_at == 50.5


@pytest.mark.parametrize("renewed", [15, 25])
async def test_renewed_credential_expires_at_its_own_time(
    autojump_clock: MockClock, nursery: trio.Nursery, renewed: float
) -> None:
    socket = FakeSocket()
    client = Connection(make_principal(), ConnectionLimits(), expires_at=20)
    await start(nursery, client, socket)

    await trio.sleep(10)
    client.renew(renewed)
    await trio.sleep(20)

    assert client.code == Close.AUTH_FAILED
    assert client.ended_at == renewed


async def test_credential_renewed_with_a_past_expiry_expires_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    client = make()
    await start(nursery, client, FakeSocket())

    await trio.sleep(10)
    client.renew(5)
    await wait_all_tasks_blocked()

    assert client.code == Close.AUTH_FAILED
    assert client.ended_at == 10


async def test_credential_can_be_renewed_before_the_connection_is_served(
    autojump_clock: MockClock,
) -> None:
    client = make()
    client.renew(7)

    await client.run(FakeSocket(), Hub())

    assert client.code == Close.AUTH_FAILED
    assert trio.current_time() == 7


async def test_credential_that_expires_while_it_is_renewed_ends_the_connection(
    autojump_clock: MockClock,
) -> None:
    async def answer(connection: Connection, message: Message) -> None:
        await trio.sleep(10)
        raise AssertionError

    socket = FakeSocket()
    client = Connection(make_principal(), ConnectionLimits(), answer, expires_at=5)
    await socket.client.send('{"type":"auth","token":"t"}')

    await client.run(socket, Hub())

    assert client.code == Close.AUTH_FAILED
    assert trio.current_time() == 5


async def test_21st_message_within_a_second_ends_the_connection(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    texts: list[str | Ping | Pong] = ["ping"] * 17
    for each in [*texts, "x", Ping(b""), Pong()]:
        await socket.client.send(each)
    await trio.sleep(0.999)
    assert not client.ending
    await socket.client.send("ping")
    await wait_all_tasks_blocked()

    assert socket.closed is Close.RATE_LIMITED
    assert client.messages == 18
    assert len(socket.texts) == 17


async def test_20_messages_a_second_are_always_allowed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)
    assert not client.rate_limited

    for _ in range(10):
        for _ in range(20):
            await socket.client.send("ping")
        await trio.sleep(1)

    assert client.rate_limited
    assert not client.ending
    assert client.messages == 200


# Messages and answers


@pytest.mark.parametrize(
    "text",
    [
        "ping",
        '{"type":"ping"}',
        ' { "type" : "ping" } ',
        '{"at":1,"type":"ping","nested":{"type":"auth"}}',
        '{"type":"\\u0070ing"}',
    ],
)
async def test_ping_is_answered(
    autojump_clock: MockClock, nursery: trio.Nursery, text: str
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    await socket.client.send(text)
    await wait_all_tasks_blocked()

    assert socket.texts == [PONG]
    assert client.messages == 1


@pytest.mark.parametrize("text", ["", "pong", "{", "[]", "null", '{"type":1}', "ü", '"ping"'])
async def test_other_text_is_counted_and_ignored(
    autojump_clock: MockClock, nursery: trio.Nursery, text: str
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    await socket.client.send(text)
    await wait_all_tasks_blocked()

    assert not socket.written
    assert not client.ending
    assert client.messages == 1


async def test_ping_frame_is_answered_with_its_payload(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    await socket.client.send(Ping(b"are you there"))
    await socket.client.send(Ping(b""))
    await wait_all_tasks_blocked()

    assert socket.pongs == [b"are you there", b""]
    assert client.messages == 0


async def test_messages_that_need_more_are_passed_to_the_answer_callback(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    passed: list[Message] = []

    async def answer(connection: Connection, message: Message) -> None:
        passed.append(message)
        connection.send(b"answer")
        await trio.lowlevel.checkpoint()

    socket = FakeSocket()
    await start(nursery, Connection(make_principal(), PATIENT, answer), socket)
    for text in (
        "refresh_sectors",
        '{"type":"refresh_sectors"}',
        '{"type":"auth","token":"t"}',
        '{"type":"resume","last_event_id":"7"}',
        "something else",
    ):
        await socket.client.send(text)
    await wait_all_tasks_blocked()

    assert passed == [
        Command.REFRESH_SECTORS,
        Command.REFRESH_SECTORS_JSON,
        Reauthenticate("t"),
        Resume("7"),
    ]
    assert socket.texts == ["answer"] * 4


async def test_messages_that_need_more_are_ignored_without_an_answer_callback(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    await socket.client.send("refresh_sectors")
    await wait_all_tasks_blocked()

    assert not socket.written
    assert not client.ending


# How it ends


@pytest.mark.parametrize(
    "close",
    [
        Close.PROTOCOL_ERROR,
        Close.INVALID_DATA,
        Close.UNSUPPORTED_DATA,
        Close.MESSAGE_TOO_BIG,
    ],
)
async def test_protocol_violation_closes_with_its_code(
    autojump_clock: MockClock, close: Close
) -> None:
    hub, socket, client = Hub(), FakeSocket(), make()
    await socket.client.misbehave(ProtocolViolation(close, "the rule"))

    await client.run(socket, hub)

    assert (socket.closed, socket.reason) == (close, "the rule")
    assert hub.closed == {close: 1}


@pytest.mark.parametrize("code", [1000, 1001, 1005, 3000, 4999])
async def test_close_code_is_the_one_that_the_client_sent(
    autojump_clock: MockClock, code: int
) -> None:
    hub, socket, client = Hub(), FakeSocket(), make()
    await socket.client.leave(code, "bye")

    await client.run(socket, hub)

    assert (client.code, client.close_reason) == (code, "bye")
    assert hub.closed == {code: 1}


async def test_client_lost_during_a_read_has_1006(autojump_clock: MockClock) -> None:
    socket, client = FakeSocket(), make()
    await socket.client.leave(Close.ABNORMAL)

    await client.run(socket, Hub())

    assert client.code == 1006
    assert socket.aborted


async def test_client_lost_during_a_write_has_1006(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket, other = Hub(), FakeSocket(), FakeSocket()
    client, other_client = make(), make()
    await start(nursery, client, socket, hub)
    await start(nursery, other_client, other, hub)

    socket.aborted = True
    for each in (client, other_client):
        each.send(b"hello")
    await wait_all_tasks_blocked()

    assert client.code == 1006
    assert list(hub.connections) == [other_client]
    assert other.texts == ["hello"]


async def test_client_lost_while_its_outbox_waits_has_1006(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket, other = Hub(), FakeSocket(room=1), FakeSocket()
    client, other_client = make(), make()
    await start(nursery, client, socket, hub)
    await start(nursery, other_client, other, hub)

    client.send(b"hello")
    await wait_all_tasks_blocked()
    socket.aborted = True
    socket.read(1)
    await wait_all_tasks_blocked()

    assert client.code == 1006
    assert list(hub.connections) == [other_client]
    assert not hub.leaving
    assert not other_client.ending


async def test_first_close_reason_wins(autojump_clock: MockClock, nursery: trio.Nursery) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)

    client.close(Close.GOING_AWAY, "retry in 3.2s")
    client.close(Close.AUTH_FAILED, "revoked")
    await socket.client.leave(Close.NORMAL)
    await wait_all_tasks_blocked()

    assert (socket.closed, socket.reason) == (Close.GOING_AWAY, "retry in 3.2s")
    assert client.code == Close.GOING_AWAY


async def test_connection_can_be_closed_before_it_is_served(autojump_clock: MockClock) -> None:
    hub, socket, client = Hub(), FakeSocket(), make()
    client.close(Close.GOING_AWAY, "shutdown")

    await client.run(socket, hub)

    assert trio.current_time() == 0
    assert (socket.closed, socket.reason) == (Close.GOING_AWAY, "shutdown")
    assert (len(hub), len(hub.leaving)) == (0, 0)


async def test_nothing_is_written_before_the_connection_is_served_or_after_its_close(
    autojump_clock: MockClock,
) -> None:
    socket, client = FakeSocket(), make()
    client.send(b"before")

    async with trio.open_nursery() as nursery:
        await start(nursery, client, socket)
        client.send(b"during")
        client.close(Close.NORMAL)
        client.send(b"after")
        client.ping(trio.current_time())
    client.send(b"much later")

    assert socket.texts == ["during"]
    assert socket.pings == 0


async def test_bug_while_answering_ends_with_1011_and_propagates(autojump_clock: MockClock) -> None:
    async def answer(connection: Connection, message: Message) -> None:
        raise ZeroDivisionError

    hub, socket = Hub(), FakeSocket()
    client = Connection(make_principal(), PATIENT, answer)
    await socket.client.send("refresh_sectors")

    with pytest.raises(ZeroDivisionError):
        await client.run(socket, hub)

    assert socket.closed is Close.INTERNAL_ERROR
    assert socket.reason == "internal error"
    assert hub.closed == {Close.INTERNAL_ERROR: 1}
    assert (len(hub), len(hub.leaving)) == (0, 0)


async def test_bug_beside_a_writer_ends_with_1011_and_propagates(
    autojump_clock: MockClock,
) -> None:
    async def answer(connection: Connection, message: Message) -> None:
        connection.send(b"x" * 100)
        await trio.sleep(1)
        if connection.messages > 1:
            raise ZeroDivisionError

    hub, socket = Hub(), FakeSocket(room=10)
    client = Connection(make_principal(), PATIENT, answer)
    for _ in range(2):
        await socket.client.send("refresh_sectors")

    with pytest.raises(ZeroDivisionError):
        await client.run(socket, hub)

    assert client.code == Close.INTERNAL_ERROR
    assert (len(hub), len(hub.leaving)) == (0, 0)


# One task is all that a client costs that keeps up


async def test_client_that_keeps_up_has_one_task_until_it_is_slow(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    before = trio.lowlevel.current_statistics().tasks_living
    await start(nursery, client, socket)
    for _ in range(3):
        await socket.client.send("ping")
        client.send(b"a")
        await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before + 1

    socket.room = 0
    client.send(b"b")
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before + 2
    socket.read(INFINITE)
    await socket.client.send("ping")
    await wait_all_tasks_blocked()
    assert trio.lowlevel.current_statistics().tasks_living == before + 1
    assert sorted(socket.texts) == sorted([*["a", PONG] * 3, "b", PONG])


@pytest.mark.parametrize("room", [0, INFINITE], ids=["a writer starts", "nothing starts"])
async def test_answer_is_not_cut_short_when_the_reader_changes_its_scope(
    autojump_clock: MockClock, nursery: trio.Nursery, room: float
) -> None:
    """The message is received in the same step; the answer takes a while."""
    answered: list[Message] = []

    async def answer(connection: Connection, message: Message) -> None:
        await trio.sleep(1)
        answered.append(message)

    socket, client = FakeSocket(room), Connection(make_principal(), PATIENT, answer)
    await start(nursery, client, socket)
    for token in ("0", "1"):
        socket.client.to_gateway.send_nowait(f'{{"type":"auth","token":"{token}"}}')
    client.send(b"to a client that does not read")
    await trio.sleep(5)

    assert answered == [Reauthenticate("0"), Reauthenticate("1")]
    socket.read(INFINITE)
    await wait_all_tasks_blocked()
    assert socket.texts == ["to a client that does not read"]


async def test_slow_client_is_written_to_while_a_message_is_answered(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """A database that takes long must not delay the events of the client that asked."""

    async def answer(connection: Connection, message: Message) -> None:
        await trio.sleep(10)
        connection.send(b"answer")

    socket, client = FakeSocket(room=0), Connection(make_principal(), PATIENT, answer)
    await start(nursery, client, socket)
    await socket.client.send("refresh_sectors")
    await trio.sleep(1)
    client.send(b"event")
    socket.read(INFINITE)
    await wait_all_tasks_blocked()

    assert trio.current_time() == 1
    assert socket.texts == ["event"]
    await trio.sleep(10)
    assert socket.texts == ["event", "answer"]


@pytest.mark.parametrize("first", ["the message", "the old deadline"])
async def test_answer_is_not_cut_short_by_a_deadline_that_has_moved(
    autojump_clock: MockClock, nursery: trio.Nursery, first: str
) -> None:
    answered: list[Message] = []

    async def answer(connection: Connection, message: Message) -> None:
        await trio.sleep(10)
        answered.append(message)

    async def ask_at(when: float) -> None:
        await trio.sleep_until(when)
        await socket.client.send("refresh_sectors")

    socket, client = FakeSocket(), Connection(make_principal(), ConnectionLimits(), answer)
    if first == "the message":
        nursery.start_soon(ask_at, 60.0)
        await wait_all_tasks_blocked()
    await start(nursery, client, socket)
    if first == "the old deadline":
        nursery.start_soon(ask_at, 60.0)
    await trio.sleep(50)
    await socket.client.send("ping")  # the deadline is 110 now
    await trio.sleep(25)

    assert answered == [Command.REFRESH_SECTORS]
    await trio.sleep_until(119.9)
    assert socket.closed is None
    await trio.sleep_until(120.1)
    assert socket.closed is Close.HEARTBEAT_TIMEOUT


async def test_token_that_now_expires_sooner_ends_it_sooner(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make(ConnectionLimits())
    await start(nursery, client, socket)
    await trio.sleep(50)
    await socket.client.send("ping")
    await wait_all_tasks_blocked()
    client.renew(70.0)
    await trio.sleep_until(69.9)
    assert socket.closed is None
    await trio.sleep_until(70.1)
    assert socket.closed == Close.AUTH_FAILED
    assert socket.reason == "token expired"


async def test_last_words_reach_a_client_whose_writer_had_yet_to_start(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=0), make()
    await start(nursery, client, socket)
    client.send(b"last words")
    client.close(Close.GOING_AWAY)
    await trio.sleep(1)
    socket.read(INFINITE)
    await wait_all_tasks_blocked()

    assert socket.texts == ["last words"]
    assert socket.closed is Close.GOING_AWAY


async def test_cancelled_connection_ends_with_1006_and_no_close_frame(
    autojump_clock: MockClock,
) -> None:
    hub, socket, client = Hub(), FakeSocket(), make()

    async with trio.open_nursery() as nursery:
        await start(nursery, client, socket, hub)
        nursery.cancel_scope.cancel()

    assert socket.closed is Close.ABNORMAL  # which no socket sends
    assert client.code == Close.ABNORMAL
    assert client.ended_at == 0
    assert (len(hub), len(hub.leaving)) == (0, 0)


@pytest.mark.parametrize("room", [0, 3])
@pytest.mark.parametrize("action", ["send", "ping", "start", "close", "abort"])
async def test_cancelled_connection_can_be_used_at_every_step(
    autojump_clock: MockClock, action: str, room: int
) -> None:
    started: list[int] = []

    async def task(step: int) -> None:
        started.append(step)
        await trio.sleep_forever()

    act: dict[str, Callable[[Connection, int], None]] = {
        "send": lambda client, _: client.send(b"hello"),  # which starts the writer
        "ping": lambda client, _: client.ping(trio.current_time()),
        "start": lambda client, step: client.start_task(task, step),
        "close": lambda client, _: client.close(Close.GOING_AWAY),
        "abort": lambda client, _: client.abort(),
    }
    for step in [*range(10)] * 8:  # tasks of one step run in either order
        hub, socket, client = Hub(), FakeSocket(room=room), make()
        serving = trio.CancelScope()

        async def serve() -> None:
            with serving:  # noqa: B023 - ends in the same round
                await client.run(socket, hub)  # noqa: B023 - ends in the same round

        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            await wait_all_tasks_blocked()
            serving.cancel()
            for _ in range(step):
                await trio.lowlevel.checkpoint()
            act[action](client, step)

        assert client.ending
        assert (len(hub), len(hub.leaving)) == (0, 0)
    assert 9 not in started


async def test_bug_in_a_background_task_ends_with_1011(autojump_clock: MockClock) -> None:
    async def task() -> None:
        await trio.sleep(1)
        raise ZeroDivisionError

    hub, socket, client = Hub(), FakeSocket(), make()
    with pytest.RaisesGroup(ZeroDivisionError, flatten_subgroups=True):
        async with trio.open_nursery() as nursery:
            await start(nursery, client, socket, hub)
            client.start_task(task)

    assert socket.closed is Close.INTERNAL_ERROR
    assert hub.closed == {Close.INTERNAL_ERROR: 1}


async def test_connection_that_is_cancelled_within_a_frame_is_aborted(
    autojump_clock: MockClock,
) -> None:
    socket, client = FakeSocket(room=3), make()

    async with trio.open_nursery() as nursery:
        await start(nursery, client, socket)
        client.send(b"hello")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()

    assert socket.closed is None
    assert socket.aborted
    assert client.code == Close.ABNORMAL


async def test_connection_leaves_the_hub_before_a_slow_close(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, client, socket = Hub(), make(), SlowToClose()
    await start(nursery, client, socket, hub)

    client.close(Close.NORMAL)
    await wait_all_tasks_blocked()
    assert (len(hub), hub.leaving) == (0, {client})
    assert not hub.members(client.audiences)

    await hub.wait_empty()
    assert trio.current_time() == 10
    assert socket.closed is Close.NORMAL


async def test_second_close_during_a_slow_close_changes_nothing(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    client, socket = make(), SlowToClose()
    await start(nursery, client, socket)

    client.close(Close.NORMAL)
    await trio.sleep(1)
    client.close(Close.GOING_AWAY)
    client.renew(0)
    await trio.sleep(10)

    assert socket.closed is Close.NORMAL


async def test_aborted_connection_ends_at_once(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, client, socket = Hub(), make(), FakeSocket(room=3)
    await start(nursery, client, socket, hub)
    client.send(b"hello")
    await wait_all_tasks_blocked()

    client.abort()
    await hub.wait_empty()

    assert trio.current_time() == 0
    assert client.code == Close.ABNORMAL
    assert socket.aborted


async def test_connection_aborted_before_it_is_served_ends_with_1006(
    autojump_clock: MockClock,
) -> None:
    client = make()
    client.abort()

    await client.run(FakeSocket(), Hub())

    assert client.code == Close.ABNORMAL


# Slow clients


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_outbox_and_writer_exist_only_while_needed(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(), make()
    await start(nursery, client, socket)
    before = tasks()

    client.send(b"hello")
    await wait_all_tasks_blocked()
    assert (client._outbox, client.waiting_bytes, tasks()) == (None, 0, before)

    socket.room = 0
    client.send(b"hello")
    await wait_all_tasks_blocked()
    assert (client.waiting_bytes, tasks()) == (7, before + 1)

    socket.read(INFINITE)
    await wait_all_tasks_blocked()
    assert (client.waiting_bytes, tasks()) == (0, before)
    assert socket.texts == ["hello", "hello"]

    socket.room = 1
    client.send(b"again")
    await wait_all_tasks_blocked()
    assert (client.waiting_bytes, tasks()) == (6, before + 1)


async def test_waiting_frames_are_sent_in_one_write(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=0), make()
    await start(nursery, client, socket)
    for _ in range(50):
        client.send(b"hello")
    before = socket.writes
    assert before == 1  # the first one; then it is known that the kernel takes nothing

    socket.read(INFINITE)
    await wait_all_tasks_blocked()

    assert socket.writes == before + 1
    assert socket.texts == ["hello"] * 50


async def test_partial_write_is_finished_before_any_other_frame(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=3), make()
    await start(nursery, client, socket)

    client.send(b"event")
    await socket.client.send(Ping(b"payload"))
    await wait_all_tasks_blocked()
    client.ping(trio.current_time())
    client.send(b"another")
    client.close(Close.GOING_AWAY)
    await trio.sleep(1)
    assert socket.closed is None
    socket.read(INFINITE)
    await wait_all_tasks_blocked()

    assert bytes(socket.written) == (
        text_frame(b"event") + frame(PONG_OPCODE, b"payload") + PING_FRAME + text_frame(b"another")
    )
    assert socket.closed is Close.GOING_AWAY


async def test_waiting_frames_have_two_seconds_when_the_connection_ends(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket, client = Hub(), FakeSocket(room=0), make()
    await start(nursery, client, socket, hub)

    client.send(b"hello")
    client.close(Close.GOING_AWAY)
    await hub.wait_empty()

    assert trio.current_time() == 2
    assert socket.closed is Close.GOING_AWAY


async def test_connection_that_ends_within_a_frame_is_aborted(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket, client = Hub(), FakeSocket(room=3), make()
    await start(nursery, client, socket, hub)

    client.send(b"hello")
    client.close(Close.GOING_AWAY)
    await hub.wait_empty()

    assert trio.current_time() == 2
    assert socket.closed is None
    assert socket.aborted
    assert client.code == Close.GOING_AWAY


@pytest.mark.parametrize("taken", [0, 3, 7])
async def test_outbox_over_its_bytes_is_closed_as_slow(
    autojump_clock: MockClock, nursery: trio.Nursery, taken: int
) -> None:
    """``taken`` of the first frame: nothing, a part, all of it."""
    socket = FakeSocket(room=taken)
    client = make(ConnectionLimits(outbox_bytes=14 + 7 - taken, write_timeout=10))
    await start(nursery, client, socket)

    for text in (b"event", b"waits", b"waits"):
        client.write(text_frame(text), 1, trio.current_time())
    await wait_all_tasks_blocked()
    assert not client.ending  # exactly at its bound
    client.write(text_frame(b""), 1, trio.current_time())
    assert client.code == Close.SLOW_CONSUMER
    await trio.sleep(9)
    socket.read(INFINITE)
    await wait_all_tasks_blocked()

    assert socket.texts == (["event"] if taken else [])
    assert bytes(socket.written) == (text_frame(b"event") if taken else b"")
    assert socket.closed is Close.SLOW_CONSUMER
    assert socket.reason == "too slow: outbox is full"


async def test_outbox_over_its_messages_is_closed_as_slow(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=0), make(ConnectionLimits(outbox_messages=10))
    await start(nursery, client, socket)

    for _ in range(10):
        client.send(b"waits")
    assert not client.ending
    client.send(b"one too many")

    assert client.code == Close.SLOW_CONSUMER


async def test_first_write_alone_can_be_over_the_bound(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket, client = Hub(), FakeSocket(room=10), make(ConnectionLimits(outbox_bytes=1000))
    await start(nursery, client, socket, hub)

    data = text_frame(bytes(500)) + text_frame(bytes(2000))
    client.write(data, 2, trio.current_time())
    await trio.sleep(5)
    assert client.code == Close.SLOW_CONSUMER
    socket.read(INFINITE)
    await hub.wait_empty()

    assert bytes(socket.written) == text_frame(bytes(500))
    assert socket.closed is Close.SLOW_CONSUMER
    assert trio.current_time() == 5


async def test_client_that_catches_up_is_not_slow(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=0), make(ConnectionLimits(outbox_messages=10))
    await start(nursery, client, socket)

    for _ in range(1000):
        for _ in range(10):
            client.send(b"event")
        socket.read(10 * 7 - 1)  # all but a byte
        await wait_all_tasks_blocked()
        socket.read(1)
        await wait_all_tasks_blocked()

    assert not client.ending
    assert len(socket.texts) == 10_000


async def test_frames_that_the_kernel_took_do_not_count(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = FakeSocket(room=0), make(ConnectionLimits(outbox_messages=10))
    await start(nursery, client, socket)

    for _ in range(10):
        client.send(b"event")
    socket.read(9 * 7)
    await wait_all_tasks_blocked()
    for _ in range(9):
        client.send(b"event")

    assert not client.ending


@pytest.mark.parametrize("taken", [0, 3, 7])
async def test_connection_whose_bytes_are_not_accepted_in_time_is_aborted(
    autojump_clock: MockClock, nursery: trio.Nursery, taken: int
) -> None:
    hub, socket = Hub(), FakeSocket(room=taken)
    client = make(ConnectionLimits(write_timeout=10))
    await start(nursery, client, socket, hub)

    await trio.sleep(5)
    client.send(b"event")
    client.send(b"waits")
    await trio.sleep(9)
    assert not client.ending
    await hub.wait_empty()

    assert trio.current_time() == 5 + 10
    assert client.code == Close.SLOW_CONSUMER
    assert client.close_reason == "too slow: no byte accepted"
    assert socket.aborted
    assert socket.closed is None
    assert len(socket.written) == taken


async def test_nothing_is_written_to_an_aborted_socket(
    autojump_clock: MockClock,
) -> None:
    class Strict(FakeSocket):
        async def send_some(self, head: Callable[[], memoryview]) -> int:
            assert not self.aborted
            return await super().send_some(head)

    async with trio.open_nursery() as nursery:
        for room in (0, 3):
            client = make(ConnectionLimits(write_timeout=10))
            await start(nursery, client, Strict(room))
            client.send(b"event")
            client.send(b"waits")

    assert trio.current_time() == 10


async def test_slow_but_steady_reader_is_not_aborted(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    socket, client = (
        FakeSocket(room=0),
        make(ConnectionLimits(write_timeout=1.5, stale_after=INFINITE, receive_timeout=INFINITE)),
    )
    await start(nursery, client, socket)

    client.send(b"x" * 100)
    for _ in range(102):
        await trio.sleep(1)
        socket.read(1)
    await wait_all_tasks_blocked()

    assert not client.ending
    assert socket.texts == ["x" * 100]


async def test_rest_of_a_frame_after_the_discard_has_the_write_timeout(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub, socket = Hub(), FakeSocket(room=3)
    client = make(ConnectionLimits(write_timeout=10, outbox_bytes=10))
    await start(nursery, client, socket, hub)

    client.send(b"event")
    await trio.sleep(4)
    client.send(b"too much")
    await hub.wait_empty()

    assert trio.current_time() == 10
    assert socket.aborted
    assert socket.closed is None
    assert client.code == Close.SLOW_CONSUMER


async def test_client_that_reads_after_the_outbox_was_discarded_gets_the_close(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    """The writer is woken, and before it runs, what it was to write is discarded."""
    for _ in range(20):  # Trio runs the tasks that are ready in random order
        hub, socket, client = Hub(), FakeSocket(room=0), make(ConnectionLimits(outbox_bytes=10))
        await start(nursery, client, socket, hub)
        client.send(b"waits")
        await wait_all_tasks_blocked()
        client.send(b"too much")
        socket.read(INFINITE)
        await hub.wait_empty()
        assert socket.closed is Close.SLOW_CONSUMER
        assert socket.texts in ([], ["waits", "too much"])


Step = list[int] | int | str
STEPS = st.lists(
    st.lists(st.integers(0, 300), max_size=4)  # joined frames of these sizes
    | st.integers(0, 1000)  # the client reads so many bytes
    | st.sampled_from(["ping frame", "ping", "gateway pings"]),
    max_size=25,
)


@given(steps=STEPS, bound=st.integers(0, 3000), room=st.integers(0, 1000))
@settings(deadline=None)
def test_any_writes_and_reads_yield_the_frames_in_order_up_to_the_discard(
    steps: Sequence[Step], bound: int, room: int
) -> None:
    async def scenario() -> None:
        socket = FakeSocket(room)
        client = make(ConnectionLimits(outbox_bytes=bound, rate_limit=100))
        sent = b""
        discarded_from: int | None = None
        async with trio.open_nursery() as nursery:
            await start(nursery, client, socket)
            for step in steps:
                match step:
                    case "ping frame":
                        await socket.client.send(Ping(b"payload"))
                        data = frame(PONG_OPCODE, b"payload")
                    case "ping":
                        await socket.client.send("ping")
                        data = text_frame(PONG.encode())
                    case "gateway pings":
                        client.ping(trio.current_time())
                        data = PING_FRAME
                    case int():
                        socket.read(step)
                        data = b""
                    case list():
                        data = b"".join(text_frame(b"x" * size) for size in step)
                        client.write(data, len(step), trio.current_time())
                sent += data
                if client.ending:
                    break
                await wait_all_tasks_blocked()
                if client.ending:
                    break
                assert client.waiting_bytes == len(sent) - len(socket.written) <= bound
            if client.ending:
                discarded_from = boundary(sent, len(socket.written))
            await wait_all_tasks_blocked()
            socket.read(INFINITE)
            await wait_all_tasks_blocked()
            client.close(Close.NORMAL)
        assert bytes(socket.written) == sent[:discarded_from]
        assert socket.closed is (Close.NORMAL if discarded_from is None else Close.SLOW_CONSUMER)

    trio.run(scenario, clock=MockClock(autojump_threshold=0))
