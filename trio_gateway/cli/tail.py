"""``tail``: connect as a role and print the events."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from .credentials import ENDPOINTS, Identity, identity_options, staff_token_by, table_token_by
from .endings import Failure, settings_or_exit
from .url import DEFAULT, endpoint_url

if TYPE_CHECKING:
    from ..client import TokenProvider


@click.command()
@click.option("--as", "endpoint", type=click.Choice(ENDPOINTS), default="admin", show_default=True)
@click.option("--url", default=DEFAULT, show_default=True, help="Of the gateway.")
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
    url: str,
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
        mint = table_token_by if endpoint == "diner" else staff_token_by
        settings = settings_or_exit()
        mint(settings, who)  # what is wrong with that is said before anything is tried
        _tail(where, lambda _: mint(settings, who), endpoint, origin=origin, raw=raw, count=count)
    else:
        _tail(where, token, endpoint, origin=origin, raw=raw, count=count)


def _tail(
    url: str,
    token: "str | TokenProvider",
    endpoint: str,
    *,
    origin: str | None,
    raw: bool,
    count: int | None,
) -> None:
    from ..client import Event, Refused, Status, connect
    from .running import run
    from .screen import Screen, json_text, summary
    from .why import why

    screen = Screen()
    connected = False

    def tell(status: Status) -> None:
        nonlocal connected
        match status.state:
            case "open":
                again = " again" if connected else ""
                click.echo(f"connected{again} to {url}, Ctrl-C ends it", err=True)
                connected = True
            case "waiting" if connected:
                click.echo(f"{why(url, status)}; again in {status.retry_in:.1f} s", err=True)
            case "waiting":
                raise Failure(why(url, status))

    def tell_of_gap(_: str) -> None:
        click.echo("events may be missing here", err=True)

    def show(event: Event) -> None:
        if raw:
            # Between its tokens a backend may have broken the line; inside of a string it can't.
            screen.write(event.text.replace("\r", " ").replace("\n", " ") + "\n")
        else:
            screen.show(summary(event.text, endpoint))
            screen.show(json_text(event.text))

    async def work() -> None:
        heard = 0
        async with connect(url, token, origin=origin, on_state=tell, on_gap=tell_of_gap) as client:
            try:
                while heard != count:
                    show(await anext(client))
                    heard += 1
            except Refused:
                raise Failure(why(url, client.status)) from None

    run(work)
