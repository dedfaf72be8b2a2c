"""``tail``: connect as a role and print the events."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import click

from ..core.printable import printable
from . import demo_file
from .credentials import (
    ENDPOINTS,
    Identity,
    identity_options,
    staff_token,
    staff_token_by,
    table_token,
    table_token_by,
)
from .errors import Failure, settings_or_exit
from .url import DEFAULT, endpoint_url

if TYPE_CHECKING:
    from ..client import TokenProvider
    from .demo_file import RunningDemo


@click.command()
@click.option("--as", "endpoint", type=click.Choice(ENDPOINTS), default="admin", show_default=True)
@click.option("--url", help=f"Of the gateway.  [default: {DEFAULT}]")
@click.option(
    "--demo",
    "of_demo",
    is_flag=True,
    help="Use the gateway of the `trio-gateway demo` on this machine, and its secrets.  "
    "[default: if --url, --token, JWT_SECRET and TABLE_TOKEN_SECRET are not set]",
)
@click.option(
    "--token",
    envvar="TRIO_GATEWAY_TOKEN",
    help="Safer in TRIO_GATEWAY_TOKEN: other users can see a command line.  [default: minted with"
    " JWT_SECRET or TABLE_TOKEN_SECRET, for the holder that the options below describe]",
)
@click.option("--origin", help="The Origin header; a production gateway requires one from staff.")
@click.option("--json", "raw", is_flag=True, help="Print one line of JSON per event.")
@click.option("--count", type=click.IntRange(min=1), metavar="N", help="Stop after N events.")
@identity_options(staff=True, diner=True)
def tail(
    endpoint: str,
    url: str | None,
    of_demo: bool,
    token: str | None,
    origin: str | None,
    raw: bool,
    count: int | None,
    tenant: int,
    branches: Sequence[int],
    user: int,
    roles: Sequence[str],
    sectors: Sequence[int],
    table: int,
    session: int,
    life: int,
) -> None:
    """Connect to the gateway as a role and print the events, until Ctrl-C.

    If the connection ends, it reconnects and prints the events that it missed. A minted token is
    renewed; --token is used until it expires. Exit status 1 if the first attempt fails.
    """
    demo = _running_demo(of_demo, url, token)
    if url is None:
        url = demo.url if demo else DEFAULT
    where = endpoint_url(url, endpoint)
    if token is None:
        identity = Identity(
            tenant=tenant,
            branches=branches,
            user=user,
            roles=roles or (endpoint.upper(),),
            sectors=sectors,
            table=table,
            session=session,
            life=life,
        )
        mint = _mint(endpoint, identity, demo)
        mint()  # report an error before connecting
        secret = "TABLE_TOKEN_SECRET" if endpoint == "diner" else "JWT_SECRET"
        signed_with = f"the {secret} of the demo" if demo else f"the {secret} that is set here"
        _tail(
            where, lambda _: mint(), endpoint,
            origin=origin, raw=raw, count=count, signed_with=signed_with,
        )  # fmt: skip
    else:
        _tail(where, token, endpoint, origin=origin, raw=raw, count=count)


def _running_demo(wanted: bool, url: str | None, token: str | None) -> "RunningDemo | None":
    """Find the demo if ``--demo`` is given, or if nothing names another gateway."""
    if wanted:
        if url is not None:
            raise click.UsageError("--demo and --url exclude each other")
        demo = demo_file.find()
        if demo is None:
            raise Failure("no demo of this user runs here: start one with trio-gateway demo")
        return demo
    if url is not None or token is not None:
        return None
    settings = settings_or_exit()
    configured = settings.jwt_secret or settings.table_token_secret
    return None if configured else demo_file.find()


def _mint(endpoint: str, identity: Identity, demo: "RunningDemo | None") -> Callable[[], str]:
    """Make a function that mints tokens for this endpoint, with the demo's or our secret."""
    diner = endpoint == "diner"
    if demo is None:
        return partial(table_token_by if diner else staff_token_by, settings_or_exit(), identity)
    if diner:
        return partial(table_token, demo.table_token_secret, identity)
    return partial(staff_token, demo.jwt_secret, identity)


def _tail(
    url: str,
    token: "str | TokenProvider",
    endpoint: str,
    *,
    origin: str | None,
    raw: bool,
    count: int | None,
    signed_with: str | None = None,
) -> None:
    from ..client import Event, Refused, Status, connect
    from ..core.close_codes import Close
    from .disconnect_advice import why
    from .rendering import Screen, json_text, summary
    from .signals import run

    screen = Screen()
    connected = False

    def explain(status: Status) -> str:
        text = why(url, status)
        if signed_with is not None and status.code == Close.AUTH_FAILED:
            text += f" (it was signed with {signed_with})"
        return text

    def report_status(status: Status) -> None:
        nonlocal connected
        match status.state:
            case "open":
                again = " again" if connected else ""
                click.echo(f"connected{again} to {url}; stop with Ctrl-C", err=True)
                connected = True
            case "waiting" if connected:
                reason = printable(explain(status))
                click.echo(f"{reason}; reconnecting in {status.retry_in:.1f} s", err=True)
            case "waiting":
                raise Failure(explain(status))

    def report_gap(_: str) -> None:
        click.echo("events may be missing here", err=True)

    async def show(event: Event) -> None:
        if raw:
            # JSON allows line breaks between its tokens, but not inside strings.
            await screen.write(event.text.replace("\r", " ").replace("\n", " ") + "\n")
        else:
            await screen.show(summary(event.text, endpoint))
            await screen.show(json_text(event.text))

    async def work() -> None:
        received = 0
        async with connect(
            url, token, origin=origin, on_state=report_status, on_gap=report_gap, confirm=False
        ) as client:
            try:
                while received != count:
                    await show(await anext(client))
                    received += 1
            except Refused:
                raise Failure(explain(client.status)) from None

    run(work)
