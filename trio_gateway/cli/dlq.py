"""``dlq``: show dead letters (invalid stream entries), and add them to their stream again."""

from typing import TYPE_CHECKING, Any

import click

from ..core.printable import printable
from .errors import FAILED, Failure, settings_or_exit
from .redis_servers import RedisServers, redis_failures

if TYPE_CHECKING:
    import redis

_DEFAULT = "events:dlq"


@click.group()
def dlq() -> None:
    """Dead letters: invalid stream entries, in REDIS_DLQ_STREAM or events:dlq."""


@dlq.command("list")
@click.option("--count", type=click.IntRange(min=1), default=20, help="How many.")
def list_letters(count: int) -> None:
    """List the newest dead letters, one on each line."""
    servers, stream = _open()
    with redis_failures():
        found: Any = servers.primary(stream).xrevrange(stream, count=count)
    for letter_id, fields in found:
        entry = _text(fields)
        click.echo(
            f"{letter_id.decode()}  {entry['stream']} {entry['entry_id']}"
            f"  {entry['reason']} ({entry['size']} bytes)  {entry['error']}"
        )
    if not found:
        click.echo(f"{stream} is empty", err=True)


@dlq.command()
@click.argument("letter_id", metavar="ID")
def show(letter_id: str) -> None:
    """Show one dead letter: its description on stderr, its payload on stdout."""
    servers, stream = _open()
    fields = _fetch(servers.primary(stream), stream, letter_id)
    entry = _text(fields)
    for name in ("stream", "entry_id", "reason", "error", "size"):
        click.echo(f"{name}: {entry[name]}", err=True)
    click.echo(fields[b"data"])


@dlq.command()
@click.argument("letter_ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "everything", is_flag=True, help="All dead letters.")
def replay(letter_ids: tuple[str, ...], everything: bool) -> None:
    """Add dead letters to their stream again, and remove them here.

    An entry that is still invalid stays, and the reason is printed. Publish a corrected event
    instead.
    """
    from ..core.events import InvalidEvent, parse_event

    if bool(letter_ids) == everything:
        raise click.UsageError("pass ids, or --all")
    servers, stream = _open()
    client = servers.primary(stream)
    if everything:
        with redis_failures():
            found: Any = client.xrange(stream)
        letters = [(letter_id.decode(), fields) for letter_id, fields in found]
    else:
        letters = [(letter_id, _fetch(client, stream, letter_id)) for letter_id in letter_ids]
    still_invalid = 0
    for letter_id, fields in letters:
        data, name = fields[b"data"], fields[b"stream"].decode()
        try:
            parse_event(data, channel=name, received_at=0)
        except InvalidEvent as invalid:
            still_invalid += 1
            click.echo(printable(f"{letter_id}: {invalid}"), err=True)
            continue
        with redis_failures():
            servers.primary(name).xadd(name, {"data": data})
            client.xdel(stream, letter_id)
        click.echo(printable(f"{letter_id} -> {name}"))
    click.echo(f"{len(letters) - still_invalid} replayed, {still_invalid} still invalid", err=True)
    if still_invalid:
        raise SystemExit(FAILED)


def _open() -> tuple[RedisServers, str]:
    settings = settings_or_exit()
    return RedisServers(settings.redis_url), settings.redis_dlq_stream or _DEFAULT


def _fetch(client: "redis.Redis", stream: str, letter_id: str) -> dict[bytes, bytes]:
    with redis_failures():
        found: Any = client.xrange(stream, letter_id, letter_id)
    if not found:
        raise Failure(f"no entry {letter_id} in {stream}")
    fields: dict[bytes, bytes] = found[0][1]
    return fields


def _text(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {
        name.decode(errors="replace"): printable(value.decode(errors="replace"))
        for name, value in fields.items()
    }
