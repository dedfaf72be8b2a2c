"""Several processes on one Redis: who is alive, and what they tell each other."""

import json
import time
from typing import Any

import msgspec
import redis
import trio

from tests.support.gateways import Running, admitted, closed, metrics, receive_event, serving, until
from trio_gateway.cluster.building import ClusterParts
from trio_gateway.cluster.control import MOST_HANDLED, Control
from trio_gateway.cluster.questions import Answers
from trio_gateway.core.control_messages import Disconnect, Node, SectorsChanged


def cluster_of(gateway: Running) -> ClusterParts:
    found = gateway.app.parts.cluster
    assert found is not None
    return found


def closed_by(answers: Any) -> dict[str, int]:
    return {name: msgspec.json.decode(each)["closed"] for name, each in answers.by_node.items()}


async def alive(*gateways: Running) -> list[str]:
    """Wait until all know all; returns their names."""
    registries = [cluster_of(each).registry for each in gateways]
    names = {each.name for each in registries}

    def all_know_all() -> bool:
        for each in registries:
            each.beat_soon()
        return all(each.nodes.keys() == names for each in registries)

    await until(all_know_all)
    return sorted(names)


async def test_processes_know_each_other_until_they_stop(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with serving(redis_url, "direct", ws_cluster=True) as one:
        async with serving(redis_url, "direct", ws_cluster=True) as other:
            names = await alive(one, other)
            assert len(names) == 2
            found = await cluster_of(one).registry.read()
            assert sorted(found) == names
            states: Any = backend.hgetall("{gateway}:nodes:states")
            assert json.loads(states[names[0].encode()]).keys() == {
                "name", "version", "started_at", "draining", "connections", "lag", "shards",
            }  # fmt: skip
        [name] = await cluster_of(one).registry.read()
        await until(lambda: len(cluster_of(one).registry.nodes) == 1)
        assert name == cluster_of(one).registry.name


async def test_process_that_ends_without_a_word_is_counted_once(
    redis_url: str, backend: "redis.Redis"
) -> None:
    seconds, _ = backend.time()
    backend.zadd("{gateway}:nodes", {"killed-1-aaaa": (seconds - 68) * 1000})
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        assert sum(cluster_of(each).registry.lost for each in (one, other)) == 1
    async with serving(redis_url, "direct", ws_cluster=True) as later:
        await alive(later)
        assert cluster_of(later).registry.lost == 0


async def test_an_order_disconnects_on_all_processes(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "asgi", ws_cluster=True) as other,
        admitted(one.staff_url("waiter", sub="21", jti="a")) as first,
        admitted(other.staff_url("waiter", sub="21", jti="b")) as second,
        admitted(other.staff_url("waiter", sub="21", tenant_id=2)) as stranger,
        admitted(other.diner_url(session_id=456)) as diner,
    ):
        await alive(one, other)
        control = cluster_of(one).control
        answers = await control.order("disconnect", Disconnect(1, user_id=21, reason="shift\n"))
        assert sorted(closed_by(answers).values()) == [1, 1]
        assert answers.complete
        assert await closed(first) == await closed(second) == (4001, "shift")
        answers = await control.order("disconnect", Disconnect(1, session_id=456))
        assert sum(closed_by(answers).values()) == 1
        assert await closed(diner) == (4001, "disconnected by the backend")
        assert (await control.order("refresh", SectorsChanged(1, 21))).complete
        async with admitted(other.staff_url("waiter", sub="21", jti="c")) as again:
            answers = await control.order("disconnect", Disconnect(1, jti="c"))
            assert sum(closed_by(answers).values()) == 1
            assert (await closed(again))[0] == 4001
        await stranger.send_message("ping")
        assert await stranger.get_message() == '{"type":"pong"}'


class Question(msgspec.Struct):
    wait: float = 0.0


def answer_as(control: Control, answer: Any, seconds: float = 0) -> None:
    async def handler(question: Question) -> Any:
        await trio.sleep(seconds or question.wait)
        if answer is None:
            raise ValueError
        return answer

    control.handle("test", Question, handler)


async def test_who_does_not_answer_is_missing(redis_url: str) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        here, there = cluster_of(one), cluster_of(other)
        answer_as(here.control, "x" * 1_000_000)
        unknown = await here.control.ask("test", Question())
        assert unknown.missing == unknown.unknown == [there.registry.name]
        answer_as(there.control, "y" * 1_000_000)
        both = await here.control.ask("test", Question())
        assert both.complete
        assert [len(each) for each in both.by_node.values()] == [1_000_002] * 2
        with trio.fail_after(4):
            late = await here.control.ask("test", Question(5), timeout=1)
        assert len(late.missing) == 2
        answer_as(there.control, None)
        failed = await here.control.ask("test", Question())
        assert failed.missing == [there.registry.name]
        assert not failed.unknown


async def test_an_asker_that_was_paused_reads_the_answers_that_came_meanwhile(
    redis_url: str,
) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        here, there = cluster_of(one).control, cluster_of(other).control

        async def pause(_question: Question) -> int:
            await until(lambda: all(each.expected for each in here._questions.waiting.values()))
            time.sleep(0.6)
            return 1

        there.handle("test", Question, pause)
        answer_as(here, 1)
        assert (await here.ask("test", Question(), timeout=0.3)).complete


