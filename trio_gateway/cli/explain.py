"""``explain``: print who receives an event, and why others do not."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..core.printable import printable
from .errors import MISUSED, Failure, settings_or_exit
from .rendering import steps_words
from .url import read_url

if TYPE_CHECKING:
    from rich.console import Console

    from ..core.events import Event

Answer = Mapping[str, Any]  # as POST /ws/explain answers


@click.command()
@click.argument(
    "file",
    type=click.Path(exists=True, dir_okay=False, allow_dash=True),
    metavar="EVENT.json|-",
)
@click.option(
    "--token",
    "tokens",
    multiple=True,
    metavar="TOKEN|@FILE|-",
    help="Say whether its holder receives the event. Repeatable. Other users can see a command"
    " line: @FILE or - (stdin) hides the token.",
)
@click.option(
    "--url",
    help="Ask this gateway, which uses its own table, secrets and database, and counts its"
    " connections. Needs an ADMIN's token in TRIO_GATEWAY_TOKEN; by default one is minted with"
    " JWT_SECRET.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, as POST /ws/explain does.")
def explain(file: str, tokens: Sequence[str], url: str | None, as_json: bool) -> None:
    """Print who receives an event, and why the holders of given tokens do or do not.

    EVENT.json contains one event, or {"channel": …, "event": …}. Nothing is published.

    Without --url the settings here are used: tokens are verified with the secrets that are set,
    but revocations are not checked.
    """
    if [file, *tokens].count("-") > 1:
        raise click.UsageError("- is stdin, which can be read only once")
    event = _read_event(file)
    given = [_read_token(each) for each in tokens]
    answer = _locally(event, given) if url is None else _remotely(event, given, url)
    if as_json:
        import msgspec

        click.echo(msgspec.json.format(msgspec.json.encode(answer)).decode())
        return
    _show(answer, event, given)


def _read_event(file: str) -> "Event":
    from ..core.events import InvalidEvent, parse_event
    from .event_files import read_events

    with click.open_file(file, "rb") as opened:
        found = list(read_events(opened))
    if len(found) != 1:
        raise Failure(f"{file} contains {len(found)} events: pass one", MISUSED)
    try:
        return parse_event(found[0].payload, channel="", received_at=0)
    except InvalidEvent as invalid:
        raise Failure(f"invalid event: {invalid}") from None


def _read_token(given: str) -> str:
    if given != "-" and not given.startswith("@"):
        return given
    file = given.removeprefix("@")
    try:
        with click.open_file(file) as opened:
            token = str(opened.read()).strip()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Failure(f"can't read a token from {file}: {why}", MISUSED) from None
    if not token:
        raise Failure(f"{file} contains no token", MISUSED)
    return token


def _locally(event: "Event", tokens: Sequence[str]) -> Answer:
    import trio

    from .local_policy import ask

    return trio.run(ask, settings_or_exit(), event, tokens)


def _remotely(event: "Event", tokens: Sequence[str], url: str) -> Answer:
    import msgspec

    from .credentials import Identity, staff_token_by
    from .gateway_http import fetch

    read_url(url)  # before the settings are read for a secret
    if (token := os.environ.get("TRIO_GATEWAY_TOKEN")) is None:
        admin = Identity(tenant=event.tenant, branches=(event.branch or 1,), roles=("ADMIN",))
        token = staff_token_by(settings_or_exit(), admin)
    body = {"event": msgspec.Raw(event.payload), "tokens": list(tokens)}
    return fetch(url, "/ws/explain", token, msgspec.json.encode(body))


# Showing it


def _show(answer: Answer, event: "Event", tokens: Sequence[str]) -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)
    durable = "durable if read from a stream" if answer["durable"] else "not durable"
    known = "" if answer["known"] else "unknown type, "

    def show(text: str, style: str = "") -> None:
        console.print(Text(printable(text), style), soft_wrap=True)

    show(f"{answer['type']}  ({known}{durable})", "bold")
    audiences = [audience_words(each) for each in answer["audiences"]] or ["nobody"]
    for label, text in zip(["goes to", *[""] * len(audiences)], audiences, strict=False):
        show(f"  {label:<10} {text}")
    if steps := answer.get("steps"):  # an older gateway says nothing of them
        words = steps_words((step["to"], step["within"]) for step in steps)
        show(f"  {'must reach':<10} {words}")
    elif answer.get("receipt"):
        show(f"  {'receipts':<10} are kept: trio-gateway receipts EVENT_ID")
    if "connections" in answer:
        numbers = "  ".join(f"{name} {n}" for name, n in answer["connections"].items())
        show(f"  {'connected':<10} {numbers}  (to the process that answered)")
    for note in answer.get("notes", ()):
        show(f"  {note}", "dim")
    if tokens:
        _show_tokens(console, answer["tokens"], tokens)


def _show_tokens(console: "Console", verdicts: Sequence[Answer], tokens: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    grid = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("token", "holder", "endpoint", "receives it", "why not"):
        grid.add_column(name)
    for number, (verdict, token) in enumerate(zip(verdicts, tokens, strict=True), 1):
        head = [str(number), _holder(token)]
        for endpoint, reason in _rows(verdict):
            style = "red" if reason else "green"
            cells = [*head, endpoint, "no" if reason else "yes", reason]
            grid.add_row(*[Text(printable(cell)) for cell in cells], style=style)
            head = ["", ""]
    console.print(grid)


def _rows(verdict: Answer) -> Iterator[tuple[str, str]]:
    for endpoint in verdict["endpoints"]:
        yield f"/ws/{endpoint}", ""
    for where, reason in verdict["reasons"].items():
        if (step := verdict.get("later", {}).get(where)) is not None:
            reason += f"; after {step['after']:g} s without a confirmation it goes to {step['to']}"
        yield ("" if where == "token" else f"/ws/{where}"), reason


def _holder(token: str) -> str:
    """The holder that a token names; the token may be invalid."""
    from ..core.signatures import claims_of
    from ..core.tokens import is_for_diners

    claims = claims_of(token)
    if claims is None:
        legacy = token.split(":")
        return f"session {legacy[3]}"[:40] if is_for_diners(token) else "?"
    if is_for_diners(token):
        return f"session {claims['session_id']}"[:40]
    roles = claims.get("roles")
    named = " ".join(map(str, roles)) if isinstance(roles, list) else ""
    return f"user {claims.get('sub')} {named}"[:40]


def audience_words(audience: Answer) -> str:
    """An audience as JSON describes it, in words."""
    match audience:
        case {"audience": "waiters", "branch_id": branch, "sector_id": sector}:
            return f"waiters of sector {sector} in branch {branch}"
        case {"audience": "floor", "branch_id": branch}:
            return f"every waiter of branch {branch}"
        case {"audience": "diners", "session_id": session}:
            return f"diners of session {session}"
        case {"audience": "branch_diners", "branch_id": branch}:
            return f"every diner of branch {branch}"
        case {"audience": "tenant_admins", "tenant_id": tenant}:
            return f"admins of every branch of tenant {tenant}"
    return f"{audience['audience']} of branch {audience['branch_id']}"
