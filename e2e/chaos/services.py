"""What clients and backends use beside durable events: that each of it works."""

import json
import uuid
from typing import Any, Final

import trio
from trio_websocket import WebSocketConnection

from tests.support.gateways import JWT_SECRET, admitted, closed, connect, http, receive_event
from trio_gateway.core.close_codes import Close
from trio_gateway.redis_sets import Node, RedisSet
from trio_gateway.testing import make_jwt

from .durable import STREAM

_WITHIN: Final = 5  # seconds


class Services:
    """Of the gateway on this port."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._url = f"ws://127.0.0.1:{port}/ws/waiter"

    async def try_ticket(self) -> str | None:
        """A ticket, or None if the gateway makes none."""
        authorization = {"Authorization": f"Bearer {_token()}"}
        reply = await http(self._port, "/ws/ticket", method="POST", headers=authorization)
        return str(reply.json["ticket"]) if reply.status == 200 else None

    async def check(self, servers: RedisSet) -> None:
        """Tickets, Pub/Sub, sectors and revocation; the backend's part is done at the servers.

        The events of branch 2 are for these clients alone.
        """
        primary = await _primary(servers, STREAM)
        ticket = await self.try_ticket()
        assert ticket is not None
        async with admitted(f"{self._url}?ticket={ticket}") as client:
            await self._check_pubsub(client, primary)
        await self._check_message(primary)
        await self._check_key(servers)

    async def _check_pubsub(self, client: WebSocketConnection, primary: Node) -> None:
        number = uuid.uuid4().hex
        event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 2, "number": number}
        await _ask(primary, "PUBLISH", "channel:branch:2:waiters", json.dumps(event))
        assert (await receive_event(client, _WITHIN))["number"] == number
        await client.send_message('{"type":"refresh_sectors"}')
        answer = await receive_event(client, _WITHIN)
        assert answer == {"type": "sectors_updated", "sector_ids": [5, 6]}

    async def _check_key(self, servers: RedisSet) -> None:
        """A revoked token is refused."""
        jti = uuid.uuid4().hex
        key = f"auth:token:blacklist:{jti}"
        await _ask(await _primary(servers, key), "SET", key, "1", "EX", "60")
        async with connect(f"{self._url}?token={_token(jti=jti)}") as client:
            assert (await closed(client, _WITHIN))[0] == Close.AUTH_FAILED

    async def _check_message(self, primary: Node) -> None:
        """A live connection is closed at once when its token is revoked."""
        jti = uuid.uuid4().hex
        token = _token(jti=jti)
        async with admitted(f"{self._url}?token={token}") as client:
            await _ask(primary, "PUBLISH", "channel:auth:revoked", json.dumps({"jti": jti}))
            assert (await closed(client, _WITHIN))[0] == Close.AUTH_FAILED


def _token(**claims: Any) -> str:
    return make_jwt(JWT_SECRET, roles=["WAITER"], branch_ids=[2], sector_ids=[5, 6], **claims)


async def _primary(servers: RedisSet, key: str) -> Node:
    return await trio.to_thread.run_sync(servers.primary, key)


async def _ask(node: Node, *command: str) -> None:
    await trio.to_thread.run_sync(lambda: node.ask(*command))
