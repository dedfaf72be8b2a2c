"""``kick``: close connections on all processes."""

from typing import TYPE_CHECKING

import click

from .errors import FAILED, settings_or_exit
from .service import IDS, ask_service, asked, no_gateway, show_json, tell_missing

if TYPE_CHECKING:
    from ..cluster.observing import Service
    from ..cluster.questions import Answers


@click.command()
@click.option("--tenant", type=IDS, required=True, help="The tenant.")
@click.option("--user", metavar="ID", help="Close the connections of this member of staff.")
@click.option("--session", type=IDS, help="Close those of the diners of a session.")
@click.option("--jti", metavar="ID", help="Close those with this token.")
@click.option("--reason", default="", help="The text that the clients get.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def kick(
    tenant: int, user: str | None, session: int | None, jti: str | None, reason: str, as_json: bool
) -> None:
    """Close connections with 4001 on all processes. It does not revoke their tokens.

    A process that does not answer does it when it runs again, within an hour. Exit status 1 if
    one did not answer, or if nothing was closed.
    """
    import msgspec

    from ..broker.commands import Unavailable
    from ..core.control_messages import Disconnect, Disconnected, read_control_message

    whose = {"user_id": user, "session_id": session, "jti": jti}
    given = {name: value for name, value in whose.items() if value is not None}
    if jti == "":
        raise click.UsageError("--jti must not be empty")
    if len(given) != 1:
        raise click.UsageError("pass one of --user, --session and --jti")
    request = {"tenant_id": tenant, "reason": reason, **given}
    try:
        order = read_control_message(msgspec.json.encode(request), Disconnect)
    except ValueError:
        raise click.UsageError("the id of a user is a number") from None

    async def give(service: "Service") -> "Answers":
        try:
            return await service.control.order("disconnect", order)
        except Unavailable as error:
            raise Unavailable(f"{error}; it may be done nonetheless") from None

    settings = settings_or_exit()
    answers = ask_service(settings, give)
    if not asked(answers):
        no_gateway(settings)
    closed = sum(found.closed for _, found in answers.decoded(Disconnected))
    if as_json:
        show_json({"closed": closed, "complete": answers.complete, "missing": answers.missing})
    else:
        click.echo(f"{closed} connection{'s' if closed != 1 else ''} closed")
        tell_missing(answers.missing, asked(answers))
    if not (closed and answers.complete):
        raise SystemExit(FAILED)
