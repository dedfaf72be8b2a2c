"""``serve`` with several workers: its processes, and what they answer."""

from dataclasses import dataclass
from pathlib import Path

import trio
from trio_websocket import WebSocketConnection

from trio_gateway.testing import make_jwt

from .gateways import JWT_SECRET, metrics

START = 60  # seconds for workers to start or end, on a busy machine


@dataclass
class Master:
    """A supervisor process and its listener."""

    pid: int
    port: int
    operations: int  # the port of metrics
    secret: str = JWT_SECRET  # of staff tokens

    @property
    def workers(self) -> set[int]:
        # Trio starts processes in threads, and each thread has its own children.
        lists = Path(f"/proc/{self.pid}/task").glob("*/children")
        return {int(child) for children in lists for child in children.read_text().split()}

    def url(self, user: int = 21) -> str:
        token = make_jwt(self.secret, sub=str(user))
        return f"ws://127.0.0.1:{self.port}/ws/waiter?token={token}"


async def until_ready(master: Master, workers: int) -> None:
    """Wait until every worker serves and has written its snapshot."""
    with trio.fail_after(START):
        while True:
            try:
                found = await metrics(master.operations)
            except (OSError, trio.TooSlowError):
                found = None
            if found is not None and len(master.workers) == workers:
                return
            await trio.sleep(0.05)


async def is_served(client: WebSocketConnection) -> bool:
    if client.closed:
        return False
    await client.send_message("ping")
    with trio.fail_after(5):
        return bool(await client.get_message() == '{"type":"pong"}')


async def replaced(master: Master, before: set[int]) -> None:
    """Wait until two other workers run and none of these."""
    with trio.fail_after(START):
        while len(master.workers) != 2 or master.workers & before:
            await trio.sleep(0.05)


def is_python(pid: int) -> bool:
    """Whether the process still runs; a zombie has no command line."""
    try:
        return bool(Path(f"/proc/{pid}/cmdline").read_bytes())
    except OSError:
        return False
