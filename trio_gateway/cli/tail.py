"""``tail``: connect as a role and print the events."""

from collections.abc import Sequence

import click

from .credentials import ENDPOINTS, Identity, identity_options, staff_token_by, table_token_by
from .endings import Failure, settings_or_exit
from .url import DEFAULT, endpoint_url


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
    """Connect to the gateway as a role and print the events that come, until Ctrl-C."""
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
        token = mint(settings_or_exit(), who)
    _tail(where, token, endpoint, origin=origin, raw=raw, count=count)


def _tail(
    url: str, token: str, endpoint: str, *, origin: str | None, raw: bool, count: int | None
) -> None:
    import trio

    from .client import Closed, NoConnection, listen
    from .running import run
    from .screen import Screen, json_text, summary

    screen = Screen()
    heard = 0
    enough = trio.CancelScope()

    def hear(message: str) -> None:
        nonlocal heard
        if raw:
            # Between its tokens a backend may have broken the line; inside of a string it can't.
            screen.write(message.replace("\r", " ").replace("\n", " ") + "\n")
        else:
            screen.show(summary(message, endpoint))
            screen.show(json_text(message))
        heard += 1
        if heard == count:
            enough.cancel()

    def admitted() -> None:
        click.echo(f"connected to {url}, Ctrl-C ends it", err=True)

    async def work() -> None:
        with enough:
            await listen(url, token, hear, origin=origin, admitted=admitted)

    try:
        run(work)
    except (Closed, NoConnection) as failure:
        raise Failure(str(failure)) from None
