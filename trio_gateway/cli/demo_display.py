"""What the demo shows: the commands to try, the published events, and who receives them."""

import zlib
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import msgspec

from .demo_processes import ROLES, DemoGateway

if TYPE_CHECKING:
    import trio

    from ..publisher import AsyncPublisher
    from .demo_tally import Tally
    from .event_files import FileEvent
    from .rendering import Screen

_PATIENCE: Final = 30.0  # seconds
_RETRY: Final = 0.1  # seconds until an event that Redis did not accept is published again


async def introduce(gateway: DemoGateway, servers: str, screen: "Screen") -> None:
    """Show the addresses and the commands to try; ``servers`` is the name of its Redis."""
    from rich.text import Text

    console = f"http://127.0.0.1:{gateway.port}/ws/console"
    await screen.show(Text.assemble("Open the console in a browser: ", (console, "bold")))
    await screen.show(f"The gateway is at {gateway.url}; it uses its own {servers}.")
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
        "See what becomes of a call that nobody confirms: trio-gateway demo --story receipts\n\n"
        "Sample events follow, each with the roles that receive it. An event that a backend\n"
        "publishes on several channels is received once. Nobody here receives an event of\n"
        "another tenant.\n"
        "Ctrl-C ends everything.\n"
    )


async def listen(
    gateway: DemoGateway,
    role: str,
    screen: "Screen",
    tally: "Tally",
    *,
    task_status: "trio.TaskStatus[None]",
) -> None:
    """Connect as a role and show its events."""
    from ..client import Gap, connect
    from .rendering import summary

    async def on_gap(reason: Gap) -> None:
        tally.gaps += 1
        await screen.show(f"          {role:<8} is told that events are missing ({reason})")

    url = f"{gateway.url}/ws/{role}"
    # If the gateway ends, the task that reads its log raises the error.
    async with connect(url, lambda _: gateway.token(role), on_gap=on_gap) as client:
        await client.wait_open()
        task_status.started()
        async for event in client:
            tally.receive(role, event.data.get("id"))
            await screen.show(summary(event.text, role, places=False))


async def publish_samples(
    gateway: DemoGateway,
    rate: float,
    loops: int,
    screen: "Screen",
    tally: "Tally",
    *,
    confirm: int,
) -> None:
    """Publish the sample events, as a backend does; ``confirm`` as of a publisher."""
    import trio

    from ..publisher import AsyncPublisher

    async with AsyncPublisher(gateway.redis_url, confirm=confirm) as publisher:
        started = trio.current_time()
        for event in _loop(loops):
            await trio.sleep_until(started + tally.published / rate)
            await _publish(publisher, event.now(), screen, tally)


async def _publish(
    publisher: "AsyncPublisher", event: "FileEvent", screen: "Screen", tally: "Tally"
) -> None:
    """Publish an event, again and again until Redis has confirmed it.

    Raises :exc:`PublishFailed` if a failover takes too long for that.
    """
    import trio

    from ..core.event_ids import DEFAULT_STREAM
    from ..publisher import PublishFailed
    from .rendering import published

    assert event.channel is not None
    is_stream = event.channel == DEFAULT_STREAM
    where: dict[str, Any] = {"stream" if is_stream else "channel": event.channel}
    await screen.show(published(event.payload.decode(), event.channel))
    tally.publish(event.payload)
    give_up_at = trio.current_time() + _PATIENCE
    while True:
        try:
            await publisher.publish(event.payload, **where)
        except PublishFailed:
            if trio.current_time() >= give_up_at:
                raise
            await trio.sleep(_RETRY)
        else:
            break
    if is_stream:
        tally.confirm(event.payload)


def _loop(loops: int) -> "Iterator[FileEvent]":
    """Yield the sample events ``loops`` times, or for ever if that is 0."""
    from importlib.resources import files

    from .event_files import read_events

    with files("trio_gateway").joinpath("data/events.jsonl").open("rb") as file:
        events = list(read_events(file))
    done = 0
    while not loops or done < loops:
        for event in events:
            yield _with_id(event, done)
        done += 1


def _with_id(event: "FileEvent", loop: int) -> "FileEvent":
    """The event with an ``id``: it is safe to publish it again.

    The ids of the copies of one event on several channels are the same.
    """
    found = msgspec.json.decode(event.payload, type=dict[str, msgspec.Raw])
    content = b"".join(bytes(value) for name, value in found.items() if name != "ts")
    found["id"] = msgspec.Raw(b'"%d-%08x"' % (loop, zlib.crc32(content)))
    return replace(event, payload=msgspec.json.encode(found))
