"""``publish``: publish events from a file to Redis, as a backend does."""

import time
from collections.abc import Iterable, Iterator
from contextlib import closing
from typing import TYPE_CHECKING, Any

import click

from ..core.printable import printable
from .errors import FAILED, Failure, settings_or_exit

if TYPE_CHECKING:
    from ..publisher import Publisher
    from ..publisher.adding import Confirm
    from .event_files import FileEvent


class _Tally:
    """The number of events so far, by outcome."""

    def __init__(self) -> None:
        self.added = 0
        self.published = 0
        self.without_subscriber = 0
        self.invalid = 0
        self._started = time.monotonic()

    def __str__(self) -> str:
        seconds = time.monotonic() - self._started
        sent = self.added + self.published
        text = (
            f"{sent} published ({self.added} to streams, {self.published} on channels),"
            f" {self.invalid} invalid, in {seconds:.1f} s"
        )
        if seconds >= 0.1:
            text += f", {sent / seconds:.0f}/s"
        return text


def _replicas(context: Any, option: Any, value: str) -> "Confirm":
    if value == "all":
        return "all"
    if not (value.isascii() and value.isdecimal()):
        raise click.BadParameter('must be a number of replicas or "all"')
    return int(value)


@click.command()
@click.argument(
    "file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), metavar="FILE|-"
)
@click.option(
    "--rate",
    type=click.FloatRange(min=0),
    default=0,
    metavar="N",
    help="Events per second; 0, the default, is as fast as possible.",
)
@click.option(
    "--repeat", type=click.IntRange(min=1), default=1, help="Publish the file N times.", metavar="N"
)
@click.option("--now", is_flag=True, help="Set each event's ts to the present time.")
@click.option(
    "--confirm",
    callback=_replicas,
    default="0",
    metavar="N|all",
    help="Wait until this many replicas have each event of a stream; stop at one in doubt.",
)
def publish(file: str, rate: float, repeat: int, now: bool, confirm: "Confirm") -> None:
    """Publish one event, or a file of them, to the Redis at REDIS_URL.

    FILE contains one JSON object, or one on each line: an event, or {"channel": …, "event": …} to
    choose the channel. An event alone goes where its type belongs: a durable event to the first of
    REDIS_STREAMS (with REDIS_STREAM_SHARDS to the shard of its tenant), any other on a channel.
    """
    from ..publisher import Publisher, PublishFailed

    settings = settings_or_exit()
    streams = settings.redis_streams
    if not streams:
        raise Failure("REDIS_STREAMS is empty: there is nowhere to add durable events", 2)
    tally = _Tally()
    with (
        click.open_file(file, "rb") as opened,
        closing(
            Publisher(
                settings.redis_url,
                stream=streams[0],
                shards=settings.redis_stream_shards,
                max_length=None,  # the backends decide how long their stream is
                routes=settings.routes,
                confirm=confirm,
            )
        ) as to,
    ):
        events = _events(opened, repeat)
        status = 0
        try:
            for event in _with_progress(_paced(events, rate), _count(file, repeat)):
                _publish(to, event.now() if now else event, streams, tally)
        except PublishFailed as failed:
            click.echo(printable(f"trio-gateway: {failed}"), err=True)
            status = FAILED
        except KeyboardInterrupt:
            status = 130
    click.echo(str(tally))
    if tally.without_subscriber:
        click.echo(
            f"trio-gateway: {tally.without_subscriber} of them had no subscriber:"
            " is a gateway running on this Redis, with these patterns?",
            err=True,
        )
    raise SystemExit(status or (FAILED if tally.invalid else 0))


def _publish(to: "Publisher", event: "FileEvent", streams: Iterable[str], tally: _Tally) -> None:
    from ..core.event_ids import DEFAULT_STREAM
    from ..publisher import InvalidEvent

    where: dict[str, str] = {}
    if event.channel is not None:
        named_stream = event.channel in {DEFAULT_STREAM, *streams}
        where = {"stream" if named_stream else "channel": event.channel}
    try:
        outcome = to.publish(event.payload, **where)
    except InvalidEvent as invalid:
        tally.invalid += 1
        click.echo(printable(f"line {event.number}: {invalid}"), err=True)
        return
    if isinstance(outcome, str):
        tally.added += 1
    else:
        tally.published += 1
        tally.without_subscriber += not outcome


def _events(file: Any, repeat: int) -> Iterator["FileEvent"]:
    from .event_files import read_events

    if repeat == 1:
        yield from read_events(file)
        return
    events = list(read_events(file))
    for _ in range(repeat):
        yield from events


def _count(file: str, repeat: int) -> int | None:
    """The number of events, or None for stdin."""
    if file == "-":
        return None
    with open(file, "rb") as opened:
        return repeat * sum(1 for _ in _events(opened, 1))


def _paced(events: Iterator["FileEvent"], rate: float) -> Iterator["FileEvent"]:
    started = time.monotonic()
    for i, event in enumerate(events):
        if rate and (wait := started + i / rate - time.monotonic()) > 0:
            time.sleep(wait)
        yield event


def _with_progress(events: Iterator["FileEvent"], total: int | None) -> Iterator["FileEvent"]:
    """Yield the same events, with a progress bar on a terminal."""
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield from events
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("publishing"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(events, total=total)
