"""``nodes``: the processes of the service."""

import time
from typing import TYPE_CHECKING

import click

from .errors import settings_or_exit
from .rendering import print_table
from .service import ask_service, no_gateway, show_json

if TYPE_CHECKING:
    from ..cluster.observing import Service
    from ..core.control_messages import Node


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def nodes(as_json: bool) -> None:
    """List the processes on this Redis, with what each published a few seconds ago.

    Known are those with WS_CLUSTER=true or WS_API_KEYS_FILE. Exit status 1 if there is none.
    """
    settings = settings_or_exit()
    found = ask_service(settings, _read)
    if as_json:
        show_json({"nodes": found})
    if not found:
        no_gateway(settings)
    if not as_json:
        _show(found)


async def _read(service: "Service") -> "list[Node]":
    found = await service.registry.read()
    return [node for _, node in sorted(found.items())]


def _show(found: "list[Node]") -> None:
    print_table(
        ("process", "version", "up", "state", "connections", "lag", "shards"),
        [
            (
                node.name,
                node.version,
                duration(time.time() - node.started_at) if node.started_at else "?",
                "draining" if node.draining else "serving",
                node.connections,
                node.lag,
                ranges(node.shards),
            )
            for node in found
        ],
    )


def duration(seconds: float) -> str:
    """A duration in the largest unit that fits, such as ``3 h``."""
    for unit, length in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds / length)} {unit}"
    return f"{max(0, int(seconds))} s"


def ranges(numbers: list[int]) -> str:
    """Numbers in short, such as ``0-3,7``; ``-`` if there is none."""
    found: list[list[int]] = []
    for number in sorted(numbers):
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(f"{a}" if a == b else f"{a}-{b}" for a, b in found) or "-"
