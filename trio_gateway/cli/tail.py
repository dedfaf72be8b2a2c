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
    help="The gateway of the `trio-gateway demo` that runs on this machine, with its secrets.  "
    "[default: if neither --url, --token, JWT_SECRET nor TABLE_TOKEN_SECRET says another]",
)
@click.option(
    "--token",
    envvar="TRIO_GATEWAY_TOKEN",
    help="Better in TRIO_GATEWAY_TOKEN: others can see a command line.  [default: minted from"
    " JWT_SECRET or TABLE_TOKEN_SECRET, for whom the options below say]",
)
@click.option("--origin", help="The Origin to name; a production gateway wants one from staff.")
@click.option("--json", "raw", is_flag=True, help="One line of JSON an event, nothing else.")
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
    """Connect to the gateway as a role and print the events that come, until Ctrl-C.

    A connection that ends is made again, and what came meanwhile is printed then; --token is good
    for as long as it lives, a minted one is renewed. Exit status 1 if the first attempt fails.
    """
    demo = _running_demo(of_demo, url, token)
    if url is None:
        url = demo.url if demo else DEFAULT
    where = endpoint_url(url, endpoint)
    if token is None:
        who = Identity(
            tenant=tenant,
            branches=branches,
            user=user,
            roles=roles or (endpoint.upper(),),
            sectors=sectors,
            table=table,
            session=session,
            life=life,
        )
        mint = _mint(endpoint, who, demo)
        mint()  # what is wrong with that is said before anything is tried
        secret = "TABLE_TOKEN_SECRET" if endpoint == "diner" else "JWT_SECRET"
        signed_with = f"the {secret} of the demo" if demo else f"{secret} as it is set here"
        _tail(
            where, lambda _: mint(), endpoint,
            origin=origin, raw=raw, count=count, signed_with=signed_with,
        )  # fmt: skip
    else:
        _tail(where, token, endpoint, origin=origin, raw=raw, count=count)


def _running_demo(wanted: bool, url: str | None, token: str | None) -> "RunningDemo | None":
    """The demo that is asked for, or one that runs if nothing says which gateway is meant."""
    if wanted:
        if url is not None:
            raise click.UsageError("--demo and --url exclude each other")
        demo = demo_file.find()
        if demo is None:
            raise Failure("no demo of yours runs on this machine: start one with trio-gateway demo")
        return demo
    if url is not None or token is not None:
        return None
    settings = settings_or_exit()
    configured = settings.jwt_secret or settings.table_token_secret
    return None if configured else demo_file.find()


def _mint(endpoint: str, who: Identity, demo: "RunningDemo | None") -> Callable[[], str]:
    """What mints a token for this endpoint, with the demo's secret or the settings' own."""
    diner = endpoint == "diner"
    if demo is None:
        return partial(table_token_by if diner else staff_token_by, settings_or_exit(), who)
    if diner:
        return partial(table_token, demo.table_token_secret, who)
    return partial(staff_token, demo.jwt_secret, who)


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

    def because(status: Status) -> str:
        text = why(url, status)
        if signed_with is not None and status.code == Close.AUTH_FAILED:
            text += f" (it was signed with {signed_with})"
        return text

    def tell(status: Status) -> None:
        nonlocal connected
        match status.state:
            case "open":
                again = " again" if connected else ""
                click.echo(f"connected{again} to {url}, Ctrl-C ends it", err=True)
                connected = True
            case "waiting" if connected:
                reason = printable(because(status))
                click.echo(f"{reason}; again in {status.retry_in:.1f} s", err=True)
            case "waiting":
                raise Failure(because(status))

    def tell_of_gap(_: str) -> None:
        click.echo("events may be missing here", err=True)

    async def show(event: Event) -> None:
        if raw:
            # Between its tokens a backend may have broken the line; inside of a string it can't.
            await screen.write(event.text.replace("\r", " ").replace("\n", " ") + "\n")
        else:
            await screen.show(summary(event.text, endpoint))
            await screen.show(json_text(event.text))

    async def work() -> None:
        heard = 0
        async with connect(url, token, origin=origin, on_state=tell, on_gap=tell_of_gap) as client:
            try:
                while heard != count:
                    await show(await anext(client))
                    heard += 1
            except Refused:
                raise Failure(because(client.status)) from None

    run(work)
