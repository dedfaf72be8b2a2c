"""What the demo shows: the commands to try, the published events, and who receives them."""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .demo_processes import ROLES, DemoGateway

if TYPE_CHECKING:
    import trio

    from ..publisher import AsyncPublisher
    from .event_files import FileEvent
    from .rendering import Screen


@dataclass(slots=True)
class Tally:
    """The numbers of events; ``last_at`` is the time of the last one, on Trio's clock."""

    published: int = 0
    last_at: float = 0.0
    received: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        shares = ", ".join(f"{role} {self.received[role]}" for role in ROLES)
        return f"{self.published} events published; received: {shares}. Nothing is left running."


async def introduce(gateway: DemoGateway, screen: "Screen") -> None:
    """Show the addresses and the commands to try."""
    from rich.text import Text

    console = f"http://127.0.0.1:{gateway.port}/ws/console"
    await screen.show(Text.assemble("Open the console in a browser: ", (console, "bold")))
    await screen.show(f"The gateway is at {gateway.url}; it uses its own Valkey server.")
    await screen.show("\nIn another terminal, see what a role receives (no token is needed):\n")
    width = max(map(len, ROLES))
    for role, (title, _) in ROLES.items():
        await screen.show(Text(f"    trio-gateway tail --demo --as {role:<{width}}  # {title}"))
    await screen.show("\nPublish an event, as a backend does:\n")
    event = '{"type":"ROUND_READY","tenant_id":1,"branch_id":1,"sector_id":5,"session_id":456}'
    await screen.show(
        Text(f"    echo '{event}' | REDIS_URL={gateway.redis_url} trio-gateway publish -\n")
    )
    await screen.show(
        "Sample events follow, each with the roles that receive it. An event that a backend\n"
        "publishes on several channels is received once. Nobody here receives an event of\n"
        "another tenant.\n"
        "Ctrl-C ends everything.\n"
    )


async def listen(
    gateway: DemoGateway,
    role: str,
    screen: "Screen",
    tally: Tally,
    *,
    task_status: "trio.TaskStatus[None]",
) -> None:
    """Connect as a role and show its events."""
    import trio

    from ..client import connect
    from .rendering import summary

    url = f"{gateway.url}/ws/{role}"
    # If the gateway ends, the task that reads its log raises the error.
    async with connect(url, lambda _: gateway.token(role)) as client:
        await client.wait_open()
        task_status.started()
        async for event in client:
            tally.last_at = trio.current_time()
            tally.received[role] += 1
            await screen.show(summary(event.text, role, places=False))


async def publish_samples(
    gateway: DemoGateway, rate: float, loops: int, screen: "Screen", tally: Tally
) -> None:
    """Publish the sample events, as a backend does."""
    import trio

    from ..publisher import AsyncPublisher

    async with AsyncPublisher(gateway.redis_url) as publisher:
        started = trio.current_time()
        for event in _loop(loops):
            await trio.sleep_until(started + tally.published / rate)
            await _publish(publisher, event.now(), screen)
            tally.published += 1
            tally.last_at = trio.current_time()


async def _publish(publisher: "AsyncPublisher", event: "FileEvent", screen: "Screen") -> None:
    from ..core.event_ids import DEFAULT_STREAM
    from .rendering import published

    assert event.channel is not None
    is_stream = event.channel == DEFAULT_STREAM
    where: dict[str, Any] = {"stream" if is_stream else "channel": event.channel}
    await screen.show(published(event.payload.decode(), event.channel))
    await publisher.publish(event.payload, **where)


def _loop(loops: int) -> "Iterator[FileEvent]":
    """Yield the sample events ``loops`` times, or for ever if that is 0."""
    from importlib.resources import files

    from .event_files import read_events

    with files("trio_gateway").joinpath("data/events.jsonl").open("rb") as file:
        events = list(read_events(file))
    done = 0
    while not loops or done < loops:
        yield from events
        done += 1