async def test_questions_and_answers_outlive_their_connection(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with (
        serving(redis_url, "direct", ws_cluster=True) as one,
        serving(redis_url, "direct", ws_cluster=True) as other,
    ):
        await alive(one, other)
        here, there = cluster_of(one).control, cluster_of(other).control

        async def cut(_question: Question | None = None) -> int:
            """Cut all connections; what is sent in the next moment waits for Redis, and is cut."""
            backend.client_pause(300, all=False)
            nursery.start_soon(kill)
            return 1

        async def kill() -> None:
            await trio.sleep(0.1)
            backend.client_kill_filter(_type="normal", skipme=True)

        async with trio.open_nursery() as nursery:
            answer_as(here, 1)
            answer_as(there, 1)
            await cut()
            assert (await here.ask("test", Question())).complete
            there.handle("test", Question, cut)
            assert (await here.ask("test", Question())).complete


async def test_a_process_that_stops_is_not_waited_for(redis_url: str) -> None:
    async with serving(redis_url, "direct", ws_cluster=True) as one:
        answer_as(cluster_of(one).control, 1)
        found: list[Answers] = []

        async def ask() -> None:
            found.append(await cluster_of(one).control.ask("test", Question(), timeout=10))

        async with trio.open_nursery() as nursery:
            async with serving(redis_url, "direct", ws_cluster=True) as other:
                await alive(one, other)
                answer_as(cluster_of(other).control, 1, seconds=10)
                nursery.start_soon(ask)
                await until(lambda: cluster_of(other).control._handled)
                other.stop.set()
            with trio.fail_after(5):
                await until(lambda: found)
        assert found[0].complete
        assert found[0].by_node.keys() == {cluster_of(one).registry.name}


async def test_a_crowd_of_questions_is_refused_and_counted(redis_url: str) -> None:
    async with serving(redis_url, "direct", ws_cluster=True) as gateway:
        await alive(gateway)
        control = cluster_of(gateway).control
        may_answer = trio.Event()
        complete: list[bool] = []

        async def answer(_: Question) -> int:
            await may_answer.wait()
            return 1

        async def ask() -> None:
            complete.append((await control.ask("test", Question(), timeout=20)).complete)

        control.handle("test", Question, answer)

        async with trio.open_nursery() as nursery:
            for asked in range(1, MOST_HANDLED + 1):
                nursery.start_soon(ask)
                if not asked % 10:  # those that ask at once share the two seconds of a command
                    await until(lambda: control._handled == asked)  # noqa: B023 - awaited here
            refused = await control.ask("test", Question(), timeout=0.1)
            assert not refused.complete
            may_answer.set()
        assert complete == [True] * MOST_HANDLED
        assert (await metrics(gateway.port))["control_refused_total"] == 1


async def test_messages_that_are_none_are_ignored(redis_url: str, backend: "redis.Redis") -> None:
    async with serving(redis_url, "direct", ws_cluster=True) as gateway:
        await alive(gateway)
        name = cluster_of(gateway).registry.name
        for channel in ("channel:gateway:control", f"channel:gateway:control:{name}"):
            for message in (
                b"\xff", b"{}", b"[" * 100_000,
                b'{"type":"ask"}', b'{"type":"ordered","order":"x"}',
                b'{"type":"answer","id":"x","node":"x"}', b'{"type":"left","node":"x"}',
                b'{"type":"ask","id":"x","asker":"a b","kind":"x","request":{}}',
                b'{"type":"ask","id":"x","asker":"a","kind":"disconnect","request":{}}',
            ):  # fmt: skip
                backend.publish(channel, message)
        invalid = await cluster_of(gateway).control.order("disconnect", Question())
        assert invalid.missing == [name]
        assert (await cluster_of(gateway).control.order("refresh", SectorsChanged(1, 21))).complete


async def test_services_on_two_databases_of_a_server_do_not_hear_each_other(
    redis_url: str, backend: "redis.Redis"
) -> None:
    settings = {"ws_cluster": True, "ws_presence_grace": 0.0}
    async with (
        serving(f"{redis_url}/0", "direct", **settings) as foreign,
        serving(f"{redis_url}/1", "direct", **settings) as one,
        serving(f"{redis_url}/1", "direct", **settings) as another,
        admitted(one.staff_url("admin", roles=["ADMIN"])) as admin,
    ):
        await alive(one, another)
        asked: list[Running] = []
        for gateway in (foreign, one, another):

            async def handler(_: Question, gateway: Running = gateway) -> None:
                asked.append(gateway)

            cluster_of(gateway).control.handle("test", Question, handler)
        assert (await cluster_of(one).control.ask("test", Question())).complete
        assert foreign not in asked
        assert len(asked) == 2
        await admin.send_message('{"type":"watch_presence","branch_id":1}')
        assert (await receive_event(admin))["sessions"] == []
        async with admitted(foreign.diner_url(session_id=1)):
            await until(lambda: backend.hlen("{gateway}:online:1") == 1)
            async with admitted(another.diner_url(session_id=2)):
                [joined] = (await receive_event(admin))["joined"]
                assert joined["session_id"] == 2
        heard: Any = backend.pubsub_numsub(
            "channel:gateway:placement", "channel:gateway:1:placement"
        )
        assert [number for _, number in heard] == [1, 2]


async def test_without_the_settings_there_is_nothing(
    redis_url: str, backend: "redis.Redis"
) -> None:
    async with serving(redis_url, "direct") as gateway:
        assert gateway.app.parts.cluster is None
        channels: Any = backend.pubsub_channels("channel:gateway:control*")
        assert channels == []
        assert backend.keys("{gateway}*") == []


def test_a_node_is_read_with_what_it_says() -> None:
    assert msgspec.json.decode(b'{"name":"a","new":1}', type=Node) == Node("a")
