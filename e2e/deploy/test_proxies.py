"""Clients come through nginx and HAProxy as they do without."""

import base64
import json
import re
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import trio

from tests.support.api_keys import publish, write_keys
from tests.support.gateways import (
    JWT_SECRET,
    admitted,
    closed,
    connect,
    free_port,
    http,
    receive_event,
    until,
    wait,
)
from tests.support.sockets import make_head
from tests.support.stopwatch import Stopwatch
from trio_gateway.testing import make_jwt
from trio_gateway.web.api.publish import MAX_BYTES

from .proxies import IDLE, PROXIES, behind, require

pytestmark = pytest.mark.deploy


@pytest.fixture(params=sorted(PROXIES))
def proxy(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    require(name.partition(" ")[0])
    return name


async def test_events_and_close_codes_come_through_and_pings_keep_the_silent(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        async with connect(f"ws://127.0.0.1:{at.port}/ws/waiter?token=nonsense") as client:
            assert (await closed(client))[0] == 4001
        async with admitted(at.url(sub="1")) as client:
            await trio.sleep(2.5 * IDLE)  # says nothing; the gateway pings
            at.publish(1)
            assert (await receive_event(client))["marker"] == 1


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
async def test_clients_of_a_gateway_that_ends_resume_at_the_other(
    proxy: str, redis_url: str, tmp_path: Path, how: signal.Signals
) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        async with connect(at.url(sub="1")) as client:
            await client.send_message('{"type":"resume","last_event_id":""}')
            await receive_event(client)
            for n in (1, 2):
                at.publish(n)
            seen = [await receive_event(client) for _ in range(2)]
            holders = [await holds_a_client(port) for port in at.ports]
            assert sum(holders) == 1
            ended = at.gateways[holders.index(True)]
            ended.send_signal(how)
            ended.wait(10)
            code, _ = await closed(client)
            assert code == (1001 if how is signal.SIGTERM else 1006)
        at.publish(3)
        async with connect(at.url(sub="1")) as client:
            place = seen[-1]["event_id"]
            await client.send_message(json.dumps({"type": "resume", "last_event_id": place}))
            answer = await receive_event(client)
            assert answer["recovered"] is True
            seen += [await receive_event(client) for _ in range(answer["count"])]
            if len(seen) < 3:  # it came after the resume
                seen.append(await receive_event(client))
            assert [event["marker"] for event in seen] == [1, 2, 3]


async def holds_a_client(port: int) -> bool:
    reply = await http(port, "/ws/health")
    return bool(reply.json["connections"]["total"])


async def test_a_stream_of_events_is_not_held_back(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        token = make_jwt(JWT_SECRET, sub="1")
        stream = await trio.open_tcp_stream("127.0.0.1", at.port)
        request = f"GET /ws/waiter/events?token={token} HTTP/1.1\r\nHost: a\r\n\r\n"
        await stream.send_all(request.encode())
        received = b""
        while b"text/event-stream" not in received:
            received += bytes(await stream.receive_some(4096))
        await trio.sleep(0.5)
        watch = Stopwatch()
        at.publish(7)
        while b'"marker": 7' not in received and b'"marker":7' not in received:
            with trio.fail_after(5):
                received += bytes(await stream.receive_some(4096))
        assert watch.net < 1
        await stream.aclose()


async def test_no_log_of_a_proxy_holds_a_token(proxy: str, redis_url: str, tmp_path: Path) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        async with admitted(at.url(sub="1")):
            pass
        await http(at.port, "/ws/catchup?token=eyJsecret&branch_id=1&since=0")

        def logged() -> str:
            return "".join(path.read_text() for path in tmp_path.glob("*.log"))

        await until(lambda: "/ws/catchup" in logged())
    text = logged()
    assert "/ws/waiter" in text
    assert not re.search(r"eyJ|token=", text)
    status, _, _ = await wait(at.gateways[1])
    assert status is not None


METRICS = (
    "/ws/metrics /ws/metrics/ //ws/metrics /ws//metrics /ws/./metrics /ws/metrics?x /ws/%6Detrics"
    " /%77s/metrics /ws%2Fmetrics /ws/health/../metrics /ws/metrics%2F /ws/metrics;x"
    " /ws/metrics%00 /ws/metrics%0A /x/../ws/metrics http://localhost/ws/metrics"
)
DETAILS = (
    "/ws/health/detailed /ws/health//detailed /ws/health/%64etailed //ws//health//detailed//"
    " /ws/health/detailed/ http://a/ws//health/detailed"
)


async def test_what_is_for_operators_is_closed(proxy: str, redis_url: str, tmp_path: Path) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        for path in f"{METRICS} {DETAILS}".split():
            for method in ("GET", "POST"):
                reply = await http(at.port, path, method=method)
                assert reply.status in {308, 400, 404, 405}, path
                assert "wsgateway_" not in reply.text
                assert "redis_sync" not in reply.text
        assert (await http(at.port, "/ws/health")).status == 200
        assert (await http(at.ports[0], "/ws/metrics")).status == 200


def bearer(sub: str, **claims: Any) -> dict[str, str]:
    return {"Authorization": f"Bearer {make_jwt(JWT_SECRET, sub=sub, **claims)}"}


async def test_refusals_of_one_client_take_no_gateway_from_the_others(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    """Over its limit, and with a token whose key can't be looked up."""
    no_keys = {"JWT_ALGORITHMS": "HS256,RS256", "JWT_JWKS_URL": f"http://127.0.0.1:{free_port()}/"}
    limit = {"WS_MAX_CONNECTIONS_PER_USER": "1"}
    unknown = {"alg": "RS256", "kid": "new"}
    head = base64.urlsafe_b64encode(json.dumps(unknown).encode()).decode().rstrip("=")
    strange = {"Authorization": "Bearer " + ".".join([head, *make_jwt(JWT_SECRET).split(".")[1:]])}
    async with AsyncExitStack() as stack:
        at = await stack.enter_async_context(behind(proxy, redis_url, tmp_path, no_keys | limit))
        for port in at.ports:
            url = at.url(sub="1").replace(f":{at.port}/", f":{port}/")
            await stack.enter_async_context(admitted(url))
        for n in range(6):
            for _ in range(2):
                stream = await http(at.port, "/ws/waiter/events", headers=bearer("1"))
                assert stream.status == 429
                refused = await http(at.port, "/ws/waiter/events", headers=strange)
                assert refused.status == 503
                refused = await http(at.port, "/ws/ticket", method="POST", headers=strange)
                assert refused.status == 503
            async with admitted(at.url(sub=f"10{n}")):
                pass
            ticket = await http(at.port, "/ws/ticket", method="POST", headers=bearer("2"))
            assert ticket.status == 200
            assert (await http(at.port, "/ws/health")).status == 200


async def test_new_clients_go_to_the_other_while_one_drains(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    async with behind(proxy, redis_url, tmp_path) as at, AsyncExitStack() as stuck:
        # These read nothing, and one that is sent away with a close frame does not answer it.
        for n in range(4):
            stream = await trio.open_tcp_stream("127.0.0.1", at.ports[0])
            stuck.push_async_callback(trio.aclose_forcefully, stream)
            token = make_jwt(JWT_SECRET, sub=f"20{n}")
            await stream.send_all(make_head(request=f"GET /ws/waiter?token={token} HTTP/1.1"))
        await until(lambda: holds_a_client(at.ports[0]))
        at.gateways[0].send_signal(signal.SIGTERM)
        await until(lambda: drains(at.ports[0]))
        for n in range(8):
            async with admitted(at.url(sub=f"{n}")):
                pass
            token = make_jwt(JWT_SECRET, sub=f"30{n}")
            assert await http_status(at.port, f"/ws/waiter/events?token={token}") == 200


async def drains(port: int) -> bool:
    return bool((await http(port, "/ws/health/ready")).json["draining"])


async def http_status(port: int, path: str) -> int:
    """The status alone, for what does not end."""
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        with trio.fail_after(5):
            return int((await stream.receive_some(4096)).split()[1])


async def test_redis_that_is_slow_for_seconds_empties_no_balancer(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    async with behind(proxy, redis_url, tmp_path) as at:
        await trio.sleep(1)
        at.backend.client_pause(2600)  # longer than a check of readiness waits
        end, unready = trio.current_time() + 4, 0
        while trio.current_time() < end:
            assert (await http(at.port, "/ws/health")).status == 200
            unready += (await http(at.ports[0], "/ws/health/ready")).status == 503
            await trio.sleep(0.05)
        assert unready


async def test_backends_can_publish_with_the_biggest_body(
    proxy: str, redis_url: str, tmp_path: Path
) -> None:
    padding = "x" * 65_000
    event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "padding": padding}
    most = MAX_BYTES // len(json.dumps(event)) - 1
    keys = str(write_keys(tmp_path))
    async with behind(proxy, redis_url, tmp_path, {"WS_API_KEYS_FILE": keys}) as gateways:
        found = await publish(gateways.port, [event] * most)
        assert all(each["event_id"] for each in found)
