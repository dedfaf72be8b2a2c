"""``dlq``: look at stream entries that were no events, and play them again once mended."""

from typing import TYPE_CHECKING, Any

import click

from ..core.printable import printable
from .errors import FAILED, Failure, settings_or_exit

if TYPE_CHECKING:
    import redis

_DEFAULT = "events:dlq"


@click.group()
def dlq() -> None:
    """Entries that were no events (REDIS_DLQ_STREAM, else events:dlq)."""


@dlq.command("list")
@click.option("--count", type=click.IntRange(min=1), default=20, help="The newest so many.")
def list_letters(count: int) -> None:
    """List the newest entries, a line each."""
    client, stream = _open()
    found: Any = _asked(lambda: client.xrevrange(stream, count=count))
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
    """Show one entry: what it is on stderr, what it held on stdout."""
    client, stream = _open()
    fields = _fetch(client, stream, letter_id)
    entry = _text(fields)
    for name in ("stream", "entry_id", "reason", "error", "size"):
        click.echo(f"{name}: {entry[name]}", err=True)
    click.echo(fields[b"data"])


@dlq.command()
@click.argument("letter_ids", nargs=-1, metavar="[ID]…")
@click.option("--all", "everything", is_flag=True, help="All that there is.")
def replay(letter_ids: tuple[str, ...], everything: bool) -> None:
    """Add entries to their stream again, and remove them here.

    What is still no event stays, with the reason: mend the gateway's rules, or publish it anew.
    """
    from ..core.events import InvalidEvent, parse_event

    if bool(letter_ids) == everything:
        raise click.UsageError("name entries, or say --all")
    client, stream = _open()
    if everything:
        found: Any = _asked(lambda: client.xrange(stream))
        letters = [(letter_id.decode(), fields) for letter_id, fields in found]
    else:
        letters = [(letter_id, _fetch(client, stream, letter_id)) for letter_id in letter_ids]
    kept = 0
    for letter_id, fields in letters:
        data, name = fields[b"data"], fields[b"stream"].decode()
        try:
            parse_event(data, channel=name, received_at=0)
        except InvalidEvent as invalid:
            kept += 1
            click.echo(printable(f"{letter_id} stays: {invalid}"), err=True)
            continue
        _asked(lambda name=name, data=data: client.xadd(name, {"data": data}))
        _asked(lambda letter_id=letter_id: client.xdel(stream, letter_id))
        click.echo(printable(f"{letter_id} -> {name}"))
    click.echo(f"{len(letters) - kept} replayed, {kept} kept", err=True)
    if kept:
        raise SystemExit(FAILED)


def _open() -> "tuple[redis.Redis, str]":
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    from ..redis_url import RedisAddress

    settings = settings_or_exit()
    pool = redis.ConnectionPool(
        **RedisAddress.from_url(settings.redis_url).pool_options(redis),
        protocol=2,
        socket_timeout=5,
        socket_connect_timeout=5,
        retry=Retry(NoBackoff(), 0),  # an event must not be added twice unasked
    )
    return redis.Redis(connection_pool=pool), settings.redis_dlq_stream or _DEFAULT


def _asked(ask: Any) -> Any:
    """What Redis answers, or a line that says why it does not."""
    import redis

    try:
        return ask()
    except redis.RedisError as error:
        raise Failure(f"Redis: {type(error).__name__}; trio-gateway check says more") from None


def _fetch(client: "redis.Redis", stream: str, letter_id: str) -> dict[bytes, bytes]:
    found: Any = _asked(lambda: client.xrange(stream, letter_id, letter_id))
    if not found:
        raise Failure(f"no entry {letter_id} in {stream}")
    fields: dict[bytes, bytes] = found[0][1]
    return fields


def _text(fields: dict[bytes, bytes]) -> dict[str, str]:
    return {
        name.decode(errors="replace"): printable(value.decode(errors="replace"))
        for name, value in fields.items()
    }
