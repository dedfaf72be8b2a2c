"""The examples of docs/backends.md, run as they are written there."""

import json
import os
import re
import shutil
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import pytest
import redis
import trio
from jsonschema import Draft202012Validator

from tests.support.api_keys import secret_of, write_keys
from tests.support.gateways import admitted, http, serving
from trio_gateway.core.api_keys import read_api_keys
from trio_gateway.web.static import OPENAPI

DOCUMENT: Final = (Path(__file__).parents[2] / "docs" / "backends.md").read_text("utf-8")
EXAMPLES: Final = re.findall(r"```sh\n(.*?)```\n\n```json\n(.*?)```", DOCUMENT, re.DOTALL)


def shape(value: Any) -> Any:
    """Without what differs from run to run: ids, names, versions and times."""
    if isinstance(value, dict):
        return {
            key: type(each).__name__
            if key in {"event_id", "name", "version", "started_at", "since", "p50", "p95", "p99"}
            else shape(each)
            for key, each in value.items()
        }
    return [shape(each) for each in value] if isinstance(value, list) else value


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples are for curl")
async def test_examples_are_answered_as_the_page_and_the_document_say(
    redis_url: str, backend: "redis.Redis", tmp_path: Path
) -> None:
    assert len(EXAMPLES) == DOCUMENT.count("```sh")
    changes = {"ws_api_keys_file": write_keys(tmp_path), "ws_cluster": True}
    async with (
        serving(redis_url, "direct", **changes) as gateway,
        admitted(gateway.staff_url("waiter", sector_ids=[5])),
        admitted(gateway.diner_url(session_id=456)),
    ):
        described = (await http(gateway.port, OPENAPI)).json
        url = f"http://127.0.0.1:{gateway.port}"
        env = os.environ | {"URL": url, "SECRET": secret_of("all")}
        for command, answer in EXAMPLES:
            done = await trio.run_process(["sh", "-c", command], env=env, capture_stdout=True)
            assert shape(json.loads(done.stdout)) == shape(json.loads(answer)), command
            (path,) = re.findall(r"\$URL(/ws/api/\w+)", command)
            (operation,) = described["paths"][path].values()
            schema = operation["responses"]["200"]["content"]["application/json"]["schema"]
            components = {"components": described["components"]}
            Draft202012Validator(schema | components).validate(json.loads(done.stdout))


def test_the_file_of_keys_on_the_page_is_valid() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", DOCUMENT, re.DOTALL)
    assert [key.name for key in read_api_keys(text)] == ["orders", "support"]


@pytest.mark.skipif(shutil.which("openssl") is None, reason="the recipe needs openssl")
async def test_the_recipe_for_a_secret_prints_it_and_its_hash() -> None:
    (recipe,) = re.findall(r"^    (secret=.*)$", DOCUMENT, re.MULTILINE)
    done = await trio.run_process(["sh", "-c", recipe], capture_stdout=True)
    secret, digest = done.stdout.decode().splitlines()
    assert digest.split()[0] == sha256(secret.encode()).hexdigest()
