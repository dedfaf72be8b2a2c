"""A running gateway sends what its AsyncAPI document describes."""

import json
from typing import Any

import redis
from jsonschema import Draft7Validator

from tests.support.gateways import connect as connect_to
from tests.support.gateways import http, make_settings, receive_event, running
from trio_gateway.core.audiences import Endpoint
from trio_gateway.core.message_schemas import REQUESTS
from trio_gateway.testing import make_jwt
from trio_gateway.web.asyncapi import describe


async def test_messages_of_a_running_gateway_match_the_schemas_that_it_serves(
    backend: "redis.Redis", redis_url: str
) -> None:
    settings = make_settings(redis_url, ws_cluster=True)
    async with running(settings) as gateway:
        reply = await http(gateway.port, "/ws/asyncapi.json")
        document = reply.json
        assert document == json.loads(json.dumps(describe(settings)))

        def check(name: str, payload: Any) -> None:
            schema = {"$ref": f"#/components/messages/{name}/payload"}
            Draft7Validator({**document, **schema}).validate(payload)

        sent = set()
        admin = gateway.staff_url("admin", sub="22")
        async with connect_to(gateway.staff_url("waiter")) as waiter, connect_to(admin) as other:
            for name, request in sorted(REQUESTS.items(), key=lambda each: each[0] != "resume"):
                client = waiter if Endpoint.WAITER in request.endpoints else other
                text = request.example
                if name == "auth":
                    text = json.dumps(
                        {"type": "auth", "token": make_jwt(settings.jwt_secret or "")}
                    )
                check(name, json.loads(text) if text.startswith("{") else text)
                await client.send_message(text)
                sent.add(name)
                if request.answer is None:
                    continue
                answer = str(await client.get_message())
                check(request.answer, json.loads(answer) if answer.startswith("{") else answer)
            assert sent == REQUESTS.keys()
            event = {"type": "ROUND_READY", "tenant_id": 1, "branch_id": 1, "entity": {"x": "ñ"}}
            backend.xadd("events:critical", {"data": json.dumps(event)})
            live = await receive_event(waiter)
            check("event.ROUND_READY", live)
            assert live.pop("event_id")
            assert live == event
