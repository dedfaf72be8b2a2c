"""The commands of ``trio-gateway``, in this process or in a new one."""

import os
from collections.abc import Mapping
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import trio_gateway
from trio_gateway.cli import main
from trio_gateway.settings import NAMES

from .gateways import JWT_SECRET, TABLE_SECRET, process, wait

SECRETS = {"JWT_SECRET": JWT_SECRET, "TABLE_TOKEN_SECRET": TABLE_SECRET}
EVENT = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1}'
SAMPLES = Path(trio_gateway.__file__).parent / "data" / "events.jsonl"


def clear_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove settings from the environment of the test run."""
    for name in NAMES & os.environ.keys():
        monkeypatch.delenv(name)


def run(*arguments: str, env: Mapping[str, str] | None = None, stdin: str | None = None) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, arguments, env=env, input=stdin)


async def run_process(
    *arguments: str, env: Mapping[str, str], seconds: float = 60
) -> tuple[int, list[str], str]:
    """Run a command in a process of its own; returns its status, lines of output, and errors."""
    async with process("trio_gateway", *arguments, env=env) as started:
        status, out, err = await wait(started, seconds)
    return status, out.decode().splitlines(), err.decode()
